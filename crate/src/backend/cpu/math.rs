//! Vector math: loops that the compiler turns into SIMD for the CPU it runs on.
//!
//! Multiplication and addition stay separate (no fused multiply-add), so a machine with
//! AVX-512, one with AVX2 and one with neither give the same bits.

use super::simd::simd;

/// Partial sums that a reduction keeps, so that it needs no reordering to be vectorized.
pub(super) const LANES: usize = 32;

#[inline(always)]
pub(super) fn sum_lanes(lanes: [f32; LANES]) -> f32 {
    // Pairwise: the error grows with log2 of the count, and the order is fixed.
    let mut width = LANES / 2;
    let mut lanes = lanes;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Sum of `f` over the elements of slices of one length, side by side, in a fixed order. Over arrays, so that the lanes
/// stay in registers: with indices into slices the compiler keeps them in memory, at half the speed.
#[inline(always)]
fn reduce<const N: usize>(slices: [&[f32]; N], f: impl Fn([f32; N]) -> f32) -> f32 {
    let chunks = slices.map(|slice| slice.as_chunks::<LANES>());
    let mut lanes = [0f32; LANES];
    for i in 0..chunks[0].0.len() {
        let rows = chunks.map(|(whole, _)| &whole[i]);
        for (l, lane) in lanes.iter_mut().enumerate() {
            *lane += f(rows.map(|row| row[l]));
        }
    }
    let mut sum = sum_lanes(lanes);
    for i in 0..chunks[0].1.len() {
        sum += f(chunks.map(|(_, rest)| rest[i]));
    }
    sum
}

/// The largest, `NaN` left out; -inf of nothing.
#[inline(always)]
pub fn max_of(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = x.chunks_exact(LANES);
    let mut max = chunks.remainder().iter().fold(f32::NEG_INFINITY, |m, &v| if v > m { v } else { m });
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane = if v > *lane { v } else { *lane };
        }
    }
    for lane in lanes {
        max = if lane > max { lane } else { max };
    }
    max
}

/// e^x to within 2 units in the last place for x in [-87, 88]; outside, the value at the bound.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + MAGIC;
    let n = shifted - MAGIC;
    // ln 2 in two parts, so that r is exact to the last bit.
    let r = x - n * 0.693_359_4;
    let r = r + n * 2.121_944_4e-4;
    // Taylor's coefficients, corrected by Remez to |r| <= ln(2)/2 (Cephes' expf).
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_2e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 5e-1;
    let y = p * r * r + r + 1.0;
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    y * power
}

/// tanh by the exponential; absolute error below 2e-7.
#[inline(always)]
fn tanh(x: f32) -> f32 {
    let x = if x > 15.0 { 15.0 } else { x };
    let x = if x < -15.0 { -15.0 } else { x };
    1.0 - 2.0 / (exp(2.0 * x) + 1.0)
}

simd! {
    /// sum of `a[i] * b[i]`.
    pub fn dot(a: &[f32], b: &[f32]) -> f32 {
        let n = a.len().min(b.len());
        reduce([&a[..n], &b[..n]], |[a, b]| a * b)
    }
}

simd! {
    /// `out[i] += scale * <row i of b, x>`: rows as short as LoRA's rank.
    pub fn add_products(scale: f32, b: &[f32], x: &[f32], out: &mut [f32]) {
        if let Some(x) = x.as_array::<8>() {
            // The usual rank, whose loop is then one vector.
            for (out, b) in out.iter_mut().zip(b.as_chunks::<8>().0) {
                let mut sum = 0.0;
                for i in 0..8 {
                    sum += b[i] * x[i];
                }
                *out += scale * sum;
            }
            return;
        }
        for (out, b) in out.iter_mut().zip(b.chunks_exact(x.len())) {
            *out += scale * b.iter().zip(x).map(|(b, x)| b * x).sum::<f32>();
        }
    }
}

simd! {
    /// `out[j] = <x, row j>`, rows `row` apart.
    pub fn dots(x: &[f32], rows: &[f32], row: usize, out: &mut [f32]) {
        for (j, out) in out.iter_mut().enumerate() {
            *out = reduce([x, &rows[j * row..][..x.len()]], |[a, b]| a * b);
        }
    }
}

