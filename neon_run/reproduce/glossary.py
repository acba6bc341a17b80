"""The glossary: the one source of docs/glossary.md and of the definitions at the end of every page.

`python -m neon_run.reproduce.glossary > docs/glossary.md` after a change of glossary.json; a test compares them.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup, escape

TITLE = "# Glossary\n\nWords of the paper, of the report and of the commands.\n\n| word | meaning |\n|---|---|\n"
UNTOUCHED = {"a", "nav", "h1", "h2", "h3", "svg", "pre", "details", "code", "dt"}  # no links into the glossary in these
BLOCKS = {"header", "section", "dd"}  # each links a term once, where it comes first


@dataclass(frozen=True)
class Term:
    """`forms` are the spellings under which pages use the word; `page` is the page of docs/ that says more."""

    id: str
    word: str
    forms: tuple[str, ...]
    text: str
    also: str = ""
    page: str = ""


def _read() -> tuple[Term, ...]:
    entries = json.loads(Path(__file__).with_name("glossary.json").read_text(encoding="utf-8"))
    return tuple(Term(**{**entry, "forms": tuple(entry["forms"])}) for entry in entries)


TERMS = _read()
SPELLINGS = {spelling: term for term in TERMS for form in term.forms for spelling in (form, form[0].upper() + form[1:])
             if spelling == form or len(form) > 1}  # fmt: skip
WORDS = "|".join(re.escape(spelling) for spelling in sorted(SPELLINGS, key=len, reverse=True))
MENTION = re.compile(rf"(?<![\w/.=-])(?:{WORDS})(?![\w/=-]|\.\w)")  # not within the names of files and settings
TAG = re.compile(r"(<[^>]*>)")  # templates escape every > of a text or an attribute


@dataclass(frozen=True)
class Explained:
    """A page's HTML with links, and the terms it uses, with their definitions, in the order of the glossary."""

    html: Markup
    terms: list[tuple[Term, Markup]]


def explained(html: str) -> Explained:
    """`html` with its terms linked to `#term-ID`. Terms that definitions use have a definition too."""
    linked, used = _linked(html)
    definitions: dict[Term, str] = {}
    while missing := used - definitions.keys():
        for term in missing:
            text = re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(term.text)))
            definitions[term], more = _linked(text, without=term)
            used |= more
    return Explained(Markup(linked), [(term, Markup(definitions[term])) for term in TERMS if term in used])


def _linked(html: str, without: Term | None = None) -> tuple[str, set[Term]]:
    """Each term's first mention in each block as a link, but that of the term `without`; and the terms."""
    depth, used, here, parts = 0, set(), {without}, []

    def link(mention: re.Match[str]) -> str:
        term = SPELLINGS[mention[0]]
        if term in here:
            return mention[0]
        here.add(term)
        used.add(term)
        return f'<a class="term" href="#term-{term.id}">{mention[0]}</a>'

    for part in TAG.split(html):
        if part.startswith("<"):
            name = re.split(r"[\s>]", part.strip("</"), maxsplit=1)[0]
            if name in UNTOUCHED:
                depth += -1 if part.startswith("</") else 1
            elif name in BLOCKS:
                here = {without}
        elif not depth:
            part = MENTION.sub(link, part)
        parts.append(part)
    return "".join(parts), used


def markdown() -> str:
    """docs/glossary.md."""
    lines = []
    for term in TERMS:
        more = f" ([{term.page.replace('_', ' ')}]({term.page}.md))" if term.page else ""
        also = f", {term.also}" if term.also else ""
        lines.append(f"| **{term.word}**{also} | {term.text}{more} |\n")
    return TITLE + "".join(lines)


if __name__ == "__main__":
    sys.stdout.buffer.write(markdown().encode())
