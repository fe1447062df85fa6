"""The finished atlas, read: search by words, one feature with everything about it, which features fire on a text.

Every answer is a query on the Parquet files that the stages made; `write_views` gives a person the same tables in
one DuckDB file. Light until `Atlas.explain`, which needs the language model and therefore torch.
"""

import re
import threading
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import duckdb
from filelock import FileLock

from sae_core.artifacts import ArtifactError, ArtifactStore, Made, write_atomically
from sae_core.errors import MindAtlasError
from sae_core.features import Example, FeatureRow, Features
from sae_core.generations import served
from sae_core.labels.reader import BEST_SCORE
from sae_core.names import DictionarySpec, Site
from sae_core.settings import DOCUMENTED

if TYPE_CHECKING:
    from sae_core.dictionary import Dictionary
    from sae_core.language_model import LanguageModel

_TABLES = {
    "features": ("features", "features.parquet"),
    "examples": ("features", "examples.parquet"),
    "windows": ("features", "windows.parquet"),
    "labels": ("labels", "labels.parquet"),
    "neighbors": ("neighbors", "neighbors.parquet"),
    "map": ("feature_map", "map.parquet"),
    "steering": ("steering", "scores.parquet"),
    "training": ("dictionary", "metrics.parquet"),
    "documents": ("corpus", "documents.parquet"),
}
"""Stage and file of each table; an artifact's slug is the column `dictionary`, for `documents` the column `corpus`."""

_FIELDS = {
    "label": (8.0, "SELECT feature, label FROM labels"),
    "description": (4.0, "SELECT feature, description FROM labels"),
    "lexical label": (3.0, "SELECT feature, lexical FROM labels"),
    "promoted token": (2.0, "SELECT feature, unnest(promoted) FROM features"),
    "top token": (2.0, "SELECT feature, unnest(top_tokens) FROM features"),
    "example": (1.0, "SELECT feature, array_to_string(tokens, '') FROM examples"),
}
"""What is searched, and how much a word there counts: what a person or a model said of the feature comes first."""

_SATURATION = 1.2  # k1 of BM25 (Robertson and Zaragoza 2009): the tenth example with a word adds less than the first
_MAX_TERMS = 16
_SNIPPET = 40  # characters shown on each side of a match
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


class SearchError(MindAtlasError):
    """A search that cannot be made."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A feature that a search found."""

    __pydantic_config__ = DOCUMENTED

    feature: int
    label: str
    score: float
    """Higher is better; comparable within one search only."""
    why: str
    """Where it was found, with the text around; empty when no words were searched."""
    density: float
    max_act: float = 0.0
    kind: str = ""
    """The label's kind; empty where no label was written."""
    label_score: float | None = None
    cluster: int | None = None
    beats_control: bool | None = None
    """Whether the label did better than another feature's on text that its writer did not see; None: not scored."""


@dataclass(frozen=True, slots=True)
class Neighbor:
    """A feature whose decoder row points a similar way."""

    feature: int
    label: str
    cosine: float


@dataclass(frozen=True, slots=True)
class Place:
    """Where a feature lies on the map; cluster -1 is none."""

    x: float
    y: float
    cluster: int


@dataclass(frozen=True, slots=True)
class FeatureCard:
    """One feature with everything about it. What a stage that is not made yet would tell is None or empty."""

    row: FeatureRow
    name: str
    """The label; the lexical one where no label was written."""
    label: dict[str, Any] | None
    """Its row of `labels.parquet`."""
    examples: list[Example]
    neighbors: list[Neighbor]
    place: Place | None
    steering: dict[str, Any] | None
    """Its row of `scores.parquet`: how well it steers."""


@dataclass(frozen=True, slots=True)
class Fired:
    """A feature that fires on a token."""

    __pydantic_config__ = DOCUMENTED

    feature: int
    value: float
    """Its activation."""
    label: str


@dataclass(frozen=True, slots=True)
class ExplainedToken:
    """A token of a text, and the features that fire on it most strongly."""

    __pydantic_config__ = DOCUMENTED

    token: str
    features: list[Fired]
    value: float | None = None
    """What the feature that was asked for does here; None when none was."""


