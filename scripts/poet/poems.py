"""What the poet scripts share: the four forms, the prompt, the check of a poem's form, sampling."""

import gzip
import json
import re

# name -> (characters a line, lines)
FORMS = {"五言绝句": (5, 4), "七言绝句": (7, 4), "五言律诗": (5, 8), "七言律诗": (7, 8)}
HAN = r"\u3400-\u9fff"


def prompt(row):
    """The walkthrough's instruction prompt; notebooks build the same string."""
    return f"Human: {row['instruction']}\n{row['input']}".strip() + "\n\nAssistant: "


def header(title, form):
    """The base model's own way to announce a poem (one of the four it was trained on)."""
    return f"<s>{form}\n《{title}》\n\n"


def in_form(text, form):
    """True if `text` has the form's number of lines, and each line its number of characters and a mark."""
    width, count = FORMS[form]
    line = re.compile(f"[{HAN}]{{{width}}}[，。？！；]")
    lines = text.strip().split("\n")
    return len(lines) == count and all(line.fullmatch(x) for x in lines)


def read_jsonl(path):
    with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def write_jsonl(path, rows):
    with (gzip.open if str(path).endswith(".gz") else open)(path, "wt", encoding="utf-8") as f:
        for row in rows:
            f.write(json.dumps(row, ensure_ascii=False) + "\n")


def sample(model, tokenizer, prompts, max_new_tokens=120, **how):
    """One sampled continuation a prompt, as (text, did the end token come in time)."""
    import torch

    how = dict(do_sample=True, temperature=0.8, top_p=0.9, top_k=0) | how
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False).to(model.device)
    with torch.no_grad():
        out = model.eval().generate(
            **batch, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **how
        )
    result = []
    for ids in out[:, batch["input_ids"].shape[1]:].tolist():
        ended = tokenizer.eos_token_id in ids
        if ended:
            ids = ids[: ids.index(tokenizer.eos_token_id)]
        result.append((tokenizer.decode(ids, skip_special_tokens=True), ended))
    return result
