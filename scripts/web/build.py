"""Builds the site: python build.py OUT [DOC], DOC being what `cargo doc` wrote.

Every text comes from where it stands already: the notebooks with the outputs stored in them, which `qlora-nb test
notebooks` compares, and the READMEs by their headings. Here are only the names of pages and buttons."""

import json
import posixpath
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import nbformat

from records import library_records, page_records
from render import BrokenSource, Heading, Markdown, Notebook, Parts, Pictures, code_colours, coloured

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LANGUAGES = ["en", "zh"]
README = {"en": "README.md", "zh": "README.zh.md"}
BOOK = "notebooks/README.md"

# Where the commands of the first page stand: the first line of the first code of these sections.
START = {"en": ["From a wheel", "From a clone"], "zh": ["用 wheel", "从克隆开始"]}
# The sections of a README that are not about installing and running.
NUMBERS = {
    "en": ["What it does", "What is exact", "What it survives", "Speed on two CPU cores", "Limits today"],
    "zh": ["它做什么", "精确到什么程度", "经得起什么", "两个 CPU 核上的速度", "目前的限制"],
}
LEFT_OUT = {"en": ["Layout"], "zh": []}

WORDS = {
    "en": {
        "code": "en", "name": "English", "install": "Install and run", "book": "The notebooks", "gallery": "Gallery",
        "numbers": "What holds", "library": "Library", "glossary": "Glossary", "search": "Search",
        "contents": "On this page", "previous": "Previous", "next": "Next", "theme": "Light or dark",
        "skip": "To the text", "chapters": "Notebooks",
        "read": "Read the book", "looking": "Search needs JavaScript.", "placeholder": "Search all pages",
        "none": "Nothing found.", "found": "{} found", "first": "the first {} shown",
        "pictures": "Every picture here is drawn by the library in a cell of a notebook. Each leads to its place.",
        "main_nav": "Site", "page_nav": "Neighbours",
    },
    "zh": {
        "code": "zh-CN", "name": "中文", "install": "安装与运行", "book": "笔记", "gallery": "图集",
        "numbers": "保证什么", "library": "库文档", "glossary": "术语表", "search": "搜索", "contents": "本页内容",
        "previous": "上一页", "next": "下一页", "theme": "浅色或深色", "skip": "跳到正文", "chapters": "各篇笔记",
        "read": "读这本小书", "looking": "搜索需要 JavaScript。", "placeholder": "搜索所有页面",
        "none": "没有找到。", "found": "找到 {} 处", "first": "只显示前 {} 处",
        "pictures": "这里的每张图都是库在笔记的单元格里画的。点击图片可到它所在的地方。",
        "main_nav": "网站", "page_nav": "前后页",
    },
}


@dataclass
class Page:
    lang: str
    name: str
    title: str
    body: str
    parts: Parts = field(default_factory=Parts)
    # Page of the book, which has the list of chapters and neighbours.
    chapter: bool = False
    # Whether the other language has this page.
    twin: bool = True

    @property
    def file(self):
        return f"{self.lang}/{self.name}.html"


