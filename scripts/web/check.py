"""Checks a built site: python check.py OUT. What it holds:

- every link within the site leads to a file and, where it names one, to an anchor there, those of the search too;
- nothing of another host is loaded; links of the text to other hosts are listed, and not asked for;
- the pages are well formed, without an id twice, and each picture has its text;
- a notebook's page shows what is stored in the notebook."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[2]
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
# What a browser fetches by itself, and not when somebody clicks.
LOADED = {("link", "href"), ("script", "src"), ("img", "src"), ("source", "src"), ("iframe", "src"), ("object", "data"),
    ("form", "action"), ("image", "href"), ("use", "href"), ("image", "xlink:href"), ("use", "xlink:href")}
ANSI = re.compile(r"\x1b\[[0-9;]*m")


class PageFacts(HTMLParser):
    def __init__(self):
        super().__init__()
        self.ids, self.twice, self.links, self.loads, self.faults = set(), [], [], [], []
        # On a page of rustdoc: whether what follows is text of other crates, whose relative links are of their pages.
        self.foreign = False
        # Elements that are not closed yet; the texts and pictures of the outputs, in order.
        self.open, self.outputs, self.output_depth = [], [], None

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        facts = dict(attributes)
        if len(names) != len(facts):
            self.faults.append(f"<{tag}> at line {self.getpos()[0]} has an attribute twice")
        if "id" in facts:
            if facts["id"] in self.ids:
                self.twice.append(facts["id"])
            self.ids.add(facts["id"])
            self.foreign |= facts["id"] in ("trait-implementations", "blanket-implementations")
        for name, value in attributes:
            if (tag, name) in LOADED and not (tag == "link" and facts.get("rel") in ("alternate", "canonical")):
                self.loads.append(value)
            elif name == "href" and not (self.foreign and not value.startswith("#")):
                self.links.append(value)
            if name == "style":
                self.loads += css_addresses(value)
        if tag == "img" and "alt" not in facts:
            self.faults.append(f"<img> at line {self.getpos()[0]} has no alt")
        if tag not in VOID:
            self.open.append(tag)
        self.begin_output(tag, facts)

    def begin_output(self, tag, facts):
        if "output" in (facts.get("class") or "").split():
            self.output_depth = len(self.open)
            self.outputs.append("")
        elif self.output_depth and tag == "img":
            self.outputs[-1] += facts["src"]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if self.output_depth == len(self.open):
            self.output_depth = None
        if not self.open or self.open[-1] != tag:
            inside = self.open[-1] if self.open else "nothing"
            self.faults.append(f"</{tag}> at line {self.getpos()[0]} within <{inside}>")
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data):
        if self.output_depth:
            self.outputs[-1] += data


def css_addresses(css):
    found = re.findall(r"url\(\s*[\"']?([^\"')]+)|@import\s+[\"']([^\"']+)", css)
    return [address for pair in found for address in pair if address and not address.startswith("data:")]


class Check:
    def __init__(self, out):
        self.out = out.resolve()
        self.faults, self.outside = [], {}
        self.pages = {}
        for file in sorted(self.out.rglob("*.html")):
            facts = PageFacts()
            facts.feed(file.read_text())
            facts.close()
            self.pages[file] = facts

    def run(self):
        links = 0
        for file, facts in self.pages.items():
            for address in facts.links:
                self.link(file, address)
            for address in facts.loads:
                self.load(file, address)
            links += len(facts.links) + len(facts.loads)
            if not self.of_rustdoc(file):
                self.well_formed(file, facts)
        for file in [*self.out.rglob("*.css"), *self.out.rglob("*.svg")]:
            links += self.styles(file)
        links += self.search()
        outputs = sum(self.notebook(source) for source in sorted(ROOT.glob("notebooks/*/*.ipynb")))
        return links, outputs

    def of_rustdoc(self, file):
        return file.is_relative_to(self.out / "library")

    def fault(self, file, what):
        self.faults.append(f"{file.relative_to(self.out)}: {what}")

    def well_formed(self, file, facts):
        for what in facts.faults + [f"<{tag}> is not closed" for tag in facts.open]:
            self.fault(file, what)
        for name in facts.twice:
            self.fault(file, f'the id "{name}" is there twice')

    def link(self, file, address):
        parts = urlsplit(address)
        if parts.scheme in ("http", "https", "mailto"):
            self.outside.setdefault(address.split("#")[0], set()).add(file)
        elif parts.scheme != "javascript":
            self.inside(file, address, parts)

    def load(self, file, address):
        parts = urlsplit(address)
        if self.of_rustdoc(file) and "trait.impl/" in parts.path:
            # A script of a trait's implementors in other crates, which rustdoc names where there are none too.
            return
        if parts.scheme or parts.netloc:
            self.fault(file, f"loads {address}, which is not of the site")
        else:
            self.inside(file, address, parts)

    def inside(self, file, address, parts):
        target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
        if target.is_dir():
            target = target / "index.html"
        if not target.is_relative_to(self.out) or not target.is_file():
            self.fault(file, f"{address} leads to no file")
        elif parts.fragment and target in self.pages:
            for anchor in anchors(parts.fragment, self.of_rustdoc(target)):
                # A browser looks for the anchor as it is written, and then for what its escapes mean.
                if not {anchor, unquote(anchor)} & self.pages[target].ids:
                    self.fault(file, f"{address}: no such anchor there")

    def styles(self, file):
        text = file.read_text()
        addresses = css_addresses(text) + re.findall(r'href="([^"]+)"', text)
        for address in addresses:
            if not address.startswith("#"):
                self.load(file, address)
        return len(addresses)

    def search(self):
        script = self.out / "assets/search-index.js"
        records = json.loads(script.read_text().removeprefix("window.searchIndex = ").removesuffix(";\n"))
        for record in records:
            self.link(self.out / "index.html", record[1])
        return len(records)

    def notebook(self, source):
        """Compares the stored outputs with those of the page; gives how many they are."""
        page = self.out / source.parent.name / f"{source.stem}.html"
        if page not in self.pages:
            self.fault(page, f"there is no page for {source.relative_to(ROOT)}")
            return 0
        cells = json.loads(source.read_text())["cells"]
        stored = [output for cell in cells for output in cell.get("outputs", [])]
        shown = self.pages[page].outputs
        if len(stored) != len(shown):
            self.fault(page, f"shows {len(shown)} outputs, and {len(stored)} are stored")
        for i, (output, text) in enumerate(zip(stored, shown)):
            expected = as_text(output)
            got = (page.parent / text).read_text() if expected.startswith("<svg") and text.endswith(".svg") else text
            if got != expected:
                self.fault(page, f"output {i + 1} is not what is stored: {expected[:200]!r} is, {got[:200]!r} is shown")
        return len(stored)


def anchors(fragment, rustdoc):
    """Rustdoc marks a range of lines, #3-7, by its script."""
    lines = re.fullmatch(r"(\d+)-(\d+)", fragment)
    return lines.groups() if rustdoc and lines else [fragment]


def as_text(output):
    """What somebody sees of a stored output: its text, or a picture's source."""
    if output["output_type"] == "stream":
        return ANSI.sub("", "".join(output["text"]))
    if output["output_type"] == "error":
        return ANSI.sub("", "\n".join(output["traceback"]))
    data = {kind: "".join(text) for kind, text in output["data"].items()}
    if "text/html" in data:
        facts = PageFacts()
        facts.feed(f'<div class="output">{data["text/html"]}</div>')
        return facts.outputs[0]
    return data.get("image/svg+xml") or ANSI.sub("", data["text/plain"])


if __name__ == "__main__":
    check = Check(Path(sys.argv[1]))
    links, outputs = check.run()
    for fault in check.faults:
        print(fault, file=sys.stderr)
    ours = [address for address, files in check.outside.items() if not all(map(check.of_rustdoc, files))]
    for address in sorted(ours):
        print(f"leads outside, not asked for: {address}")
    print(f"{len(check.pages)} pages, {links} links and loads, {outputs} outputs as stored, "
        f"{len(check.faults)} faults; rustdoc leads outside to {len(check.outside) - len(ours)} addresses")
    sys.exit(1 if check.faults else 0)
