"""poems.jsonl.gz + base model -> the instruction rows and held-out titles that the notebooks use.

    python make_instructions.py poems.jsonl.gz model ../../notebooks/data

Writes `poems_zh/` (Hugging Face `save_to_disk`: instruction, input, output) and `heldout_titles.jsonl`
(instruction, input, form, title). Nobody else's text is in them: the titles are put together from the word
lists below, and the poems are what the base model wrote under its own header, kept when the form is right.
A poem that repeats two lines running of any poem in the corpus is thrown away and written anew.
"""

import random
import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from poems import FORMS, header, in_form, read_jsonl, sample, write_jsonl

ASKS = [("以《{title}》为题，写一首{form}。", ""), ("请写一首题为《{title}》的{form}。", ""), ("写一首{form}。", "题目：{title}")]
TRAIN_PER_FORM, HELD_OUT_PER_FORM = 150, 15

TIMES = "早春 春日 春夜 暮春 初夏 夏日 夏夜 新秋 秋日 秋夜 深秋 初冬 冬日 冬夜 雪后 雨后 清晨 晚晴 月夜 重阳".split()
PLACES = "江上 湖上 溪上 山中 山寺 村居 城东 城南 园中 池上 江楼 舟中 渡口 竹林 松下 草堂 驿亭 海边 桥头 田家".split()
DEEDS = "偶成 即事 有怀 独坐 远望 闻笛 听雨 对酒 送客 怀友 读书 垂钓 采莲 赏花 看雪 煮茶 步月 夜泊 早行 思乡".split()
THINGS = "梅 菊 柳 竹 松 荷 雁 鹤 蝉 燕 月 雪".split()


def titles():
    pairs = [(TIMES, PLACES), (TIMES, DEEDS), (PLACES, DEEDS)]
    made = [a + b for first, second in pairs for a in first for b in second]
    made += [how + thing for how in ("咏", "题画", "寻", "对") for thing in THINGS]
    return made


def requests():
    """(training requests, held-out requests); no title occurs twice."""
    pool = titles()
    random.shuffle(pool)
    train, held_out = [], []
    for form in FORMS:
        for rows, n in ((train, TRAIN_PER_FORM), (held_out, HELD_OUT_PER_FORM)):
            for _ in range(n):
                title = pool.pop()
                instruction, extra = (text.format(title=title, form=form) for text in random.choice(ASKS))
                rows.append({"instruction": instruction, "input": extra, "form": form, "title": title})
    random.shuffle(train)
    return train, held_out


def bare(line):
    return line.strip()[:-1]


def main(corpus, model_path, out):
    random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(2)
    known_lines, known_pairs = set(), set()
    for poem in read_jsonl(corpus):
        lines = list(map(bare, poem["lines"]))
        known_lines.update(lines)
        known_pairs.update(zip(lines, lines[1:]))
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)

    train, held_out = requests()
    todo, tries, wrong_form, copied = train, 0, 0, 0
    while todo:
        tries += len(todo)
        again = []
        texts = sample(model, tokenizer, [header(r["title"], r["form"]) for r in todo], max_new_tokens=100)
        for row, (text, ended) in zip(todo, texts):
            lines = list(map(bare, text.split("\n")))
            if not (ended and in_form(text, row["form"])):
                wrong_form += 1
            elif not known_pairs.isdisjoint(zip(lines, lines[1:])):
                copied += 1
            else:
                row["output"] = text.strip()
                continue
            again.append(row)
        todo = again
    known = sum(bare(line) in known_lines for r in train for line in r["output"].split("\n"))
    lines = sum(len(r["output"].split("\n")) for r in train)
    shared = sum(any(c in r["output"] for c in r["title"]) for r in train)
    print(f"{len(train)} rows in {tries} tries; {wrong_form} out of form, {copied} with two lines of one poem")
    print(f"{known} of {lines} lines occur singly in the corpus; {shared} poems use a character of their title")

    columns = ("instruction", "input", "output")
    Dataset.from_dict({c: [r[c] for r in train] for c in columns}).save_to_disk(f"{out}/poems_zh")
    write_jsonl(f"{out}/heldout_titles.jsonl", held_out)


if __name__ == "__main__":
    main(*sys.argv[1:])