class Site:
    def __init__(self, out, doc):
        self.out, self.doc = out, doc
        self.pages, self.pictures, self.shown = [], Pictures(), {lang: [] for lang in LANGUAGES}
        # Files of the repository that are pages: file -> page within a language.
        self.known = {readme: "index" for readme in README.values()} | {BOOK: "book"}
        self.copied, self.only_english = {}, {}
        self.templates = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True,
            lstrip_blocks=True, undefined=jinja2.StrictUndefined)

    def link(self, source, lang):
        """A function from a target as the file `source` has it to one of the site, seen from a page of `lang`."""
        def of(target):
            if re.match(r"[a-z]+:|#", target):
                return target
            path, _, anchor = target.partition("#")
            file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
            anchor = f"#{anchor}" if anchor else ""
            if not (ROOT / file).is_file():
                raise BrokenSource(f"{source} links to {target}, which is not there")
            if file == BOOK and source.endswith(".ipynb"):
                # What a notebook looks up there is a word.
                return "glossary.html"
            if file in self.known:
                return f"{self.known[file]}.html{anchor}"
            if file.endswith(".ipynb"):
                return f"../{Path(file).parent.name}/{Path(file).stem}.html{anchor}"
            if file.endswith(".md"):
                name = re.sub(r"\W+", "-", file.removesuffix(".md").removesuffix("/README")).lower()
                self.only_english[file] = name
                return f"../en/{name}.html{anchor}"
            if file.endswith(".svg"):
                self.copied[Path(file).name] = ROOT / file
                return f"../pictures/{Path(file).name}"
            raise BrokenSource(f"{source} links to {target}, of which the site has no page")
        return of

    def markdown(self, source, lang):
        return Markdown(self.link(source, lang))

    def build(self):
        if self.out.exists():
            shutil.rmtree(self.out)
        book = Book()
        for lang in LANGUAGES:
            readme = Sections(README[lang])
            self.index(lang, readme)
            self.install(lang, readme)
            self.book(lang, book)
            self.numbers(lang, readme)
            self.gallery(lang)
            self.add(Page(lang, "search", WORDS[lang]["search"], self.part("search.html", lang)))
        self.english_pages()
        self.write()

    def add(self, page):
        self.pages.append(page)

    def part(self, template, lang, **values):
        return self.templates.get_template(template).render(words=WORDS[lang], lang=lang, **values)

    def index(self, lang, readme):
        markdown = self.markdown(readme.file, lang)
        starts = [readme.first_command(section) for section in START[lang]]
        picture = re.search(r"^!\[.*\]\(.*\)$", readme.text, re.M)
        if not picture:
            raise BrokenSource(f"{readme.file} has no picture")
        # It stands beside the rest.
        lead = markdown.render(readme.lead().replace(picture[0], ""))
        body = self.part("index.html", lang, lead=lead, picture=markdown.render(picture[0]),
            starts=[(coloured(command, "bash"), what) for command, what in starts])
        self.add(Page(lang, "index", "qlora-nb", body))

    def install(self, lang, readme):
        elsewhere = NUMBERS[lang] + LEFT_OUT[lang]
        for name in elsewhere:
            # Fails where the README has another name for it by now.
            readme.section(name)
        self.readme_page(lang, "install", readme, [name for name in readme.names if name not in elsewhere])

    def numbers(self, lang, readme):
        self.readme_page(lang, "numbers", readme, NUMBERS[lang])

    def readme_page(self, lang, name, readme, sections):
        title = WORDS[lang][name]
        markdown = self.markdown(readme.file, lang)
        body = markdown.render("\n".join([f"# {title}\n"] + [readme.section(section) for section in sections]))
        self.add(Page(lang, name, title, body, markdown.parts))

    def book(self, lang, book):
        """The list of notebooks, the notebooks in its order, the glossary."""
        contents = Page(lang, "book", WORDS[lang]["book"], "", chapter=True)
        self.add(contents)
        markdown = self.markdown(BOOK, lang)
        entries = [(self.notebook(lang, name), markdown.render(what[lang])) for name, what in book.notebooks]
        contents.body = self.part("book.html", lang, entries=entries, about=markdown.render(book.about[lang]),
            after=markdown.render(book.after[lang]))
        self.glossary(lang, book)

    def notebook(self, lang, name):
        source = f"notebooks/{lang}/{name}.ipynb"
        notebook = nbformat.read(ROOT / source, as_version=4)
        markdown = self.markdown(source, lang)
        renderer = Notebook(name, markdown, self.pictures)
        body = renderer.render(notebook)
        page = Page(lang, name, markdown.parts.headings[0].text, body, markdown.parts, chapter=True)
        self.shown[lang].append((page, renderer.shown))
        self.add(page)
        return page

    def glossary(self, lang, book):
        markdown = self.markdown(BOOK, lang)
        columns = [0, 1, 2] if lang == "en" else [1, 0, 3]
        entries = []
        for row in book.words:
            cells = [markdown.parser.renderInline(row[column]) for column in columns]
            entries.append((Parts().anchor(row[0]), cells))
        body = self.part("glossary.html", lang, about=markdown.render(book.glossary[lang]), entries=entries)
        self.add(Page(lang, "glossary", WORDS[lang]["glossary"], body, chapter=True))

    def gallery(self, lang):
        groups = [(page, shown) for page, shown in self.shown[lang] if shown]
        parts = Parts([Heading(2, page.name, page.title) for page, _ in groups])
        body = self.part("gallery.html", lang, groups=groups)
        self.add(Page(lang, "gallery", WORDS[lang]["gallery"], body, parts))

    def english_pages(self):
        """Files for readers of the source, that the READMEs link to."""
        done = set()
        while set(self.only_english) - done:
            file = min(set(self.only_english) - done)
            done.add(file)
            markdown = self.markdown(file, "en")
            body = markdown.render((ROOT / file).read_text())
            title = markdown.parts.headings[0].text
            self.add(Page("en", self.only_english[file], title, body, markdown.parts, twin=False))

    def write(self):
        library = (self.doc / "qlora_nb/index.html").exists() if self.doc else False
        for lang in LANGUAGES:
            (self.out / lang).mkdir(parents=True)
        for folder in ["assets", "pictures"]:
            (self.out / folder).mkdir()
        records = []
        for page in self.pages:
            (self.out / page.file).write_text(self.whole(page, library))
            if page.name not in ("search", "gallery"):
                records += page_records(page)
        if library:
            self.copy_library()
            records += library_records(self.out / "library")
        self.assets(records)
        (self.out / "index.html").write_text(self.templates.get_template("choose.html").render(words=WORDS))

    def copy_library(self):
        """The documentation as rustdoc wrote it, each page with a way back."""
        library = self.out / "library"
        shutil.copytree(self.doc, library, ignore=shutil.ignore_patterns(".lock"))
        # Where rustdoc's own help leads to.
        (library / "index.html").write_text(self.templates.get_template("library.html").render())
        back = self.templates.get_template("back.html")
        for file in library.rglob("*.html"):
            root = "../" * len(file.relative_to(self.out).parents[:-1])
            file.write_text(file.read_text().replace("</body>", back.render(root=root) + "</body>"))

    def whole(self, page, library):
        chapters = [other for other in self.pages if other.chapter and other.lang == page.lang]
        place = chapters.index(page) if page.chapter else None
        neighbours = [chapters[place + step] if place is not None and 0 <= place + step < len(chapters) else None
            for step in (-1, 1)]
        other = LANGUAGES[1 - LANGUAGES.index(page.lang)]
        return self.part("page.html", page.lang, page=page, chapters=chapters if page.chapter else [], other=other,
            other_words=WORDS[other], neighbours=neighbours, library=library,
            contents=[heading for heading in page.parts.headings if heading.level in (2, 3)])

    def assets(self, records):
        assets = self.out / "assets"
        colours = code_colours("xcode", "one-dark")
        (assets / "style.css").write_text((HERE / "style.css").read_text() + colours)
        for file in ["site.js", "search.js", "icon.svg"]:
            shutil.copy(HERE / file, assets / file)
        # A script and not a JSON file: pages that are opened from a disk may not fetch.
        index = json.dumps(records, ensure_ascii=False, separators=(",", ":"))
        (assets / "search-index.js").write_text(f"window.searchIndex = {index};\n")
        for svg, file in self.pictures.files.items():
            (self.out / "pictures" / file).write_text(svg)
        for file, source in self.copied.items():
            shutil.copy(source, self.out / "pictures" / file)


