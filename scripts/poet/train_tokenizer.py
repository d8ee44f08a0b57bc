"""poems.jsonl.gz -> a byte-level BPE of 6144 tokens in which no token spans two Chinese characters.

    python train_tokenizer.py poems.jsonl.gz model

One token a character (two or three for a rare one) keeps the form easy to learn: a line of five characters
is five tokens and a mark.
"""

import json
import sys

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from poems import read_jsonl

SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def main(poems, out):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\u2e80-\uffef]"), "isolated"),  # a character is a piece of its own
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    texts = (
        "\n".join([f"《{p['title']}》（{p['form']}）：、", p["author"], *p["lines"]])
        for p in read_jsonl(poems)
        if p["split"] == "train"
    )
    trainer = trainers.BpeTrainer(
        vocab_size=6144,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        **SPECIAL,
    )
    fast.save_pretrained(out)
    # transformers 5 names a class that transformers 4 lacks and no longer writes the special tokens' own file;
    # with these two edits both read the folder alike.
    path = f"{out}/tokenizer_config.json"
    with open(path) as f:
        config = json.load(f)
    config.pop("backend", None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for path, content in [(path, config), (f"{out}/special_tokens_map.json", SPECIAL)]:
        with open(path, "w") as f:
            json.dump(content, f, indent=2, ensure_ascii=False)
            f.write("\n")
    print(len(fast), "tokens")


if __name__ == "__main__":
    main(*sys.argv[1:])
