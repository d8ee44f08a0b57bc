"""Markdown and notebooks to HTML. markdown-it, Pygments, latex2mathml and nbconvert do it beforehand, so that a page
needs no script to show mathematics or colours."""

import re
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.dollarmath import dollarmath_plugin
from nbconvert.exporters import TemplateExporter
from nbconvert.filters import ansi2html
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.styles import get_style_by_name
from pygments.token import STANDARD_TYPES

# Chinese characters and punctuation, between which the end of a source line is not a space.
CHINESE = re.compile(r"[\u2e80-\u303f\u3400-\u9fff\uff00-\uffef]")


class BrokenSource(Exception):
    """A source says something of which no page can be made."""


@dataclass
class Heading:
    level: int
    anchor: str
    text: str


@dataclass
class Parts:
    """What the renderer has met on one page: its headings, in order."""

    headings: list[Heading] = field(default_factory=list)

    def anchor(self, text):
        """GitHub's anchor for a heading; the second of a name on a page is NAME-1."""
        name = re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-") or "section"
        taken = {heading.anchor for heading in self.headings}
        names = [name] + [f"{name}-{i}" for i in range(1, len(taken) + 1)]
        return next(candidate for candidate in names if candidate not in taken)


def coloured(code, language):
    """Code as spans of Pygments' classes, for which `code_colours` has the colours."""
    return highlight(code, get_lexer_by_name(language), HtmlFormatter(nowrap=True)).rstrip("\n")


def code_colours(light, dark):
    """A CSS rule for each class of Pygments, with a colour for light pages and one for dark ones."""
    styles = [get_style_by_name(light), get_style_by_name(dark)]
    rules = []
    for token, name in STANDARD_TYPES.items():
        colours = [style.style_for_token(token)["color"] for style in styles]
        if name and any(colours):
            pair = ", ".join(f"#{colour}" if colour else "currentColor" for colour in colours)
            rules.append(f"pre .{name} {{ color: light-dark({pair}); }}")
    return "\n".join(rules) + "\n"


def mathematics(text, options):
    display = "block" if options["display_mode"] else "inline"
    return convert(text.strip(), display=display)


class Markdown:
    """Renders the Markdown of one page. `link` turns a target as the source has it into one of the site."""

    def __init__(self, link):
        self.link = link
        self.parts = Parts()
        self.parser = MarkdownIt("commonmark", {"highlight": self.code}).enable("table")
        self.parser.use(dollarmath_plugin, renderer=mathematics, allow_labels=False, double_inline=False)
        self.parser.add_render_rule("code_block", self.commands)
        for name, tag in [("table_open", "<div class=\"table\"><table>"), ("table_close", "</table></div>\n")]:
            self.parser.add_render_rule(name, lambda *_, tag=tag: tag)

    def render(self, text):
        tokens = self.parser.parse(text)
        for i, token in enumerate(tokens):
            if token.type == "heading_open":
                self.give_anchor(token, tokens[i + 1])
            if token.type == "inline":
                self.inline(token.children)
        return self.parser.renderer.render(tokens, self.parser.options, {})

    def give_anchor(self, opening, inline):
        text = plain(inline)
        heading = Heading(int(opening.tag[1]), self.parts.anchor(text), text)
        self.parts.headings.append(heading)
        opening.attrSet("id", heading.anchor)
        if heading.level > 1:
            link = f'<a class="anchor" href="#{heading.anchor}" aria-label="{escape(text)}">#</a>'
            inline.children.append(Token("html_inline", "", 0, content=link))

    def inline(self, children):
        for i, child in enumerate(children):
            if child.type == "link_open":
                child.attrSet("href", self.link(child.attrGet("href")))
            if child.type == "image":
                child.attrSet("src", self.link(child.attrGet("src")))
                child.attrSet("class", "chart")
            if child.type == "softbreak" and between_chinese(children, i):
                child.type, child.content = "text", ""

    def code(self, code, language, _attributes):
        return coloured(code, language) if language else escape(code)

    def commands(self, tokens, i, _options, _env):
        """Indented code: in these sources, commands for a shell."""
        return f"<pre><code>{coloured(tokens[i].content, 'bash')}</code></pre>\n"


def plain(inline):
    return "".join(child.content for child in inline.children if child.type in ("text", "code_inline", "math_inline"))


def between_chinese(children, i):
    before = next((child.content for child in reversed(children[:i]) if child.content), "")
    after = next((child.content for child in children[i + 1:] if child.content), "")
    return bool(CHINESE.match(before[-1:]) and CHINESE.match(after[:1]))


class Pictures:
    """The pictures of the notebooks, a file each: where two languages show the same, they show the same file."""

    def __init__(self):
        self.files = {}

    def add(self, svg, name):
        if svg not in self.files:
            taken = set(self.files.values())
            free = (f"{name}{suffix}.svg" for suffix in ["", "-zh"])
            self.files[svg] = next(file for file in free if file not in taken)
        return self.files[svg]


def svg_title(svg):
    """What the library wrote for those who do not see the picture."""
    title = re.search(r"<title>(.*?)</title>", svg, re.S)
    if not title:
        raise BrokenSource("a stored picture has no <title>, which is its alternative text")
    return title[1]


def svg_size(svg):
    size = re.match(r'<svg[^>]*? width="(\d+)" height="(\d+)"', svg)
    return f' width="{size[1]}" height="{size[2]}"' if size else ""


class Notebook:
    """Renders one notebook with its stored outputs, in nbconvert's order of preference."""

    def __init__(self, name, markdown, pictures):
        self.name, self.markdown, self.pictures = name, markdown, pictures
        # Of each picture: its file, its title, and the heading it stands under.
        self.shown = []
        self.exporter = TemplateExporter(
            template_name="base", template_file=str(Path(__file__).parent / "notebook.html.j2"))
        for name, filter in [("markdown", markdown.render), ("rust", lambda code: coloured(code, "rust")),
                ("picture", self.picture), ("ansi", ansi2html)]:
            self.exporter.register_filter(name, filter)

    def render(self, notebook):
        return self.exporter.from_notebook_node(notebook)[0]

    def picture(self, svg):
        file = self.pictures.add(svg, f"{self.name}-{len(self.shown) + 1}")
        title = svg_title(svg)
        self.shown.append((file, title, svg_size(svg), self.markdown.parts.headings[-1]))
        return f'<img class="chart" src="../pictures/{file}" alt="{title}"{svg_size(svg)} loading="lazy">'
