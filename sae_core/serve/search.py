"""What a search asks for, read from an address, and what it finds."""

from typing import Annotated, NamedTuple

from fastapi import Query

from sae_core.atlas import SORTS, Atlas, Filters, SearchError
from sae_core.serve.shapes import SearchView

MAX_QUERY = 500  # characters
PAGE = 30


class Question(NamedTuple):
    """A search: words (or none, to browse), filters, order, and from which hit on."""

    words: str
    filters: Filters
    sort: str
    offset: int
    limit: int


def question(
    q: Annotated[str, Query(description="Words; without any, all features are listed.")] = "",
    min_density: Annotated[str, Query(description="Least share of tokens on which it fires, in per cent.")] = "",
    max_density: Annotated[str, Query(description="Largest share of tokens on which it fires, in per cent.")] = "",
    min_score: Annotated[str, Query(description="Least score of the label, 0 to 1.")] = "",
    kind: Annotated[str, Query(description="Kind of the label: input, output, both, unclear.")] = "",
    cluster: Annotated[str, Query(description="Cluster on the map; -1 is none.")] = "",
    written: Annotated[bool, Query(description="Only features with a written label.")] = False,
    alive: Annotated[bool, Query(description="Only features that fire.")] = False,
    sort: Annotated[str, Query(description=f"One of {', '.join(SORTS)}.")] = "",
    offset: Annotated[int, Query(ge=0, le=1_000_000, description="Hits to pass over.")] = 0,
    limit: Annotated[int, Query(ge=1, le=200, description="Hits at most.")] = PAGE,
) -> Question:
    """The search that an address asks for; empty fields, as forms send them, are not asked for.

    Raises SearchError when a field is no number.
    """
    if len(q) > MAX_QUERY:
        raise SearchError(f"the query has {len(q):,} characters: give at most {MAX_QUERY}")
    low, high, score = _number("min_density", min_density), _number("max_density", max_density), min_score
    number = _number("cluster", cluster)
    filters = Filters(
        min_density=(low or 0) / 100,
        max_density=1.0 if high is None else high / 100,
        min_score=_number("min_score", score),
        kind=kind,
        cluster=None if number is None else int(number),
        written=written,
        alive=alive,
    )
    return Question(q, filters, sort or ("relevance" if q.strip() else "number"), offset, limit)


def found(atlas: Atlas, asked: Question) -> SearchView:
    """The hits of a search. Raises SearchError when the query holds no word or there is no such order."""
    rest = (asked.limit + 1, asked.filters, asked.sort, asked.offset)
    hits = atlas.search(asked.words, *rest) if asked.words.strip() else atlas.browse(*rest)
    return SearchView(
        dictionary=atlas.dictionary,
        query=asked.words,
        hits=hits[: asked.limit],
        more=len(hits) > asked.limit,
        offset=asked.offset,
        by_meaning=bool(asked.words.strip()) and atlas.has_meaning,
    )


def _number(name: str, text: str) -> float | None:
    if not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not -1e9 < value < 1e9:
        raise SearchError(f"{name} = {text[:40]!r} is no number: give one, or leave it empty")
    return value
