"""The glossary: one source for docs/glossary.md and for the definitions on every page."""

import re
from pathlib import Path

from neon_run.reproduce.glossary import TERMS, explained, markdown

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_of_the_documents_is_made_from_the_same_entries():
    written = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
    assert written == markdown(), "write it again: python -m neon_run.reproduce.glossary > docs/glossary.md"


def test_a_spelling_and_an_id_belong_to_one_term():
    spellings = [form.capitalize() if len(form) > 2 else form for term in TERMS for form in term.forms]
    assert len(set(spellings)) == len(spellings) and len({term.id for term in TERMS}) == len(TERMS)
    assert all(term.forms and "|" not in term.text for term in TERMS)


def test_the_first_mention_in_a_section_is_linked_and_no_other():
    page = explained("<section><p>w is 1, w is 2.</p></section><section><td>Held out (w = 1)</td></section>")
    link = '<a class="term" href="#term-{}">{}</a>'.format
    first = f"<p>{link('w', 'w')} is 1, w is 2.</p>"
    second = f"<td>{link('held-out', 'Held out')} ({link('w', 'w')} = 1)</td>"
    assert page.html == f"<section>{first}</section><section>{second}</section>"


def test_names_headings_figures_and_links_stay_as_they_are():
    html = (
        '<h2>w and cfg</h2><nav><a href="#w">w</a></nav><svg aria-label="FID"><text>w</text></svg><pre>{"S": 1}</pre>'
        "<td>snapshot-000080</td><td>base.safetensors</td><td>edm/row</td><td>S-1 newest based swap</td>"
    )
    page = explained(html)
    assert page.html == html and not page.terms


def test_terms_that_a_definition_uses_are_defined_too_and_unused_ones_are_not():
    page = explained("<p>one snapshot</p>")
    defined = [term.id for term, _ in page.terms]
    assert defined[-1] == "snapshot" and {"self-trained", "base", "S", "w"} <= set(defined)
    assert not {"drift", "detector", "rank"} & set(defined)
    assert defined == [term.id for term in TERMS if term.id in defined], "in the glossary's order"
    linked = {id for _, text in page.terms for id in re.findall(r'href="#term-([\w-]+)"', text)}
    assert linked <= set(defined)
    assert "<code>" in {term.id: text for term, text in page.terms}["base"]