class Filters(NamedTuple):
    """Which features a search may find."""

    min_density: float = 0.0
    max_density: float = 1.0
    min_score: float | None = None
    """Of the label, see `labels.reader.BEST_SCORE`."""
    kind: str = ""
    """The label's: `input`, `output`, `both`, `unclear`."""
    cluster: int | None = None
    """On the map; -1 is none."""
    written: bool = False
    """Leave out features without a written label."""
    alive: bool = False
    """Leave out features that never fire."""


ALL = Filters()

SORTS = {
    "relevance": "total DESC",
    "density": "density DESC",
    "rarity": "density",
    "strength": "max_act DESC",
    "score": "label_score DESC NULLS LAST",
    "number": "feature",
}
"""How found features may be sorted."""


class Atlas:
    """What is known of one dictionary's features. Safe to use from several threads."""

    def __init__(self, store: ArtifactStore, dictionary: str) -> None:
        self.store, self.dictionary = served(store, dictionary), dictionary
        self.features = Features.open(self.store.get("features", dictionary).folder)
        self._lock = threading.Lock()
        self._database = duckdb.connect(config={"autoinstall_known_extensions": "false"})
        self._tables = set(_create_views(self._database, self.store, [dictionary]))

    @classmethod
    def open(cls, store: ArtifactStore, dictionary: str = "") -> "Atlas":
        """The atlas of a dictionary, by slug; without one, of the dictionary whose features were made last.

        Raises ArtifactError when no such features are made yet.
        """
        made = {slug: store.get("features", slug).manifest.made_at for slug in store.slugs("features")}
        if not made:
            raise ArtifactError("no atlas is made yet: `mind-atlas run` makes one")
        if dictionary and dictionary not in made:
            raise ArtifactError(f"no finished dictionary {dictionary}: finished are {', '.join(sorted(made))}")
        return cls(store, dictionary or max(made, key=lambda slug: made[slug]))

    @property
    def site(self) -> Site:
        """Where the dictionary reads the model."""
        return DictionarySpec.parse(self.dictionary).site

    def load_dictionary(self) -> "Dictionary":
        """The dictionary itself. Raises ArtifactError or DictionaryError when it is not there any more, or damaged."""
        from sae_core.dictionary import Dictionary

        return Dictionary.load(self.store.get("dictionary", self.dictionary).folder)

    def name(self, feature: int) -> str:
        """The feature's label, or its lexical label where none was written; empty before labels are made."""
        return self._names.get(feature, "")

    def search(
        self, query: str, limit: int = 20, filters: Filters = ALL, sort: str = "relevance", offset: int = 0
    ) -> list[Hit]:
        """Features by words: in labels, in the tokens they promote or fire on, and in their examples' text.

        A word matches at the start of words, in any case; several words also match as a phrase. Each term counts by
        its rarity over the features (as in BM25) and by the fields it is found in; the sum is scaled by the share of
        the terms that were found.

        Raises:
            SearchError: the query holds no word.
        """
        terms = _terms(query)
        if not terms:
            raise SearchError(f"{query!r} holds no word to search for: give one or more words")
        self._ensure_texts()
        one_term = (
            "SELECT feature, field, weight, ? AS term, count(*) AS n, min(text) AS text FROM texts "
            "WHERE regexp_matches(text, ?) GROUP BY feature, field, weight"
        )
        found = f"""
            WITH found AS ({" UNION ALL ".join([one_term] * len(terms))}),
            rarity AS (
                SELECT term, ln(1 + ((SELECT count(*) FROM features) - count(DISTINCT feature) + 0.5)
                                     / (count(DISTINCT feature) + 0.5)) AS idf
                FROM found GROUP BY term),
            scored AS (SELECT *, weight * idf * n / (n + {_SATURATION}) AS score FROM found JOIN rarity USING (term))
            SELECT feature, sum(score) * count(DISTINCT term) / {len(terms)} AS total,
                arg_max({{field: field, term: term, text: text}}, (score, field, term)) AS why
            FROM scored GROUP BY feature"""
        parameters = [part for term in terms for part in (term, _pattern(term))]
        return self._hits(found, parameters, filters, sort, limit, offset)

    def browse(self, limit: int = 20, filters: Filters = ALL, sort: str = "number", offset: int = 0) -> list[Hit]:
        """Features that pass the filters, without a search. Raises SearchError when there is no such order."""
        return self._hits(
            "SELECT feature, 0::DOUBLE AS total, NULL AS why FROM features", [], filters, sort, limit, offset
        )

    def multilingual(self, limit: int = 20) -> list[Hit]:
        """Features whose strongest examples are spread most evenly over languages (largest entropy first).

        None where the languages of documents are not known.
        """
        if "documents" not in self._tables or "language" not in self._columns("documents"):
            return []
        found = """
            SELECT feature, -sum(n / total * ln(n / total)) AS total, {field: 'languages', term: '',
                text: string_agg(language, ', ' ORDER BY n DESC, language)} AS why
            FROM (SELECT feature, language, count(*) AS n, sum(count(*)) OVER (PARTITION BY feature) AS total
                  FROM examples JOIN documents USING (document) WHERE language <> '' AND examples.kind = 'top'
                  GROUP BY feature, language)
            GROUP BY feature HAVING count(*) > 1"""
        return self._hits(found, [], ALL, "relevance", limit, 0)

    def documents(self, numbers: Iterable[int]) -> dict[int, dict[str, str]]:
        """Source, title and language of documents, by number; nothing for those that are not there any more."""
        if not {"source", "title", "language"} <= self._columns("documents"):
            return {}
        sql = "SELECT document, source, title, language FROM documents WHERE document IN (SELECT unnest(?::INT[]))"
        rows = self._query(sql, [list(numbers)])
        return {number: {"source": a, "title": b, "language": c} for number, a, b, c in rows}

    def together(self, feature: int, limit: int = 10) -> list[tuple[int, int]]:
        """Features at whose examples' peaks this one fires too, within its own examples: (feature, number of peaks).

        Only what examples show is counted: firings are not kept, so this finds companions and measures nothing.
        """
        sql = """
            WITH fires AS (
                SELECT DISTINCT document, position - peak + place - 1 AS position
                FROM (SELECT document, position, peak, unnest(acts) AS act, generate_subscripts(acts, 1) AS place
                      FROM examples WHERE feature = ?)
                WHERE act > 0)
            SELECT feature, count(*) AS n FROM examples JOIN fires USING (document, position) WHERE feature <> ?
            GROUP BY feature ORDER BY n DESC, feature LIMIT ?"""
        return self._query(sql, [feature, feature, limit])

    @cached_property
    def has_scores(self) -> bool:
        """Whether some label was scored."""
        asked = "SELECT count(*) FROM labels WHERE len(scores) > 0"
        return "scores" in self._columns("labels") and bool(self._query(asked)[0][0])

    def _hits(
        self, found: str, parameters: list[Any], filters: Filters, sort: str, limit: int, offset: int
    ) -> list[Hit]:
        """The features of a query with columns feature, total and why, filtered and in order."""
        if sort not in SORTS:
            raise SearchError(f"{sort!r} is no order: choose one of {', '.join(SORTS)}")
        score = BEST_SCORE if self.has_scores else "NULL::DOUBLE"
        nothing = "SELECT NULL::INT AS feature, '' AS label, '' AS kind, NULL::INT AS cluster"
        labels = f"SELECT feature, label, kind, {score} AS label_score FROM labels"
        labels = labels if "kind" in self._columns("labels") else f"SELECT *, {score} AS label_score FROM ({nothing})"
        places = "SELECT feature, cluster FROM map" if "map" in self._tables else nothing
        where = ["density BETWEEN ? AND ?"]
        values: list[float | str] = [filters.min_density, filters.max_density]
        for condition, value in (
            ("labels.label_score >= ?", filters.min_score),
            ("labels.kind = ?", filters.kind or None),
            ("places.cluster = ?", filters.cluster),
            ("coalesce(labels.label, '') > ?", "" if filters.written else None),
            ("n_fired > ?", 0 if filters.alive else None),
        ):
            if value is not None:
                where.append(condition)
                values.append(value)
        sql = f"""
            SELECT feature, total, why, density, max_act, labels.kind, labels.label_score, places.cluster
            FROM ({found}) JOIN features USING (feature)
            LEFT JOIN ({labels}) labels USING (feature) LEFT JOIN ({places}) places USING (feature)
            WHERE {" AND ".join(where)} ORDER BY {SORTS[sort]}, feature LIMIT ? OFFSET ?"""
        return [
            Hit(
                i,
                self.name(i),
                total,
                _why(**why) if why else "",
                density,
                max_act,
                kind or "",
                label_score,
                cluster,
                self._beats_control.get(i),
            )
            for i, total, why, density, max_act, kind, label_score, cluster in self._query(
                sql, [*parameters, *values, limit, offset]
            )
        ]

    def feature(self, feature: int, neighbors: int = 10) -> FeatureCard:
        """Everything about one feature. Raises FeatureError when there is no such feature."""
        row = self.features.feature(feature)
        labels = self._about(feature, "labels", "*")
        nearest = self._about(feature, "neighbors", "neighbor, cosine", f"ORDER BY rank LIMIT {int(neighbors)}")
        place = self._about(feature, "map", "x, y, cluster")
        return FeatureCard(
            row=row,
            name=self.name(feature),
            label=labels[0] if labels else None,
            examples=self.features.examples(feature),
            neighbors=[Neighbor(n["neighbor"], self.name(n["neighbor"]), n["cosine"]) for n in nearest],
            place=Place(**place[0]) if place else None,
            steering=next(iter(self._about(feature, "steering", "*")), None),
        )

    def suggested_strength(self, feature: int) -> float | None:
        """The largest strength at which its texts were fluent; None where none was looked for."""
        return next((row["suggested_strength"] for row in self._about(feature, "steering", "*")), None)

    def explain(self, lm: "LanguageModel", text: str, per_token: int = 5) -> list[ExplainedToken]:
        """For each token of `text`, the (at most) `per_token` features that fire most strongly on it.

        Attention sinks (see `ActivationSettings.sink_norm`) get no features: dictionaries are not trained on them.
        """
        return list(self.explain_lazily(lm, text, per_token))

    def explain_lazily(
        self, lm: "LanguageModel", text: str, per_token: int = 5, feature: int | None = None
    ) -> Iterator[ExplainedToken]:
        """As `explain`, block by block as tokens are asked for; with the value of `feature` at each, if one is given.

        Raises FeatureError when there is no such feature.
        """
        from sae_core.features.on_text import strongest, values_on_text  # torch, which nothing else here needs

        if feature is not None:
            self.features.feature(feature)
        for strings, values in values_on_text(self.store, self.dictionary, lm, text, self.sink_norm):
            asked = [None] * len(strings) if feature is None else values[:, feature].tolist()
            for token, fired, value in zip(strings, strongest(values, per_token), asked, strict=True):
                yield ExplainedToken(token, [Fired(i, act, self.name(i)) for i, act in fired], value)

    @cached_property
    def sink_norm(self) -> float:
        """Norm above which a token counted as an attention sink in the harvest."""
        return sink_norm(self.store.get("activations", self.site.slug))

    @cached_property
    def _names(self) -> dict[int, str]:
        if "labels" not in self._tables:
            return {}
        return dict(self._query("SELECT feature, coalesce(nullif(label, ''), lexical, '') FROM labels"))

    @cached_property
    def _beats_control(self) -> dict[int, bool]:
        if "scores" not in self._tables:  # labels made before there were any
            return {}
        return dict(self._query("SELECT feature, beats_control FROM labels WHERE beats_control IS NOT NULL"))

    def _ensure_texts(self) -> None:
        """Gather, once, everything that is searched in one table in memory."""
        with self._lock:
            if "texts" in self._tables:
                return
            parts = [
                f"SELECT feature, '{field}' AS field, {weight} AS weight, text FROM ({select}) AS found(feature, text)"
                for field, (weight, select) in _FIELDS.items()
                if select.rsplit(" ", 1)[1] in self._tables
            ]
            self._query(f"CREATE TABLE texts AS SELECT * FROM ({' UNION ALL '.join(parts)}) WHERE text <> ''")
            self._tables.add("texts")

    def _about(self, feature: int, table: str, columns: str, rest: str = "") -> list[dict[str, Any]]:
        """The feature's rows of a table; none when the table's stage is not made yet."""
        if table not in self._tables:
            return []
        columns = columns.replace("*", "* EXCLUDE (dictionary)")
        cursor = self._database.cursor().execute(f"SELECT {columns} FROM {table} WHERE feature = ? {rest}", [feature])
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def _columns(self, table: str) -> set[str]:
        """Names of a table's columns; none when its stage is not made yet."""
        return {row[0] for row in self._query(f"DESCRIBE {table}")} if table in self._tables else set()

    def _query(self, sql: str, parameters: list[Any] | None = None) -> list[tuple[Any, ...]]:
        return self._database.cursor().execute(sql, parameters or []).fetchall()


