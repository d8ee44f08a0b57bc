#!/usr/bin/env python3
"""The Hugging Face stack on this GPU, PyTorch's best step, and how many times faster we are.

    gpu_peer.py MODEL OURS     MODEL: a folder in Hugging Face layout; OURS: what gpu_bench printed

transformers' Trainer with PEFT and bitsandbytes: NF4 with double quantization, f16, rank 8 on query_key_value, paged
32-bit AdamW, accumulation 8, batches of 4; the same lengths as crate/examples/gpu_bench/step.rs. Medians of windows.
PyTorch's best step: the same NF4 weights, everything else in bf16, SDPA, one CUDA graph a micro-batch, compiled or not.
"""
import gc
import re
import signal
import statistics
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments
from transformers.models.bloom.modeling_bloom import BloomAttention, BloomGelu

ACCUMULATION, BATCH = 8, 4
# Seconds for PyTorch's best step, most of which goes into compiling.
PATIENCE = 140
# Its gradients against transformers' own, both in bf16: 0.07 when right, 0.36 with each head's ALiBi given to the next.
SAME = 0.2


def load(folder, dtype):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=quantization, device_map={"": 0}
    )
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


def attend(self, hidden, residual, alibi, attention_mask, **_):
    """BLOOM's attention by SDPA; alibi is in the mask, which every row of the batch shares."""
    q, k, v = self._reshape(self.query_key_value(hidden))  # each (B, heads, T, hs)
    mask = attention_mask.expand(len(q), -1, -1, -1)
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.inv_norm_factor)
    return self.dense(out.transpose(1, 2).flatten(2)) + residual, None


def fast_loss(base, length):
    """BLOOM's loss on rows without padding: masks made once, attention and gelu as one kernel each."""
    BloomAttention.forward = attend
    BloomGelu.forward = lambda self, x: functional.gelu(x, approximate="tanh")
    body = base.transformer
    ones = torch.ones(1, length, dtype=torch.long, device="cuda")
    alibi = body.build_alibi_tensor(ones, body.num_heads, torch.float32)  # (heads, 1, T): slope * j
    future = torch.ones(length, length, dtype=torch.bool, device="cuda").triu(1)
    mask = (alibi - alibi.mT).masked_fill(future, float("-inf")).to(base.dtype)[None]  # slope * (j - i), small near i

    def loss(ids):
        x = body.word_embeddings_layernorm(body.word_embeddings(ids))  # (B, T, C)
        for block in body.h:
            x = block(x, alibi=None, attention_mask=mask)[0]
        logits = base.lm_head(body.ln_f(x)).float().flatten(0, 1)  # (B * T, vocabulary)
        return functional.cross_entropy(logits, functional.pad(ids[:, 1:], (0, 1), value=-100).flatten())

    return loss


def record(step):
    """A CUDA graph of step, which has run thrice before, as libraries and compilers want."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def play(loss, params, batches, expected):
    """Milliseconds a micro-batch, without the optimizer as in step.rs; MiB at the peak; the gradients' error."""
    ids = batches[0].clone()
    graph = record(lambda: loss(ids).backward())
    grads = [p.grad for p in params]
    seconds = []
    for _ in range(15):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for batch in batches:
            ids.copy_(batch)
            graph.replay()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() >> 20
    torch._foreach_zero_(grads)
    ids.copy_(batches[0])
    graph.replay()
    error = (torch.cat([g.flatten() for g in grads]).float() - expected).norm() / expected.norm()
    return statistics.median(seconds) * 1e3 / ACCUMULATION, peak, error.item()


def impatient(*_):
    raise TimeoutError(f"not done in {PATIENCE} s")


def best(folder, got):
    """The fastest of PyTorch's steps on 4 x 256, checkpointing off."""
    what = "step 4 x 256, checkpointing False"
    model = load(folder, torch.bfloat16).eval()  # nothing drops out here; so said, it costs no kernels
    params = [p for p in model.parameters() if p.requires_grad]
    for p in params:
        p.data = p.data.bfloat16()
        p.grad = torch.zeros_like(p)
    count = ACCUMULATION * BATCH
    batches = torch.stack(rows(model.config.vocab_size, [256] * count)).view(ACCUMULATION, BATCH, 256).cuda()
    model(input_ids=batches[0], labels=batches[0], use_cache=False).loss.backward()
    expected = torch.cat([p.grad.flatten() for p in params]).float()
    loss = fast_loss(model.get_base_model(), 256)
    measured = []
    for name, step in [("CUDA graph", loss), ("compiled, CUDA graph", torch.compile(loss, dynamic=False))]:
        try:
            ms, peak, difference = play(step, params, batches, expected)
            if not difference < SAME:
                raise ValueError(f"its gradients differ from transformers' by {difference:.2g}")
            print(f"{what}, PyTorch, {name}: {ms:.2f} ms, peak {peak} MiB", flush=True)
            measured.append((ms, peak, name))
        except Exception as error:  # of any library in between: the rest goes on
            reason = (str(error).splitlines() or [""])[0]
            print(f"{what}, PyTorch, {name}: not measured: {type(error).__name__}: {reason}", flush=True)
    if measured:
        ms, peak, name = min(measured)
        report(what, got, ms, f"ms a micro-batch, peak {peak} MiB ({name})", True, "PyTorch at its best")


def ours(text, pattern):
    found = re.search(pattern, text)
    return float(found[1].replace(",", "")) if found else None


def report(what, got, peer, unit, faster_is_less, who="Hugging Face"):
    ratio = "" if got is None else f", {peer / got if faster_is_less else got / peer:.3g} times as fast"
    mine = "not measured" if got is None else f"{got:g}"
    print(f"{what}: ours {mine}, {who} {peer:.4g} {unit}{ratio}", flush=True)


def main(folder, file):
    text = open(file).read()
    model = load(folder, torch.float16)
    model.enable_input_require_grads()  # for checkpointing
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
    del model
    gc.collect()
    torch.cuda.empty_cache()
    signal.signal(signal.SIGALRM, impatient)
    signal.alarm(PATIENCE)
    try:
        best(folder, ours(text, r"step 4 x 256, checkpointing false: ([\d.]+) ms"))
    except Exception as error:
        print(f"PyTorch at its best: not measured: {type(error).__name__}: {error}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
