"""From the files of a catalog archive to documents: one small function for each way in which text is kept there."""

import bz2
import csv
import email
import gzip
import html
import io
import json
import re
import sqlite3
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from email.message import Message
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

Files = Iterator[tuple[str, bytes]]
"""Name and content of the archive's members."""
Texts = Iterator[tuple[str, str]]
"""Title, which may be empty, and text."""


_STATEMENTS = ("text", "false", "honest", "deceptive", "harmful_version")
_ANSWERS = ("positive", "negative")


def read_members(archive: Path, pattern: str) -> Files:
    """The files of a wheel or source archive whose names match the shell pattern, one at a time, in archive order."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as members:
            for name in members.namelist():
                if fnmatchcase(name, pattern):
                    yield name, members.read(name)
    else:
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isfile() and fnmatchcase(member.name, pattern) and (file := tar.extractfile(member)):
                    yield member.name, file.read()


def summaries(files: Files) -> Texts:
    """Encyclopedia leads: `{key: {title, extract}}`."""
    for _, content in files:
        for page in json.loads(content).values():
            yield page["title"], page["extract"]


def recipes(files: Files) -> Texts:
    """Recipes: `{key: {title, ingredients, steps}}`."""
    for _, content in files:
        for recipe in json.loads(content).values():
            yield recipe["title"], "\n".join([*(f"- {item}" for item in recipe["ingredients"]), *recipe["steps"]])


def factbook(files: Files) -> Texts:
    """The sections on each country, markup removed; short fields, which are mere numbers, are left out."""
    for _, content in files:
        country = json.loads(content)
        name = country.get("Government", {}).get("Country name", {}).get("conventional short form", {}).get("text", "")
        for section, fields in country.items():
            prose = [re.sub(r"<[^>]+>", " ", text).strip() for text in _strings(fields) if len(text) >= 60]
            if prose:
                yield f"{name}: {section}" if name else section, "\n".join(prose)


def wikitext(files: Files) -> Texts:
    """Full articles of a compressed MediaWiki dump, without redirects."""
    for _, content in files:
        dump = bz2.decompress(content).decode()
        for title, text in re.findall(r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", dump, re.DOTALL):
            if not text.upper().startswith("#REDIRECT"):
                yield html.unescape(title), plain_text(text)


def bible(files: Files, edition: str, upper: bool = False) -> Texts:
    """The chapters of one edition in an SQLite file; `upper`: in capital letters."""
    query = "SELECT vText, bNumber, cNumber FROM bible WHERE bbName = ? ORDER BY bNumber, cNumber, vNumber"
    for _, content in files:
        connection = sqlite3.connect(":memory:")
        connection.deserialize(content)
        chapters: dict[tuple[int, int], list[str]] = {}
        for verse, book, chapter in connection.execute(query, (edition,)):
            chapters.setdefault((book, chapter), []).append(verse)
        connection.close()
        texts = (" ".join(verses) for verses in chapters.values())
        yield from (("", text.upper() if upper else text) for text in texts)


def read_verses(files: Files, editions: Sequence[str]) -> dict[tuple[int, int, int], dict[str, str]]:
    """Text by edition of every verse that all the editions have, by book, chapter and verse, in order."""
    query = "SELECT bNumber, cNumber, vNumber, bbName, vText FROM bible ORDER BY bNumber, cNumber, vNumber"
    verses: dict[tuple[int, int, int], dict[str, str]] = {}
    for _, content in files:
        connection = sqlite3.connect(":memory:")
        connection.deserialize(content)
        for book, chapter, verse, edition, text in connection.execute(query):
            if edition in editions:
                verses.setdefault((book, chapter, verse), {})[edition] = text.strip()
        connection.close()
    return {place: texts for place, texts in verses.items() if all(texts.get(edition) for edition in editions)}


def articles(files: Files) -> Texts:
    """The articles of an HTML page without their headings, in order; what is no `article` is left out."""
    for _, content in files:
        for article in re.findall(r"<article\b[^>]*>(.*?)</article>", content.decode(), re.DOTALL):
            body = re.sub(r"<h2>.*?</h2>", "", article, flags=re.DOTALL)
            yield "", re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", body))).strip()


def mails(files: Files) -> Texts:
    """Raw mails: subject, and the plain text; of a mail that has none, its HTML without markup."""
    for _, content in files:
        message = email.message_from_bytes(content)
        parts = {part.get_content_type(): part for part in reversed(list(message.walk()))}
        part = parts.get("text/plain", parts.get("text/html"))
        if part is not None:  # a part without headers counts as false
            text = _decoded(part)
            if part.get_content_type() == "text/html":
                text = re.sub(r"<(style|script)\b.*?</\1>", " ", text, flags=re.DOTALL | re.IGNORECASE)
                text = html.unescape(re.sub(r"<[^>]*>", " ", text))
            yield "", re.sub(r"[ \t\xa0]+", " ", re.sub(r"\s*\n\s*", "\n", text)).strip()


def _decoded(part: Message) -> str:
    payload = part.get_payload(decode=True)
    body = payload if isinstance(payload, bytes) else b""
    try:
        return body.decode(part.get_content_charset() or "latin-1", "replace")
    except LookupError:  # a character set of the sender's own making
        return body.decode("latin-1")


def files(files: Files) -> Texts:
    """Each file a document; none but UTF-8."""
    for _, content in files:
        yield "", content.decode("utf-8", "replace")


def code_by_language(files: Files) -> Texts:
    """Source code; not the expected output of the lexers that lies beside it, nor dumps of numbers."""
    for name, content in files:
        if not name.endswith((".output", ".py.txt")) and PurePosixPath(name).parent.name != "hexdump":
            yield "", content.decode("utf-8", "replace")


def library_code(files: Files) -> Texts:
    """Source code without its tests."""
    for name, content in files:
        if "/tests/" not in name:
            yield "", content.decode("utf-8", "replace")


def writing_briefs(files: Files, language: str) -> Texts:
    """Requests to write something, with their sources, that are in Chinese (`zh`) or not (`en`)."""
    for _, content in files:
        for row in _json_lines(content):
            brief = row["query"]
            chinese = len(re.findall("[\u4e00-\u9fff]", brief)) > 0.2 * len(brief)
            if chinese == (language == "zh"):
                yield "", brief


def titled_json(files: Files) -> Texts:
    """A compressed list of `{title, content}`."""
    for _, content in files:
        for page in json.loads(gzip.decompress(content)):
            yield page["title"], page["content"]


def issues(files: Files) -> Texts:
    """Software issues, and the proposals to solve them, from a CSV table."""
    csv.field_size_limit(1 << 24)
    for _, content in files:
        for row in csv.DictReader(io.StringIO(content.decode())):
            yield row["title"], row["description"]
            if row["proposals"]:
                yield "", row["proposals"]


def strings(files: Files) -> Texts:
    """A list of documents."""
    for _, content in files:
        yield from (("", text) for text in json.loads(content))


def prompts(files: Files) -> Texts:
    """JSON lines with a `prompt`."""
    for _, content in files:
        yield from (("", row["prompt"]) for row in _json_lines(content))


def injections(files: Files) -> Texts:
    """JSON lines with a `text`: prompt injections and their harmless twins."""
    for _, content in files:
        yield from (("", row["text"]) for row in _json_lines(content))


def templates(files: Files) -> Texts:
    """YAML files with a `value`, which may be wrapped in Jinja's quotation marks."""
    for _, content in files:
        yield "", re.sub(r"\{% (end)?raw %\}", "", str(yaml.safe_load(content).get("value", "")))