simd! {
    /// out = the sum of `p[j]` times row j, rows `row` apart.
    pub fn weighted_sum(p: &[f32], rows: &[f32], row: usize, out: &mut [f32]) {
        const WIDE: usize = 64;
        let whole = out.len() / WIDE * WIDE;
        for first in (0..whole).step_by(WIDE) {
            // In registers, where the whole of `out` would be read and written for each row.
            let mut sums = [0f32; WIDE];
            for (j, p) in p.iter().enumerate() {
                if let Some(values) = rows[j * row + first..].first_chunk::<WIDE>() {
                    sums.iter_mut().zip(values).for_each(|(sum, v)| *sum += p * v);
                }
            }
            out[first..first + WIDE].copy_from_slice(&sums);
        }
        let rest = &mut out[whole..];
        rest.fill(0.0);
        for (j, p) in p.iter().enumerate() {
            let values = &rows[j * row + whole..][..rest.len()];
            rest.iter_mut().zip(values).for_each(|(sum, v)| *sum += p * v);
        }
    }
}

simd! {
    /// y += scale * x.
    pub fn axpy(scale: f32, x: &[f32], y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y += scale * x;
        }
    }
}

/// The upper half is x in bf16, to the nearest, ties to even; the lower half is anything.
#[inline(always)]
fn bf16_bits(x: f32) -> u32 {
    let bits = x.to_bits();
    // A NaN stays one: it would become zero by the addition.
    if x.is_nan() { bits | 0x0040_0000 } else { bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) }
}

simd! {
    /// Each number rounded to bf16.
    pub fn round_bf16(x: &mut [f32]) {
        for x in x {
            *x = f32::from_bits(bf16_bits(*x) & 0xffff_0000);
        }
    }
}

simd! {
    /// Neighbours in bf16, the first in the lower half: `tile::Numbers::Bf16Pairs` of a row.
    pub fn bf16_pairs(x: &[f32], pairs: &mut [f32]) {
        let (whole, rest) = x.as_chunks::<2>();
        for (pair, [a, b]) in pairs.iter_mut().zip(whole) {
            *pair = f32::from_bits((bf16_bits(*a) >> 16) | (bf16_bits(*b) & 0xffff_0000));
        }
        if let (Some(a), Some(pair)) = (rest.first(), pairs.get_mut(whole.len())) {
            *pair = f32::from_bits(bf16_bits(*a) >> 16);
        }
    }
}

simd! {
    /// In place, the same of rows of `N` elements: neighbours are those above each other. An odd last row pairs with zeros.
    pub fn bf16_row_pairs[const N: usize](level: Level, rows: &mut [[f32; N]]) {
        for i in 0..rows.len().div_ceil(2) {
            let (first, second) = (rows[2 * i], rows.get(2 * i + 1).copied().unwrap_or([0.0; N]));
            for ((pair, a), b) in rows[i].iter_mut().zip(first).zip(second) {
                *pair = f32::from_bits((bf16_bits(a) >> 16) | (bf16_bits(b) & 0xffff_0000));
            }
        }
    }
}

simd! {
    /// z = x + y.
    pub fn add(x: &[f32], y: &[f32], z: &mut [f32]) {
        for ((z, x), y) in z.iter_mut().zip(x).zip(y) {
            *z = x + y;
        }
    }
}

simd! {
    /// x -> softmax(x) in place; gives (max, sum of exp(x - max)), so that log-sum-exp = max + ln(sum).
    pub fn softmax(x: &mut [f32]) -> (f32, f32) {
        let max = max_of(x);
        for v in x.iter_mut() {
            *v = exp(*v - max);
        }
        let sum = reduce([&*x], |[x]| x);
        let inverse = 1.0 / sum;
        for v in x.iter_mut() {
            *v *= inverse;
        }
        (max, sum)
    }
}

simd! {
    /// dx = scale * p * (dp - <p, dp>): softmax backward, `dp` becomes `dx`.
    pub fn softmax_backward(p: &[f32], dp: &mut [f32], scale: f32) {
        let n = p.len().min(dp.len());
        let inner = reduce([&p[..n], &dp[..n]], |[p, d]| p * d);
        for (d, p) in dp[..n].iter_mut().zip(p) {
            *d = scale * p * (*d - inner);
        }
    }
}

simd! {
    /// `x[j] = scale * x[j] + slope * j`: attention scores with ALiBi.
    pub fn scale_alibi(x: &mut [f32], scale: f32, slope: f32) {
        for (j, v) in x.iter_mut().enumerate() {
            *v = *v * scale + slope * (j as i32 as f32);
        }
    }
}

/// sqrt(2 / pi), as BLOOM's own gelu has it.
const GELU_A: f32 = 0.797_884_6;
const GELU_B: f32 = 0.044_715;

