"""Train a small BLOOM from scratch on poems.jsonl.gz and save it in Hugging Face layout, f16.

    python pretrain.py poems.jsonl.gz model --steps 9000 --max-seconds 150     # a GPU
    python pretrain.py poems.jsonl.gz model --steps 20 --rows 2000             # a trial on a CPU

`model` holds the tokenizer already; the weights go beside it.
"""

import argparse
import math
import os
import random
import time
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM, GenerationConfig

from poems import read_jsonl

PEAK_LR, WARMUP_STEPS, FLOOR = 3e-3, 100, 0.02


def documents(poem):
    """A poem as four anthologies would head it. Three name the form, so that the form can be asked for."""
    title, author, form = poem["title"], poem["author"], poem["form"]
    body = "\n".join(poem["lines"])
    heads = [f"{title}\n{author}", f"{form}\n《{title}》", f"《{title}》{author}\n{form}", f"{title}（{form}）"]
    return [f"{head}\n\n{body}" for head in heads]


class Corpus:
    """All documents on the device, in three groups by length, so that little of a batch is padding."""

    LENGTHS = (48, 72, 96)

    def __init__(self, poems, tokenizer, device):
        self.pad, self.bos, self.eos = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
        self.tokenizer, self.device = tokenizer, device
        versions = [self.encode(texts) for texts in zip(*map(documents, (p for p in poems if p["split"] == "train")))]
        self.groups = {}
        shorter = 0
        for length in self.LENGTHS:
            rows = [doc for doc in zip(*versions) if shorter < max(map(len, doc)) <= length]
            if rows:
                flat = self.batch([ids for doc in rows for ids in doc], length)
                self.groups[length] = flat.view(len(rows), 4, length)  # (poem, version, position)
            shorter = length
        held = [documents(p)[1] for p in poems if p["split"] == "heldout"]
        self.held_out = sorted(self.encode(held), key=len)

    def encode(self, texts):
        ids = self.tokenizer(list(texts), return_attention_mask=False)["input_ids"]
        return [[self.bos, *x, self.eos] for x in ids]

    def batch(self, rows, length):
        sizes = np.array([len(ids) for ids in rows])
        out = np.full((len(rows), length), self.pad, dtype=np.int32)
        out[np.arange(length) < sizes[:, None]] = np.fromiter(chain.from_iterable(rows), np.int32, sizes.sum())
        return torch.from_numpy(out).to(self.device)

    def draw(self, tokens):
        """A batch of about `tokens` tokens from one group; groups come up in proportion to their size."""
        lengths = list(self.groups)
        length = random.choices(lengths, [len(self.groups[n]) * n for n in lengths])[0]
        group, n = self.groups[length], tokens // length
        poem = torch.randint(len(group), (n,), device=self.device)
        version = torch.randint(4, (n,), device=self.device)
        return group[poem, version].long()


def token_loss(model, ids, pad, reduction="mean"):
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # (B, T-1, vocab)
    labels = ids[:, 1:].masked_fill(ids[:, 1:] == pad, -100)
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction=reduction)


@torch.no_grad()
def held_out_loss(model, corpus):
    """(nats a token, bits a character) over held-out poems, form and title given."""
    total = count = 0
    for i in range(0, len(corpus.held_out), 256):
        rows = corpus.held_out[i : i + 256]
        total += token_loss(model, corpus.batch(rows, len(rows[-1])).long(), corpus.pad, "sum").item()
        count += sum(len(ids) - 1 for ids in rows)
    characters = count - len(corpus.held_out)  # the end token is no character
    return total / count, total / math.log(2) / characters


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("poems")
    ap.add_argument("model")
    ap.add_argument("--out", help="where the weights go, if not to `model`")
    ap.add_argument("--steps", type=int, default=9000)
    ap.add_argument("--max-seconds", type=float, default=math.inf, help="of training; the schedule shrinks to fit")
    ap.add_argument("--batch-tokens", type=int, default=49152)
    ap.add_argument("--rows", type=int, help="use only the first rows")
    args = ap.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    began = time.time()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    corpus = Corpus(read_jsonl(args.poems)[: args.rows], tokenizer, device)
    sizes = {n: len(g) for n, g in corpus.groups.items()}
    print(f"poems by length {sizes}, held out {len(corpus.held_out)}; {time.time() - began:.0f} s", flush=True)

    model = BloomForCausalLM(
        BloomConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            n_layer=6,
            n_head=6,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).to(device)
    print(sum(p.numel() for p in model.parameters()), "parameters", flush=True)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=PEAK_LR,
        betas=(0.9, 0.95),
        fused=device == "cuda",
    )
    loss_of = torch.compile(token_loss, dynamic=False) if device == "cuda" else token_loss

    used, mark, compiled, shown = 0.0, time.time(), set(), 0
    for step in range(10**9):
        progress = max(step / args.steps, used / args.max_seconds)
        if progress >= 1:
            break
        ids = corpus.draw(args.batch_tokens)
        fresh = ids.shape[1] not in compiled and device == "cuda"
        if fresh:  # compiling is not training time: close the account before it
            torch.cuda.synchronize()
            used += time.time() - mark
        for group in optimizer.param_groups:
            cosine = FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * progress)) / 2
            group["lr"] = PEAK_LR * min((step + 1) / WARMUP_STEPS, cosine)
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of(model, ids, corpus.pad)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if fresh:
            torch.cuda.synchronize()
            compiled.add(ids.shape[1])
            print(f"compiled for length {ids.shape[1]}, {time.time() - began:.0f} s since the start", flush=True)
            mark = time.time()
        elif step % 50 == 49:
            loss = loss.item()  # waits for the device
            used, mark = used + time.time() - mark, time.time()
            if progress >= shown:
                nats, _ = held_out_loss(model, corpus)
                print(f"{used:5.0f} s  step {step + 1}  train {loss:.3f}  held out {nats:.3f}", flush=True)
                shown, mark = shown + 0.125, time.time()
    nats, bits = held_out_loss(model, corpus)
    millions = step * args.batch_tokens / 1e6
    print(
        f"done: {step} steps, {millions:.0f}M tokens with padding, {used:.0f} s of training, "
        f"held out {nats:.4f} nats a token, {bits:.4f} bits a character",
        flush=True,
    )

    out = args.out or args.model
    model.generation_config = GenerationConfig(
        bos_token_id=corpus.bos,
        eos_token_id=corpus.eos,
        pad_token_id=corpus.pad,
        do_sample=True,
        temperature=0.8,
        top_p=0.9,
        top_k=0,
        max_new_tokens=120,
    )
    model.half().save_pretrained(out)
    os.chmod(f"{out}/model.safetensors", 0o644)
    print(os.path.getsize(f"{out}/model.safetensors"), "bytes of weights")


if __name__ == "__main__":
    main()