def contrast_pairs(files: Files) -> Texts:
    """Both sides of pairs (true and false, honest and deceptive, answer and bad answer), each side a document."""
    for _, content in files:
        data = json.loads(content)
        for row in data if isinstance(data, list) else [row for rows in data.values() for row in rows]:
            yield from (("", row[side]) for side in _STATEMENTS if side in row)
            yield from (("", f"{row['prompt']}\n{row[side]}") for side in _ANSWERS if side in row)


def dialogs(files: Files) -> Texts:
    """YAML files with `conversations`, each a list of turns."""
    for _, content in files:
        for turns in yaml.safe_load(content).get("conversations") or []:
            yield "", "\n".join(map(str, turns)) if isinstance(turns, list) else str(turns)


PARSERS: dict[str, Callable[..., Texts]] = {
    parser.__name__: parser
    for parser in (
        summaries, recipes, factbook, wikitext, bible, files, code_by_language, library_code, writing_briefs,
        titled_json, issues, strings, prompts, injections, templates, contrast_pairs, dialogs,
        articles, mails,
    )
}  # fmt: skip
"""By the name that a catalog entry gives."""


def plain_text(wikitext: str) -> str:
    """MediaWiki markup without templates, tables, references, files and categories; links become their words."""
    text = html.unescape(html.unescape(wikitext))
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<(ref|math|gallery|timeline)\b[^>]*?(/>|>.*?</\1\s*>)", "", text, flags=re.DOTALL | re.IGNORECASE)
    for _ in range(6):  # templates lie inside templates, hardly ever deeper
        text = re.sub(r"\{\{[^{}]*\}\}", "", text)
    text = re.sub(r"\{\|.*?\|\}", "", text, flags=re.DOTALL)
    for _ in range(2):  # a picture's caption holds links of its own
        text = re.sub(r"\[\[(?:File|Image|Category|[a-z-]{2,12}):[^\[\]]*\]\]", "", text)
        text = re.sub(r"\[\[(?!File:|Image:)(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"'{2,}|</?[a-zA-Z][^>]*>|^[=]+|[=]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _json_lines(content: bytes) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in content.decode().splitlines() if line.strip())
