// What a quantized weight consists of besides its codes.
#pragma once
#include <cstdint>

// The 16 values of a 4-bit type.
struct Code {
    float v[16];
};

// The block maxima: f32, or bytes that stand for code2[byte] * absmax2[byte's block] + offset.
struct Absmax {
    const void *at;
    const float *absmax2; // nullptr: not nested
    const float *code2;   // 256 values
    float offset;
    int log_block, log_block2;
};
