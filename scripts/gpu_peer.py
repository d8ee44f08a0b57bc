#!/usr/bin/env python3
"""The Hugging Face stack on this GPU, and how many times faster we are.

    gpu_peer.py MODEL OURS     MODEL: a folder in Hugging Face layout; OURS: what gpu_bench printed

transformers' Trainer with PEFT and bitsandbytes: NF4 with double quantization, f16, rank 8 on query_key_value, paged
32-bit AdamW, accumulation 8, batches of 4; the same lengths as crate/examples/gpu_bench/step.rs. Medians of windows.
"""
import re
import statistics
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments

ACCUMULATION, BATCH = 8, 4


def load(folder):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float16
    )
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float16, quantization_config=quantization, device_map={"": 0}
    )
    base.enable_input_require_grads()
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["query_key_value"]))


class Clock(TrainerCallback):
    """Seconds of each window of accumulation, the card waited for."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *args, **kwargs):
        torch.cuda.synchronize()
        self.begin = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.begin)


def rows(vocabulary, lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, vocabulary, (n,), generator=generator) for n in lengths]


def pad(rows):
    length = max(len(row) for row in rows)
    filled = lambda row, value: torch.cat([row, torch.full((length - len(row),), value)])
    return {
        "input_ids": torch.stack([filled(row, 3) for row in rows]),
        "attention_mask": torch.stack([filled(torch.ones_like(row), 0) for row in rows]),
        "labels": torch.stack([filled(row, -100) for row in rows]),
    }


def train(model, lengths, checkpointing, steps=7):
    """Milliseconds a micro-batch, and MiB at the peak."""
    model.train()
    arguments = TrainingArguments(
        output_dir="/tmp/gpu_peer", per_device_train_batch_size=BATCH, gradient_accumulation_steps=ACCUMULATION,
        gradient_checkpointing=checkpointing, optim="paged_adamw_32bit", max_steps=steps, logging_steps=10**6,
        save_strategy="no", report_to=[], learning_rate=1e-4,
    )
    clock = Clock()
    data = rows(model.config.vocab_size, lengths)[: steps * ACCUMULATION * BATCH]
    torch.cuda.reset_peak_memory_stats()
    Trainer(model=model, args=arguments, train_dataset=data, data_collator=pad, callbacks=[clock]).train()
    return statistics.median(clock.seconds[2:]) * 1e3 / ACCUMULATION, torch.cuda.max_memory_allocated() >> 20


def generate(model):
    """Tokens a second of 200 sampled after 32."""
    model.eval()
    model.config.use_cache = True
    prompt = torch.arange(100, 132, device="cuda")[None]
    speeds = []
    for _ in range(2):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=True, min_new_tokens=200,
                max_new_tokens=200, pad_token_id=3,
            )
        torch.cuda.synchronize()
        speeds.append((out.shape[1] - 32) / (time.perf_counter() - begin))
    return max(speeds)


def ours(text, pattern):
    found = re.search(pattern, text)
    return float(found[1].replace(",", "")) if found else None


def report(what, got, peer, unit, faster_is_less):
    ratio = "" if got is None else f", {peer / got if faster_is_less else got / peer:.1f} times as fast"
    mine = "not measured" if got is None else f"{got:g}"
    print(f"{what}: ours {mine}, Hugging Face {peer:.4g} {unit}{ratio}", flush=True)


def main(folder, file):
    text = open(file).read()
    model = load(folder)
    count = 7 * ACCUMULATION * BATCH
    even = [256] * count
    # As in step.rs: 64 batches of four.
    ragged = [32 + (i * 131 + j * 71) * 2_654_435_761 % 225 for i in range(64) for j in range(4)][:count]
    for name, lengths, checkpointing in [
        ("4 x 256", even, True), ("4 x 32..256", ragged, True), ("4 x 256", even, False)
    ]:
        if not checkpointing:
            model.gradient_checkpointing_disable()
        ms, peak = train(model, lengths, checkpointing)
        pattern = rf"step {re.escape(name)}, checkpointing {str(checkpointing).lower()}: ([\d.]+) ms"
        what = f"step {name}, checkpointing {checkpointing}"
        if name == "4 x 256":
            report(what, ours(text, pattern), ms, f"ms a micro-batch, peak {peak} MiB", True)
        else:
            tokens = sum(lengths) / len(lengths) * BATCH / ms * 1e3
            got = ours(text, pattern.replace("([\\d.]+) ms", "[\\d.]+ ms.*?, ([\\d,]+) tokens/s"))
            report(what, got, tokens, "real tokens/s", False)
    report("generation, sampled", ours(text, r"generation, sampled: ([\d.]+)"), generate(model), "tokens/s", False)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
