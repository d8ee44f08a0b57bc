"""The Python stack on the bundled model: tokens/s of a QLoRA training step and of generation, beside our own bench.

    python scripts/bench_torch.py [--threads 2] [--repeats 7] [--only train_nf4]

Needs torch, transformers, peft, bitsandbytes, datasets, and a machine with nothing else to do: PyTorch's threads wait for
each other by spinning, so that one busy neighbour halves its speed. One JSON line a measurement: {"name",
"tokens_per_s" or "loads_per_s": median over the repeats, "spread": (fastest - slowest) / median}. Tokens are real ones,
without padding.

- `train_nf4_{f32,bf16}[_checkpointing]`: forward, backward, clipping and AdamW on the walkthrough's prompts: NF4 with
  double quantization, compute in f32 or bf16, LoRA r 8 on query_key_value, batch 4 padded to the longest; a repeat is
  a pass over the same 8 batches. bitsandbytes dequantizes a layer's weights each time it uses them, as ours does.
- `train_f32`: the same without quantization.
- `generate_f32_lora`: 120 tokens, batch 1, greedy, KV cache, f32 base with the adapter unmerged.
  `generate_nf4_lora`: the same on the NF4 base.
- `smollm2_*`: SmolLM2-135M's shape with random weights, LoRA r 8 on q_proj, k_proj and v_proj: a step on 4 x 128 tokens,
  120 new tokens, a prompt of 512; dtypes as above.
- `model_train_*`, where QLORA_MODEL names the folder of a BLOOM: a step on 4 x 128 tokens.
- `load_nf4`, where QLORA_MODEL names the folder of a model: from its files to NF4 with double quantization. In f16
  transformers maps the files and reads nothing yet, so that there is nothing to compare.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore")

import torch  # noqa: E402
from datasets import load_from_disk  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
)

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
MODEL = NOTEBOOKS / "models" / "poet-bloom-zh"
NEW_TOKENS = 120


def report(name, amount, seconds, unit="tokens_per_s"):
    rates = [amount / s for s in seconds]
    middle = statistics.median(rates)
    spread = (max(rates) - min(rates)) / middle
    print(json.dumps({"name": name, unit: float(f"{middle:.5g}"), "spread": round(spread, 3)}), flush=True)


def timed(call, repeats):
    """Seconds of each of `repeats` calls, after one that warms up."""
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def base_model(folder, dtype, four_bit):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map="cpu", quantization_config=quantization if four_bit else None
    )


def lora_model(dtype, four_bit, folder=MODEL, targets=("query_key_value",)):
    base = base_model(folder, dtype, four_bit)
    torch.manual_seed(0)
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=list(targets)))


def batches(tokenizer, count=8, size=4):
    """The first rows of the bundled data, as the walkthrough's process() and its collator make them."""
    rows = load_from_disk(NOTEBOOKS / "data" / "poems_zh").select(range(count * size))
    features = []
    for row in rows:
        question = f"Human: {row['instruction']}\n{row['input']}".strip()
        prompt = tokenizer(f"{question}\n\nAssistant: ")["input_ids"]
        answer = tokenizer(row["output"] + tokenizer.eos_token)["input_ids"]
        ids = prompt + answer
        labels = [-100] * len(prompt) + answer
        features.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    collate = DataCollatorForSeq2Seq(tokenizer=tokenizer, padding=True)
    return [collate(features[i : i + size]) for i in range(0, len(features), size)]


def train(name, model, checkpointing, data, repeats):
    model.train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-4)

    def one_pass():
        for batch in data:
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(adapters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    report(name, sum(int(b["attention_mask"].sum()) for b in data), timed(one_pass, repeats))


def generate(name, model, ids, repeats):
    model.eval()
    mask = torch.ones_like(ids)

    def one_text():
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
        )
        assert out.shape[1] == ids.shape[1] + NEW_TOKENS

    report(name, NEW_TOKENS, timed(one_text, repeats))


def smollm2(repeats, only):
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    ids = torch.tensor([17 + i * 7919 % 49_000 for i in range(4 * 128)])
    batch = {"input_ids": ids.view(4, 128), "labels": ids.view(4, 128)}
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        for kind, dtype in (("nf4", torch.float32), ("nf4_bf16", torch.bfloat16)):

            def model(dtype=dtype):
                return lora_model(dtype, True, folder, ("q_proj", "k_proj", "v_proj"))

            for suffix, checkpointing in (("", False), ("_checkpointing", True)):
                if (name := f"smollm2_train_{kind}{suffix}").startswith(only):
                    train(name, model(), checkpointing, [{**batch, "attention_mask": torch.ones_like(ids).view(4, 128)}], repeats)
            if (name := f"smollm2_generate_{kind}_lora").startswith(only):
                generate(name, model(), ids[None, :32], repeats)
            if (name := f"smollm2_prefill_{kind}_lora").startswith(only):
                read = model().eval()
                with torch.no_grad():
                    report(name, 512, timed(lambda read=read: read(ids[None], logits_to_keep=1), repeats))


def another(folder, repeats, only):
    ids = torch.tensor([17 + i * 7919 % 49_000 for i in range(4 * 128)]).view(4, 128)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    for kind, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        for suffix, checkpointing in (("", False), ("_checkpointing", True)):
            if (name := f"model_train_nf4_{kind}{suffix}").startswith(only):
                train(name, lora_model(dtype, True, folder), checkpointing, [batch], repeats)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--repeats", type=int, default=7)
    ap.add_argument("--only", default="", help="names that start so")
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    data = batches(tokenizer)
    f32, bf16 = torch.float32, torch.bfloat16
    runs = {
        "train_nf4_f32": (f32, True, False),
        "train_nf4_f32_checkpointing": (f32, True, True),
        "train_nf4_bf16": (bf16, True, False),
        "train_nf4_bf16_checkpointing": (bf16, True, True),
        "train_f32": (f32, False, False),
    }
    for name, (dtype, four_bit, checkpointing) in runs.items():
        if name.startswith(args.only):
            train(name, lora_model(dtype, four_bit), checkpointing, data, args.repeats)
    prompt = tokenizer("Human: 写一首七言律诗。\n题目：江上对月\n\nAssistant: ", return_tensors="pt")
    for name, four_bit in (("generate_f32_lora", False), ("generate_nf4_lora", True)):
        if name.startswith(args.only):
            generate(name, lora_model(f32, four_bit), prompt["input_ids"], args.repeats)
    smollm2(args.repeats, args.only)
    folder = os.environ.get("QLORA_MODEL")
    if folder:
        another(folder, args.repeats, args.only)
    if folder and "load_nf4".startswith(args.only):
        seconds = timed(lambda: base_model(folder, torch.float16, True), 3)
        report("load_nf4", 1, seconds, "loads_per_s")


if __name__ == "__main__":
    main()
