"""npm package chinese-poetry -> poems.jsonl.gz, one poem a row: title, author, form, lines, split.

    npm pack chinese-poetry@2.0.1 && tar xzf chinese-poetry-2.0.1.tgz    # makes ./package
    python prepare_data.py package poems.jsonl.gz

Kept: Tang and Song poems whose lines all have 5 or all have 7 characters (4 or 8 lines: the four forms that
the model learns; 6, 10 or 12 lines: "古诗"), and short song lyrics ("词") for variety. Dropped: poems with
lacunae, editors' notes or digits, long titles, and the second copy of a poem that two sources print.
"""

import collections
import glob
import hashlib
import json
import re
import sys

from opencc import OpenCC

from poems import FORMS, HAN, write_jsonl

FORM_OF_SHAPE = {shape: name for name, shape in FORMS.items()} | dict.fromkeys(
    [(5, 6), (5, 10), (5, 12), (7, 6)], "古诗"
)
# Variants that OpenCC's character table passes through: the frequent ones, old form then new form.
VARIANTS = dict(
    """
    隠隐 疎疏 簷檐 祇只 鴈雁 遶绕 鬰郁 髪发 頼赖 浄净 徧遍 慙惭 鶑莺 谿溪 粧妆 劒剑 鬭斗 媿愧 蘂蕊 臯皋 僊仙 猨猿 髙高 鬬斗
    珮佩 馿驴 櫂棹 煖暖 嬾懒 賸剩 覩睹 牋笺 歛敛 槃盘 妬妒 隣邻 餠饼 罇樽 閙闹 隄堤 懽欢 寛宽 彊强 椀碗 懃勤 鉏锄 慇殷 筯箸
    幷并 鳯凤 峩峨 畧略 燄焰 遯遁 穉稚 踈疏 飖摇 犂犁 鏁锁 飜翻 廻回 麤粗 欵款 邉边 羮羹 磵涧 栢柏 槩概 秔粳 嚬颦 櫺棂 歳岁
    逈迥 揺摇 竝并 暎映 驩欢 幙幕 顇悴 旛幡 緜绵 顦憔 桮杯 壻婿 醆盏 纒缠 薫薰 輙辄 讐仇 擡抬 朶朵 牓榜 毎每 碁棋 蠧蠹 蔕蒂
    """.split()
)


class Simplifier:
    """Traditional to simplified, one character at a time, so that a line keeps its length."""

    def __init__(self):
        self.convert = OpenCC("t2s").convert
        self.table = {}

    def __call__(self, text):
        new = sorted(set(text) - self.table.keys())
        if new:
            self.table.update(zip(new, self.convert("\n".join(VARIANTS.get(c, c) for c in new)).split("\n")))
        # 乾坤 is the one common word in which 乾 must stay.
        return "".join(map(self.table.get, text)).replace("干坤", "乾坤")


def short_title(title):
    """The title's first words: no notes in brackets, no number in a series."""
    title = re.sub(r"[（(].*?[)）]", "", title).replace("・", "·").strip()
    title = re.split(r"[ ·，、]|其[一二三四五六七八九十]+$", title)[0]
    return re.sub(r"[一二三四五六七八九十百]+[首章绝]$", "", title)


def lines_of(poem):
    return re.findall("[^，。？！；]+[，。？！；]", "".join(poem["paragraphs"]))


def form_of_poem(lines):
    widths = {len(line) - 1 for line in lines}
    return FORM_OF_SHAPE.get((widths.pop(), len(lines))) if len(widths) == 1 else None


def form_of_lyric(lines):
    return "词" if len(lines) > 4 and sum(map(len, lines)) <= 64 else None


def poems(files, form_of, simplify):
    han = re.compile(f"[{HAN}]+")
    for path in sorted(files):
        with open(path, encoding="utf-8") as f:
            text = f.read()
        for poem in json.loads(simplify(text.replace("\n", " "))):
            title = short_title(poem.get("title") or poem.get("rhythmic") or "")
            author = poem.get("author", "").strip()
            lines = lines_of(poem)
            clean = all(han.fullmatch(x) for x in [title, author] + [line[:-1] for line in lines])
            form = form_of(lines)
            if clean and form and len(title) <= 20 and len(author) <= 6:
                yield {"title": title, "author": author, "form": form, "lines": lines}


def main(package, out):
    simplify = Simplifier()
    sources = [("quantangshi/poet.*.json", form_of_poem), ("songci/ci.song.*.json", form_of_lyric)]
    seen, rows = set(), []
    for pattern, form_of in sources:
        for poem in poems(glob.glob(f"{package}/dist/{pattern}"), form_of, simplify):
            text = "".join(line[:-1] for line in poem["lines"])
            if text[:14] in seen:
                continue
            seen.add(text[:14])
            held_out = int(hashlib.md5(text.encode()).hexdigest(), 16) % 100 == 0
            rows.append(poem | {"split": "heldout" if held_out else "train"})
    write_jsonl(out, rows)
    for (form, split), n in sorted(collections.Counter((r["form"], r["split"]) for r in rows).items()):
        print(form, split, n)
    print(len(rows), "poems")


if __name__ == "__main__":
    main(*sys.argv[1:])
