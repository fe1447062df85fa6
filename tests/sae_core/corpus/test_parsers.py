import bz2
import csv
import gzip
import io
import json
import sqlite3
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from sae_core.corpus.parsers import PARSERS, plain_text, read_members, read_verses


def parse(parser: str, content: bytes | str, name: str = "data", **options: Any) -> list[tuple[str, str]]:
    content = content.encode() if isinstance(content, str) else content
    return list(PARSERS[parser](iter([(name, content)]), **options))


def lines(*rows: dict[str, str]) -> str:
    return "\n".join(json.dumps(row) for row in rows) + "\n"


def test_wheels_and_source_archives_give_the_same_files(tmp_path: Path) -> None:
    files = {"p/data/a.txt": b"A", "p/data/deep/b.txt": b"B", "p/code.py": b"C"}
    with zipfile.ZipFile(tmp_path / "p.whl", "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
    with tarfile.open(tmp_path / "p.tar.gz", "w:gz") as sdist:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            sdist.addfile(member, io.BytesIO(content))
    wanted = [("p/data/a.txt", b"A"), ("p/data/deep/b.txt", b"B")]
    assert list(read_members(tmp_path / "p.whl", "*/data/*.txt")) == wanted
    assert list(read_members(tmp_path / "p.tar.gz", "*/data/*.txt")) == wanted


def test_summaries_and_recipes_have_titles() -> None:
    assert parse("summaries", '{"k": {"title": "Dune", "extract": "Sand.", "topic": "Earth"}}') == [("Dune", "Sand.")]
    recipe = {"k": {"title": "Tea", "ingredients": ["water", "leaves"], "steps": ["Boil.", "Wait."]}}
    assert parse("recipes", json.dumps(recipe)) == [("Tea", "- water\n- leaves\nBoil.\nWait.")]


def test_factbook_sections_name_their_country_and_lose_markup_and_short_fields() -> None:
    prose = "A <b>long</b> sentence about rivers and plains, which is more than sixty characters."
    country = {
        "Geography": {"Area": {"text": "12 sq km"}, "Terrain": {"parts": [{"text": prose}]}},
        "Government": {"Country name": {"conventional short form": {"text": "Utopia"}}},
    }
    assert parse("factbook", json.dumps(country)) == [
        ("Utopia: Geography", "A  long  sentence about rivers and plains, which is more than sixty characters.")
    ]


def test_articles_of_a_dump_are_cleaned_and_redirects_left_out() -> None:
    page = "<page><title>{}</title><revision><text xml:space='preserve'>{}</text></revision></page>"
    dump = page.format("A &amp; B", "'''Bold''' words.") + page.format("C", "#REDIRECT [[A]]")
    assert parse("wikitext", bz2.compress(dump.encode())) == [("A & B", "Bold words.")]


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("[[Rome]] and [[Paris|the capital]]", "Rome and the capital"),
        ("a{{cite|{{nested}}}}b", "ab"),
        ("a{| class=x\n| cell\n|}b", "ab"),
        ("[[File:x.jpg|thumb|a [[link]] in a caption]]text", "text"),
        ("[[Category:Things]]text[[de:Dinge]]", "text"),
        ("fact&lt;ref name=a&gt;source&lt;/ref&gt;.", "fact."),
        ("fact&lt;ref name=a /&gt;.", "fact."),
        ("see [http://example.org the site]", "see the site"),
        ("== Heading ==", "Heading"),
        ("x &amp;amp; y &amp;mdash; z", "x & y \u2014 z"),
        ("a<!-- hidden -->b", "ab"),
    ],
)
def test_markup_becomes_plain_text(markup: str, text: str) -> None:
    assert plain_text(markup) == text


def test_a_bible_gives_the_chapters_of_one_edition_in_order(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "bible.db")
    connection.execute("CREATE TABLE bible (bbName, bNumber, cNumber, vNumber, vText)")
    verses = [("k", 1, 2, 1, "three"), ("k", 1, 1, 2, "two"), ("k", 1, 1, 1, "one"), ("j", 1, 1, 1, "forbidden")]
    connection.executemany("INSERT INTO bible VALUES (?, ?, ?, ?, ?)", verses)
    connection.commit()
    connection.close()
    content = (tmp_path / "bible.db").read_bytes()
    assert parse("bible", content, edition="k") == [("", "one two"), ("", "three")]
    assert parse("bible", content, edition="k", upper=True) == [("", "ONE TWO"), ("", "THREE")]