simd! {
    /// y = 0.5 x (1 + tanh(0.79788456 x (1 + 0.044715 x^2))).
    pub fn gelu(x: &[f32], y: &mut [f32]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = 0.5 * x * (1.0 + tanh(GELU_A * x * (1.0 + GELU_B * x * x)));
        }
    }
}

simd! {
    /// dx = dy * gelu'(x).
    pub fn gelu_backward(x: &[f32], dy: &[f32], dx: &mut [f32]) {
        for ((dx, &x), &dy) in dx.iter_mut().zip(x).zip(dy) {
            let t = tanh(GELU_A * x * (1.0 + GELU_B * x * x));
            let slope = 0.5 * x * (1.0 - t * t) * (GELU_A + 3.0 * GELU_A * GELU_B * x * x) + 0.5 * (1.0 + t);
            *dx = dy * slope;
        }
    }
}

simd! {
    /// y = (x - mean) / sqrt(var + eps) * weight + bias for one row; gives (mean, 1/sqrt(var + eps)).
    pub fn layer_norm_row(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, y: &mut [f32]) -> (f32, f32) {
        let n = x.len() as f32;
        let mean = reduce([x], |[x]| x) / n;
        let variance = reduce([x], |[x]| (x - mean) * (x - mean)) / n;
        let rstd = 1.0 / (variance + eps).sqrt();
        for (((y, &x), &w), &b) in y.iter_mut().zip(x).zip(weight).zip(bias) {
            *y = (x - mean) * rstd * w + b;
        }
        (mean, rstd)
    }
}

simd! {
    /// dx = (w dy - mean(w dy) - xhat * mean(w dy * xhat)) * rstd + residual, for one row.
    /// `dx` holds the residual's gradient (or zeros) on entry.
    pub fn layer_norm_backward_row(x: &[f32], weight: &[f32], dy: &[f32], mean: f32, rstd: f32, dx: &mut [f32]) {
        let n = x.len();
        let (weight, dy) = (&weight[..n], &dy[..n]);
        let sum = reduce([weight, dy], |[w, dy]| w * dy) / n as f32;
        let sum_xhat = reduce([weight, dy, x], |[w, dy, x]| w * dy * ((x - mean) * rstd)) / n as f32;
        for (((dx, &x), &w), &dy) in dx.iter_mut().zip(x).zip(weight).zip(dy) {
            let xhat = (x - mean) * rstd;
            *dx += (w * dy - sum - xhat * sum_xhat) * rstd;
        }
    }
}

simd! {
    /// y = x / sqrt(mean(x^2) + eps) * weight for one row; gives 1 / sqrt(mean(x^2) + eps).
    pub fn rms_norm_row(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) -> f32 {
        let mean = reduce([x], |[x]| x * x) / x.len() as f32;
        let inverse = 1.0 / (mean + eps).sqrt();
        for ((y, &x), &w) in y.iter_mut().zip(x).zip(weight) {
            *y = w * (x * inverse);
        }
        inverse
    }
}

simd! {
    /// dx = (w dy - xhat * mean(w dy * xhat)) * inverse + residual, for one row; `inverse` is
    /// what [`rms_norm_row`] gave. `dx` holds the residual's gradient (or zeros) on entry.
    pub fn rms_norm_backward_row(x: &[f32], weight: &[f32], dy: &[f32], inverse: f32, dx: &mut [f32]) {
        let n = x.len();
        let (weight, dy) = (&weight[..n], &dy[..n]);
        let mean = reduce([weight, dy, x], |[w, dy, x]| w * dy * (x * inverse)) / n as f32;
        for (((dx, &x), &w), &dy) in dx.iter_mut().zip(x).zip(weight).zip(dy) {
            *dx += (w * dy - x * inverse * mean) * inverse;
        }
    }
}

simd! {
    /// y = silu(gate) * up.
    pub fn swiglu(gate: &[f32], up: &[f32], y: &mut [f32]) {
        for ((y, &g), &u) in y.iter_mut().zip(gate).zip(up) {
            *y = g / (1.0 + exp(-g)) * u;
        }
    }
}

simd! {
    /// dgate = dy * up * silu'(gate), dup = dy * silu(gate).
    pub fn swiglu_backward(gate: &[f32], up: &[f32], dy: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
        let out = dgate.iter_mut().zip(dup.iter_mut());
        for ((((dgate, dup), &g), &u), &dy) in out.zip(gate).zip(up).zip(dy) {
            let sigmoid = 1.0 / (1.0 + exp(-g));
            *dgate = dy * u * sigmoid * (1.0 + g * (1.0 - sigmoid));
            *dup = dy * g * sigmoid;
        }
    }
}

