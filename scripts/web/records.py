"""What the search knows: a record for each section of each page, and one for each page of the library."""

import re
from html import unescape
from html.parser import HTMLParser

# Elements whose ends are spaces between words.
BLOCKS = {"p", "li", "td", "th", "tr", "pre", "div", "h1", "h2", "h3", "figcaption", "summary", "title", "text"}
# Beneath these a page of the library has what every type has.
EVERY_TYPE = re.compile(r'id="(trait|synthetic|blanket)-implementations"')


class SectionTexts(HTMLParser):
    """Splits a page's body at its headings, and at whatever else has an id."""

    def __init__(self, title):
        super().__init__()
        self.sections = [["", title, []]]
        # The element whose text is left out, and how deep in it we are.
        self.hidden, self.depth, self.heading = None, 0, False

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if self.hidden:
            self.depth += tag == self.hidden
        elif tag == "math" or "anchor" in attributes.get("class", "").split():
            self.hidden, self.depth = tag, 1
        elif "id" in attributes:
            self.sections.append([attributes["id"], "", []])
            self.heading = tag
        if tag == "img":
            self.sections[-1][2].append(attributes.get("alt", "") + " ")

    def handle_endtag(self, tag):
        if self.hidden:
            self.depth -= tag == self.hidden
            self.hidden = self.hidden if self.depth else None
        elif tag == self.heading:
            self.heading = False
        if tag in BLOCKS:
            self.sections[-1][2].append(" ")

    def handle_data(self, data):
        if self.hidden:
            return
        if self.heading and self.heading != "tr":
            self.sections[-1][1] += data
        else:
            self.sections[-1][2].append(data)


def page_records(page):
    parser = SectionTexts(page.title)
    parser.feed(page.body)
    records = []
    for anchor, title, texts in parser.sections:
        text = re.sub(r"\s+", " ", "".join(texts)).strip()
        if text:
            records.append([page.lang, f"{page.file}#{anchor}".rstrip("#"), page.title, title.strip(), text])
    return records


def library_records(folder):
    records = []
    for file in sorted((folder / "qlora_nb").rglob("*.html")):
        html = file.read_text()
        title = re.search(r"<title>(.*?)( - Rust)?</title>", html)
        description = re.search(r'<meta name="description" content="(.*?)">', html, re.S)
        if not title or not description or "List of all items" in title[1]:
            continue
        own = EVERY_TYPE.split(html)[0]
        names = dict.fromkeys(re.findall(r'id="(?:ty)?(?:method|structfield|variant)\.(\w+)"', own))
        text = " ".join([unescape(description[1]), *names])
        records.append(["library", f"{folder.name}/{file.relative_to(folder)}", unescape(title[1]), "", text])
    return records