class Sections:
    """A Markdown file by its headings of the second level."""

    def __init__(self, file):
        self.file = file
        self.text = (ROOT / file).read_text()
        self.names, self.texts = [], []
        lines = self.text.splitlines(keepends=True)
        starts = []
        for token in Markdown(str).parser.parse(self.text):
            if token.type == "heading_open" and token.tag == "h2":
                starts.append(token.map[0])
        self.head = "".join(lines[: starts[0]])
        for start, end in zip(starts, starts[1:] + [len(lines)]):
            self.names.append(lines[start].removeprefix("## ").strip())
            self.texts.append("".join(lines[start:end]))

    def section(self, name):
        if name not in self.names:
            raise BrokenSource(f'{self.file} has no section "{name}", which scripts/web/build.py names; it has '
                f"{self.names}")
        return self.texts[self.names.index(name)]

    def lead(self):
        """What stands before the first section, without title and without the link to the other language."""
        text = self.head.split("\n", 1)[1]
        return re.sub(r" *\[[^\]]*\]\(README[^)]*\)", "", text)

    def first_command(self, name):
        """The first line of the section's first code: a command and, as its comment, what it does."""
        line = re.search(r"^    (\S.*)$", self.section(name), re.M)
        if not line or " # " not in line[1]:
            raise BrokenSource(f'{self.file}: the code in "{name}" does not begin with a command and its comment')
        command, what = line[1].split(" # ", 1)
        return command.strip(), what.strip()


class Book:
    """The README of the notebooks, which has both languages in one: a paragraph for each, or one with " · " between."""

    def __init__(self):
        head, _, glossary = (ROOT / BOOK).read_text().partition("\n## ")
        paragraphs = [head.split("\n\n"), glossary.split("\n\n")]
        try:
            _, english, chinese, notebooks, after = paragraphs[0]
            _, about_words, words = paragraphs[1]
        except ValueError:
            raise BrokenSource(f"{BOOK}: expected a title, a paragraph in English, one in Chinese, a table and a "
                "paragraph; then the glossary's title, paragraph and table") from None
        self.about = {"en": english, "zh": chinese}
        self.after, self.glossary = both(after), both(about_words)
        self.notebooks = [(row[0].strip("`"), {"en": row[2], "zh": row[3]}) for row in rows(notebooks)]
        self.words = rows(words)


def both(paragraph):
    texts = re.split(r"\s·\s", paragraph)
    if len(texts) != 2:
        raise BrokenSource(f'{BOOK}: expected English and Chinese with " · " between, got "{paragraph}"')
    return dict(zip(LANGUAGES, texts))


def rows(table):
    """The cells of a Markdown table of four columns, without its head."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    if not cells or any(len(row) != 4 for row in cells):
        raise BrokenSource(f"{BOOK}: expected a table of four columns, got\n{table[:200]}")
    return cells


if __name__ == "__main__":
    arguments = [Path(argument) for argument in sys.argv[1:]]
    try:
        Site(arguments[0], arguments[1] if len(arguments) > 1 else None).build()
    except BrokenSource as error:
        sys.exit(f"scripts/site: {error}")