simd! {
    /// Turns every head of a row: element i and element i + head_dim / 2 by the i-th angle.
    /// `angles` holds head_dim / 2 cosines, then as many sines, which are multiplied by `sign`.
    pub fn rotate(x: &[f32], angles: &[f32], sign: f32, y: &mut [f32]) {
        let (cos, sin) = angles.split_at(angles.len() / 2);
        for (x, y) in x.chunks_exact(angles.len()).zip(y.chunks_exact_mut(angles.len())) {
            let (x1, x2) = x.split_at(cos.len());
            let (y1, y2) = y.split_at_mut(cos.len());
            for i in 0..cos.len() {
                let sin = sign * sin[i];
                y1[i] = x1[i] * cos[i] - x2[i] * sin;
                y2[i] = x2[i] * cos[i] + x1[i] * sin;
            }
        }
    }
}

/// The sum of `f` over the elements, in f64 and in an order of its own that SIMD can follow.
#[inline(always)]
pub fn sum_f64(x: &[f32], f: impl Fn(f64) -> f64) -> f64 {
    let (whole, rest) = x.as_chunks::<16>();
    let mut sums = [0f64; 16];
    for chunk in whole {
        for (s, v) in sums.iter_mut().zip(chunk) {
            *s += f(f64::from(*v));
        }
    }
    sums.iter().sum::<f64>() + rest.iter().map(|v| f(f64::from(*v))).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_exact_to_two_units_in_the_last_place() {
        for i in -870..=880 {
            let x = i as f32 / 10.0;
            let want = f64::from(x).exp();
            let got = f64::from(exp(x));
            assert!((got / want - 1.0).abs() < 2.5e-7, "exp({x}) = {got}, expected {want}");
        }
        assert!(exp(f32::NEG_INFINITY) < 1e-37);
    }

    #[test]
    fn gelu_backward_is_the_slope_of_gelu() {
        let x: Vec<f32> = (-60..60).map(|i| i as f32 / 10.0).collect();
        let (mut up, mut down, mut dx) = (x.clone(), x.clone(), x.clone());
        gelu(&x.iter().map(|v| v + 1e-2).collect::<Vec<_>>(), &mut up);
        gelu(&x.iter().map(|v| v - 1e-2).collect::<Vec<_>>(), &mut down);
        gelu_backward(&x, &vec![1.0; x.len()], &mut dx);
        for i in 0..x.len() {
            assert!((dx[i] - (up[i] - down[i]) / 2e-2).abs() < 1e-3, "at {}", x[i]);
        }
    }

    #[test]
    fn softmax_of_any_length_sums_to_one() {
        for n in 1..100 {
            let mut x: Vec<f32> = (0..n).map(|i| ((i * 7919) % 13) as f32).collect();
            let want: f64 = x.iter().map(|&v| f64::from(v).exp()).sum::<f64>().ln();
            let (max, sum) = softmax(&mut x);
            assert!((f64::from(max + sum.ln()) - want).abs() < 1e-5);
            assert!((x.iter().sum::<f32>() - 1.0).abs() < 1e-5);
        }
    }

    #[test]
    fn swiglu_backward_is_the_slope_of_swiglu() {
        let g: Vec<f32> = (-60..60).map(|i| i as f32 / 10.0).collect();
        let u: Vec<f32> = g.iter().map(|v| (v * 3.0).sin() + 0.5).collect();
        let at = |dg: f32, du: f32| {
            let shift = |v: &[f32], by: f32| v.iter().map(|v| v + by).collect::<Vec<_>>();
            let mut y = g.clone();
            swiglu(&shift(&g, dg), &shift(&u, du), &mut y);
            y
        };
        let (mut dg, mut du) = (g.clone(), g.clone());
        swiglu_backward(&g, &u, &vec![1.0; g.len()], &mut dg, &mut du);
        for i in 0..g.len() {
            assert!((dg[i] - (at(1e-2, 0.0)[i] - at(-1e-2, 0.0)[i]) / 2e-2).abs() < 1e-3, "gate {}", g[i]);
            assert!((du[i] - (at(0.0, 1e-2)[i] - at(0.0, -1e-2)[i]) / 2e-2).abs() < 1e-3, "up at {}", g[i]);
        }
        // Far out the exponential is at its bound: nothing overflows.
        let mut y = [0.0; 2];
        swiglu(&[-1e4, 1e4], &[1.0, 1.0], &mut y);
        assert!(y[0].abs() < 1e-30 && y[1] == 1e4, "{y:?}");
    }
}
