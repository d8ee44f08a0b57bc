"""How much instruction tuning teaches the base model, in PyTorch on two CPU threads: the form before and after.

    python finetune.py ../../notebooks/models/poet-bloom-zh ../../notebooks/data --before --show 8

LoRA on weights rounded to NF4 and back (block 64, no double quantization), AdamW, linear decay after ten
steps of warmup, clipped at 1. `--header` asks in the base model's own style instead, untuned.
"""

import argparse
import random
import time

import torch
from datasets import load_from_disk
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from poems import FORMS, header, in_form, prompt, read_jsonl, sample

LINEARS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
NF4 = torch.tensor(
    [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0]
    + [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
)


def through_nf4(weight, block=64):
    x = weight.reshape(-1, block)
    absmax = x.abs().amax(1, keepdim=True)
    code = torch.bucketize(x / absmax, (NF4[1:] + NF4[:-1]) / 2)
    return (NF4[code] * absmax).reshape(weight.shape)


def collate(tokenizer, rows):
    """Right-padded ids; labels only on the answer and its end token."""
    asks = [tokenizer(prompt(r))["input_ids"] for r in rows]
    answers = [tokenizer(r["output"])["input_ids"] + [tokenizer.eos_token_id] for r in rows]
    longest = max(len(a) + len(b) for a, b in zip(asks, answers))
    out = {"input_ids": [], "attention_mask": [], "labels": []}
    for ask, answer in zip(asks, answers):
        used = len(ask) + len(answer)
        out["input_ids"].append(ask + answer + [tokenizer.pad_token_id] * (longest - used))
        out["attention_mask"].append([1] * used + [0] * (longest - used))
        out["labels"].append([-100] * len(ask) + answer + [-100] * (longest - used))
    return {k: torch.tensor(v) for k, v in out.items()}


def form_report(label, model, tokenizer, held_out, prompt_of, show):
    torch.manual_seed(1)
    made = sample(model, tokenizer, [prompt_of(r) for r in held_out])
    good = [ended and in_form(text, r["form"]) for r, (text, ended) in zip(held_out, made)]
    by_form = {f: sum(ok for ok, r in zip(good, held_out) if r["form"] == f) for f in FORMS}
    ended = sum(e for _, e in made)
    print(f"{label}: {sum(good)} of {len(good)} in form, {ended} ended; {by_form}", flush=True)
    stride = max(1, len(made) // max(1, show))
    for r, (text, _), ok in list(zip(held_out, made, good))[::stride][:show]:
        print("  ", "+" if ok else "-", f"{r['form']}《{r['title']}》", text.replace("\n", "/"))


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("model")
    ap.add_argument("data", help="folder of poems_zh/ and heldout_titles.jsonl")
    ap.add_argument("--steps", type=int, default=200)
    ap.add_argument("--batch", type=int, default=4)
    ap.add_argument("--lr", type=float, default=5e-3)
    ap.add_argument("--r", type=int, default=8)
    ap.add_argument("--alpha", type=int, default=16)
    ap.add_argument("--targets", nargs="+", default=LINEARS)
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--no-quant", action="store_true")
    ap.add_argument("--before", action="store_true")
    ap.add_argument("--header", action="store_true", help="only judge the base under its own header")
    ap.add_argument("--show", type=int, default=0)
    args = ap.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(args.seed)
    random.seed(args.seed)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    rows, held_out = load_from_disk(f"{args.data}/poems_zh").to_list(), read_jsonl(f"{args.data}/heldout_titles.jsonl")
    if args.header:
        form_report(
            "base, own header", model, tokenizer, held_out, lambda r: header(r["title"], r["form"]), args.show
        )
        return
    if not args.no_quant:
        for name, module in model.named_modules():
            if name.rsplit(".")[-1] in LINEARS:
                module.weight.data = through_nf4(module.weight.data)
    config = LoraConfig(task_type="CAUSAL_LM", r=args.r, lora_alpha=args.alpha, target_modules=args.targets)
    model = get_peft_model(model, config)
    adapters = [p for p in model.parameters() if p.requires_grad]

    def probe():
        with torch.no_grad():
            return model.eval()(**collate(tokenizer, rows[:64])).loss.item()

    start_loss = probe()
    if args.before:
        form_report("before", model, tokenizer, held_out, prompt, args.show)
    optimizer = torch.optim.AdamW(adapters, lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 10, (args.steps - step) / args.steps)
    )
    order, began = [], time.time()
    model.train()
    for _ in range(args.steps):
        if len(order) < args.batch:
            order = random.sample(range(len(rows)), len(rows))
        batch = collate(tokenizer, [rows[order.pop()] for _ in range(args.batch)])
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(adapters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    print(
        f"{args.steps} steps in {time.time() - began:.1f} s, {sum(p.numel() for p in adapters)} parameters trained, "
        f"loss on 64 training rows {start_loss:.3f} -> {probe():.3f}"
    )
    form_report("after", model, tokenizer, held_out, prompt, args.show)


if __name__ == "__main__":
    main()