def sink_norm(harvest: Made) -> float:
    """Norm above which a token counted as an attention sink in a harvest."""
    return float(harvest.manifest.summary["median_norm"] * harvest.manifest.settings["sink_norm"])


def write_views(store: ArtifactStore) -> Path:
    """Write `<root>/atlas.duckdb`: a view over each table of all finished artifacts, for anyone who writes SQL.

    `SELECT feature, label FROM labels WHERE dictionary = '...'`; `dictionaries` lists what there is. The file holds
    no data, only the paths of what is finished now: write it again when something new is.
    """
    target = store.root / "atlas.duckdb"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(store.root / ".views.lock"), write_atomically(target) as path:
        path.unlink(missing_ok=True)  # left by a killed run
        with duckdb.connect(str(path)) as database:
            _create_views(database, store, store.slugs("dictionary"))
            database.execute(
                "CREATE TABLE dictionaries(dictionary VARCHAR, model VARCHAR, hook VARCHAR, layer INTEGER, "
                "corpus VARCHAR, architecture VARCHAR, d_sae INTEGER, k INTEGER, l1_coefficient DOUBLE)"
            )
            for slug in store.slugs("dictionary"):
                spec = DictionarySpec.parse(slug)
                row = [slug, *spec.site, spec.architecture, spec.d_sae, spec.k, spec.l1_coefficient]
                database.execute("INSERT INTO dictionaries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
    return target


def _create_views(database: duckdb.DuckDBPyConnection, store: ArtifactStore, slugs: Iterable[str]) -> list[str]:
    """Create a view for each table that some finished artifact of the given dictionaries has; returns their names."""
    specs = [DictionarySpec.parse(slug) for slug in slugs]
    made = []
    for table, (stage, file) in _TABLES.items():
        column = "corpus" if stage == "corpus" else "dictionary"
        names = sorted({spec.site.corpus if stage == "corpus" else spec.slug for spec in specs})
        seen = {name: store if stage == "corpus" else served(store, name) for name in names}
        folders = {name: of.get(stage, name).folder for name, of in seen.items() if of.manifest(stage, name)}
        selects = [
            f"SELECT {_quoted(name)} AS {column}, * FROM read_parquet({_quoted(str(folder / file))})"
            for name, folder in folders.items()
            if (folder / file).is_file()
        ]
        if selects:
            database.execute(f"CREATE VIEW {table} AS {' UNION ALL BY NAME '.join(selects)}")
            made.append(table)
    if "labels" in made and "scores" in {row[0] for row in database.execute("DESCRIBE labels").fetchall()}:
        database.execute(
            "CREATE VIEW scores AS SELECT dictionary, feature, label, beats_control, shuffled_from, "
            "unnest(scores, max_depth := 2) FROM labels"
        )
        made.append("scores")
    return made


def _quoted(text: str) -> str:
    """`text` as a string of SQL, for views, which take no parameters."""
    return "'" + text.replace("'", "''") + "'"


def _terms(query: str) -> list[str]:
    """The words of a query, and the whole of it when it has several; what no stored text can hold is dropped."""
    clean = query.replace("\0", " ").encode("utf-8", "ignore").decode()
    words = unicodedata.normalize("NFC", clean).casefold().split()[:_MAX_TERMS]
    return list(dict.fromkeys(words if len(words) < 2 else [*words, " ".join(words)]))


def _pattern(term: str) -> str:
    """RE2 pattern of a term: any case, at the start of a word where its script puts spaces between words."""
    starts_word = term[0].isalnum() and not unicodedata.name(term[0], "").startswith(_UNSPACED)
    return "(?i)" + (r"(?:^|[^\p{L}\p{N}])" if starts_word else "") + r"\s+".join(map(re.escape, term.split()))


def _why(field: str, term: str, text: str) -> str:
    """The field, and the text around the term's first occurrence, on one line."""
    at = max(text.casefold().find(term), 0)
    start, stop = max(at - _SNIPPET, 0), at + len(term) + _SNIPPET
    snippet = " ".join(text[start:stop].split())
    return f"{field}: {'...' if start else ''}{snippet}{'...' if stop < len(text) else ''}"