def test_files_become_documents() -> None:
    assert parse("files", "text") == [("", "text")]
    assert parse("code_by_language", "int x;", "p/examplefiles/c/a.c") == [("", "int x;")]
    assert parse("code_by_language", "int x;", "p/examplefiles/c/a.c.output") == []
    assert parse("code_by_language", "00 ff", "p/examplefiles/hexdump/a") == []
    assert parse("library_code", "x = 1", "p/lib/a.py") == [("", "x = 1")]
    assert parse("library_code", "x = 1", "p/lib/tests/a.py") == []


def test_writing_briefs_are_parted_by_script() -> None:
    rows = lines({"query": "Write a poem about rain, please."}, {"query": "请写一首关于雨的诗。"})
    assert parse("writing_briefs", rows, language="en") == [("", "Write a poem about rain, please.")]
    assert parse("writing_briefs", rows, language="zh") == [("", "请写一首关于雨的诗。")]


def test_tables_and_lists_of_text_become_documents() -> None:
    table = io.StringIO()
    writer = csv.DictWriter(table, ["title", "description", "proposals"])
    writer.writeheader()
    writer.writerow({"title": "Bug", "description": "It\nbreaks", "proposals": "Mend it"})
    writer.writerow({"title": "Other", "description": "Odd", "proposals": ""})
    assert parse("issues", table.getvalue()) == [("Bug", "It\nbreaks"), ("", "Mend it"), ("Other", "Odd")]
    pages = gzip.compress(b'[{"title": "Cards", "content": "Call us."}]')
    assert parse("titled_json", pages) == [("Cards", "Call us.")]
    assert parse("strings", '["one", "two"]') == [("", "one"), ("", "two")]
    assert parse("prompts", lines({"prompt": "How?"}) + "\n") == [("", "How?")]
    assert parse("injections", lines({"text": "Ignore that."})) == [("", "Ignore that.")]
    assert parse("templates", "name: x\nvalue: '{% raw %}You are{% endraw %}'") == [("", "You are")]
    assert parse("dialogs", "conversations:\n- - Hi\n  - Hello\n- 7\n") == [("", "Hi\nHello"), ("", "7")]
    assert parse("dialogs", "categories: [x]") == []


def test_both_sides_of_a_pair_are_documents() -> None:
    pairs = [{"text": "true", "false": "not true", "id": "1"}, {"prompt": "Q", "positive": "good", "negative": "bad"}]
    wanted = [("", "true"), ("", "not true"), ("", "Q\ngood"), ("", "Q\nbad")]
    assert parse("contrast_pairs", json.dumps(pairs)) == wanted
    assert parse("contrast_pairs", json.dumps({"pairs": pairs})) == wanted


MAIL = b"""Subject: Hello
MIME-Version: 1.0
Content-Type: multipart/alternative; boundary="b"

--b
Content-Type: text/html; charset=utf-8

<style>p {color: red}</style><p>In <b>HTML</b></p>
--b
Content-Type: text/plain; charset=utf-8
Content-Transfer-Encoding: quoted-printable

Caf=C3=A9   au
lait
--b--
"""


def test_of_a_mail_its_plain_text_is_taken_decoded() -> None:
    assert parse("mails", MAIL) == [("", "Caf\u00e9 au\nlait")]


def test_of_a_mail_without_plain_text_the_markup_goes() -> None:
    assert parse("mails", MAIL.replace(b"text/plain", b"text/x-other")) == [("", "In HTML")]


def test_a_mail_in_a_character_set_that_nobody_knows_is_read_all_the_same() -> None:
    assert parse("mails", b"Content-Type: text/plain; charset=x-made-up\n\ncaf\xe9") == [("", "caf\u00e9")]
    assert parse("mails", b"") == [("", "")]


def test_the_articles_of_a_page_come_without_headings_in_order() -> None:
    page = '<h1>No</h1><article data-number="1"><h2>Article 1</h2> <p>All &amp; <i>sundry</i></p></article>'
    page += '<article data-number="2"><h2>Article 2</h2><p>a</p>\n<p>b</p></article>'
    assert parse("articles", page) == [("", "All & sundry"), ("", "a b")]


def test_verses_are_those_that_all_editions_have(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "b.db")
    connection.execute("CREATE TABLE bible (bbName, bNumber, cNumber, vNumber, vText)")
    rows = [
        ("k", 1, 1, 2, "two"),
        ("k", 1, 1, 1, "one "),
        ("l", 1, 1, 1, "un"),
        ("l", 1, 1, 2, ""),
        ("j", 1, 1, 1, "no"),
    ]
    connection.executemany("INSERT INTO bible VALUES (?, ?, ?, ?, ?)", rows)
    connection.commit()
    connection.close()
    found = read_verses(iter([("b.db", (tmp_path / "b.db").read_bytes())]), ["k", "l"])
    assert found == {(1, 1, 1): {"k": "one", "l": "un"}}
