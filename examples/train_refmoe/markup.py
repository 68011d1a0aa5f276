"""Plain text out of HTML pages and manual pages, good enough to train a language model on."""

from __future__ import annotations

import re
from html.parser import HTMLParser

BLOCKS = frozenset(
    ("p", "div", "li", "tr", "h1", "h2", "h3", "h4", "dt", "dd", "pre", "blockquote", "br", "table", "ul")
)
SILENT = frozenset(("script", "style", "head"))

GLYPHS = {"aq": "'", "dq": '"', "bu": "*", "em": "—", "en": "–", "co": "(c)", "lq": '"', "rq": '"'}
ESCAPES = {r"\-": "-", r"\e": "\\", r"\ ": " ", r"\~": " "}
TEXT_MACROS = re.compile(r"[.'] *(SH|SS|B|I|BR|BI|IR|RB|RI|IB|TP|PP|P|IP|SM)\b ?(.*)")
NEW_PARAGRAPH = frozenset(("SH", "SS", "PP", "P", "TP", "IP"))


def html_to_text(page: str) -> str:
    """The text of an HTML page, a line for each block, white space kept in `pre` only; navigation is left out."""
    collector = _TextCollector()
    collector.feed(page)
    return re.sub(r"\n[ \t]*(\n[ \t]*)+", "\n\n", "".join(collector.pieces)).strip() + "\n"


class _TextCollector(HTMLParser):
    """Gathers text; `silent` holds the open elements that nothing is taken from, `preformatted` counts open `pre`."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self.silent: list[str] = []
        self.preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        navigation = tag == "ul" and "docnav" in (dict(attrs).get("class") or "")
        if tag in SILENT or navigation or (tag == "ul" and "ul" in self.silent):
            self.silent.append(tag)
        self.preformatted += tag == "pre"
        if tag in BLOCKS:
            self.pieces.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if self.silent and tag == self.silent[-1]:
            self.silent.pop()
        self.preformatted -= tag == "pre"
        if tag in BLOCKS:
            self.pieces.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.pieces.append(data if self.preformatted > 0 else re.sub(r"\s+", " ", data))


def manpage_to_text(page: str) -> str:
    """The text of a manual page: of its requests, only the arguments of the usual man macros are kept."""
    lines = []
    for line in re.sub(r"(?ms)^\.de\w* .*?^\.\.$", "", page).split("\n"):
        if macro := TEXT_MACROS.match(line):
            line = ("\n" if macro[1] in NEW_PARAGRAPH else "") + macro[2].replace('"', "")
        elif line.startswith((".", "'")):
            continue
        lines.append(_unescape(line))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def _unescape(line: str) -> str:
    line = re.sub(r"\\f(?:[BIRP]|\(..|\[\w*\])|\\s[-+]?\d|\\[&|^/,]|\\c$", "", line)  # fonts, sizes, zero-width marks
    line = re.sub(r"\\\((..)", lambda glyph: GLYPHS.get(glyph[1], ""), line)
    return re.sub(r"\\[-e ~]", lambda escape: ESCAPES[escape[0]], line)
