"""Python's side of the interchange test: an adapter folder that qlora-nb saved, read by PEFT.

    python peft_reads_ours.py BASE ADAPTER [--ids '[[5, 6, 7]]'] [--mask '[[1, 1, 1]]'] [--merge] [--out logits.json]

Loads BASE (e.g. tests/fixtures/bloom_tiny) with transformers in f32, ADAPTER with PEFT, and writes {"input_ids",
"attention_mask", "logits": [B][T][vocab], "modules": wrapped, "config"} as JSON, to stdout unless --out. Exits with 1,
and says which, if a tensor of the adapter's file found no place in the model or a place found no tensor: PEFT itself
only warns. Exits with 77 if torch or PEFT is not installed, which the calling test reports as skipped.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
IDS = [[5, 17, 93, 40, 8, 131, 77, 2, 64, 12], [9, 150, 33, 33, 21, 7, 108, 55, 4, 86]]


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("base")
    ap.add_argument("adapter")
    ap.add_argument("--ids", type=json.loads, default=IDS)
    ap.add_argument("--mask", type=json.loads)
    ap.add_argument("--merge", action="store_true", help="logits after merge_and_unload()")
    ap.add_argument("--out")
    args = ap.parse_args()
    try:
        import torch
        from peft import PeftModel
        from safetensors import safe_open
        from transformers import AutoModelForCausalLM
    except ImportError as missing:
        print(f"skipped: {missing}", file=sys.stderr)
        sys.exit(77)

    torch.set_num_threads(1)
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, args.adapter).eval()
    with safe_open(Path(args.adapter) / "adapter_model.safetensors", "pt") as f:
        stored = {key: f.get_tensor(key).float() for key in f.keys()}
    live = {n.replace(".default.", "."): p for n, p in model.named_parameters() if "lora_" in n}
    stray, lacking = stored.keys() - live.keys(), live.keys() - stored.keys()
    for what, keys in (("no place in the model", stray), ("no tensor", lacking)):
        if keys:
            sys.exit(f"{args.adapter}: {what} for {sorted(keys)[:4]} ({len(keys)} in all)")
    changed = [key for key, value in stored.items() if not torch.equal(value, live[key].float())]
    if changed:
        sys.exit(f"{args.adapter}: not loaded as stored: {changed[:4]}")

    ids = torch.tensor(args.ids)
    mask = torch.tensor(args.mask) if args.mask else torch.ones_like(ids)
    config = model.peft_config["default"].to_dict()
    if args.merge:
        model = model.merge_and_unload()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    result = {
        "input_ids": ids.tolist(),
        "attention_mask": mask.tolist(),
        "logits": logits.tolist(),
        "modules": len(live) // 2,
        "config": {key: config[key] for key in ("r", "lora_alpha", "use_rslora")},
    }
    text = json.dumps(result)
    if args.out:
        Path(args.out).write_text(text + "\n", encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
