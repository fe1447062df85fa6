"""The finished atlas, read: search by words, one feature with everything about it, which features fire on a text.

Every answer is a query on the Parquet files that the stages made; `write_views` gives a person the same tables in
one DuckDB file. Light until `Atlas.explain`, which needs the language model and therefore torch.
"""

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock
from jaxtyping import Bool, Float32, Float64, Int64, Num

from sae_core.artifacts import ArtifactError, ArtifactStore, Made, write_atomically
from sae_core.by_feature import ByFeature
from sae_core.errors import MindAtlasError
from sae_core.features import Example, FeatureRow, Features
from sae_core.generations import served
from sae_core.labels.reader import BEST_SCORE
from sae_core.names import DictionarySpec, Site
from sae_core.settings import DOCUMENTED
from sae_core.word_index import FIELDS, WordIndex, terms

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
    "lineage": ("dictionary", "lineage.parquet"),
    "documents": ("corpus", "documents.parquet"),
}
"""Stage and file of each table; an artifact's slug is the column `dictionary`, for `documents` the column `corpus`."""

_BY_FEATURE = ("labels", "neighbors", "map", "steering", "lineage")
"""Tables whose rows are asked for feature by feature."""

_SATURATION = 1.2  # k1 of BM25 (Robertson and Zaragoza 2009): the tenth example with a word adds less than the first
_SNIPPET = 40  # characters shown on each side of a match


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
class Ancestor:
    """What a feature was before a retraining."""

    __pydantic_config__ = DOCUMENTED

    generation: int
    """The generation that the retraining made."""
    fate: str
    """`kept`: the same; `moved`: the same, much changed; `split`: a second one like an old one; `merged`: an old one
    that went up in it; `born`: like none before."""
    previous: int | None
    """Its number in the generation before."""
    cosine: float
    """Of the decoder rows before and after."""
    correlation: float
    """Of the activations before and after, on the same tokens."""


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
    history: list[Ancestor]
    """Newest first; empty where the dictionary was never trained again."""


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
    "relevance": ("total", -1),
    "density": ("density", -1),
    "rarity": ("density", 1),
    "strength": ("max_act", -1),
    "score": ("label_score", -1),
    "number": ("feature", 1),
}
"""How found features may be sorted: by what, from the least (1) or the largest (-1) on; unknown values come last."""


class _Columns(NamedTuple):
    """What is filtered and sorted by, of every feature."""

    density: Float64[np.ndarray, " d_sae"]
    max_act: Float32[np.ndarray, " d_sae"]
    n_fired: Int64[np.ndarray, " d_sae"]
    label_score: Float64[np.ndarray, " d_sae"]
    """NaN where there is none."""
    cluster: Int64[np.ndarray, " d_sae"]
    """`_NOWHERE` where it has no place on the map."""
    kind: pa.Array
    is_written: Bool[np.ndarray, " d_sae"]
    beats_control: pa.Array


_NOWHERE = -2


class Atlas:
    """What is known of one dictionary's features. Safe to use from several threads."""

    def __init__(self, store: ArtifactStore, dictionary: str) -> None:
        self.store, self.dictionary = served(store, dictionary), dictionary
        self.features = Features.open(self.store.get("features", dictionary).folder)
        self._lock = threading.Lock()
        self._database = duckdb.connect(config={"autoinstall_known_extensions": "false"})
        self._tables = set(_create_views(self._database, self.store, [dictionary]))
        paths = {table: self.store.get(_TABLES[table][0], dictionary).folder / _TABLES[table][1]
                 for table in _BY_FEATURE if table in self._tables}  # fmt: skip
        self._files = {table: ByFeature(path) for table, path in paths.items()}
        self._index: WordIndex | None = None
        self._sorted_by: _Columns | None = None

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
        return self._names[feature].as_py() if self._names is not None else ""

    def beats_control(self, feature: int) -> bool | None:
        """Whether the label did better than another feature's; None where it was not scored."""
        return self._columns_of_features().beats_control[feature].as_py()

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
        words = terms(query)
        if not words:
            raise SearchError(f"{query!r} holds no word to search for: give one or more words")
        index, parts = self._words(), []
        words = [term for term in words if not index.is_common(term)]
        total, n_terms = np.zeros(len(self.features)), np.zeros(len(self.features), np.int8)
        for term in words:
            found, holds = index.find(term), np.zeros(len(self.features), bool)
            for part in found:
                holds[part.features] = True
            n_terms += holds
            idf = math.log(1 + (len(holds) - holds.sum() + 0.5) / (holds.sum() + 0.5))
            for part in found:
                scores = FIELDS[part.field][0] * idf * part.counts / (part.counts + _SATURATION)
                total[part.features] += scores
                parts.append((term, part, scores))
        total *= n_terms / len(words)

        def why(feature: int) -> str:
            places = ((*part, int(np.searchsorted(part[1].features, feature))) for part in parts)
            held = (x for x in places if x[3] < len(x[2]) and x[1].features[x[3]] == feature)
            term, part, _, place = max(held, key=lambda x: (x[2][x[3]], x[1].field, x[0]))
            return _why(part.field, term, index.first_text(part, place))

        return self._hits(np.flatnonzero(n_terms), total, filters, sort, limit, offset, why)

    def browse(self, limit: int = 20, filters: Filters = ALL, sort: str = "number", offset: int = 0) -> list[Hit]:
        """Features that pass the filters, without a search. Raises SearchError when there is no such order."""
        every = np.arange(len(self.features))
        return self._hits(every, np.zeros(len(every)), filters, sort, limit, offset)

    def multilingual(self, limit: int = 20) -> list[Hit]:
        """Features whose strongest examples are spread most evenly over languages (largest entropy first).

        None where the languages of documents are not known.
        """
        if "documents" not in self._tables or "language" not in self._columns("documents"):
            return []
        found = """
            SELECT feature, -sum(n / total * ln(n / total)) AS total,
                string_agg(language, ', ' ORDER BY n DESC, language) AS languages
            FROM (SELECT feature, language, count(*) AS n, sum(count(*)) OVER (PARTITION BY feature) AS total
                  FROM examples JOIN documents USING (document) WHERE language <> '' AND examples.kind = 'top'
                  GROUP BY feature, language)
            GROUP BY feature HAVING count(*) > 1"""
        rows = self._query(f"{found} ORDER BY total DESC, feature LIMIT ?", [limit])
        total, languages = np.zeros(len(self.features)), {feature: text for feature, _, text in rows}
        total[list(languages)] = [entropy for _, entropy, _ in rows]
        some = np.array(sorted(languages), np.int64)
        return self._hits(some, total, ALL, "relevance", limit, 0, lambda i: _why("languages", "", languages[i]))

    def newest(self, limit: int = 20) -> list[Hit]:
        """Features that the last retraining brought, most often firing first; none where there was none."""
        if "lineage" not in self._tables:
            return []
        last = "generation = (SELECT max(generation) FROM lineage)"
        rows = self._query(f"SELECT feature, fate FROM lineage WHERE fate IN ('born', 'split') AND {last}")
        fates = dict(rows)
        some = np.array(sorted(fates), np.int64)
        total = np.zeros(len(self.features))
        return self._hits(some, total, Filters(alive=True), "density", limit, 0, lambda i: fates[i])

    def history(self, feature: int) -> list[Ancestor]:
        """What became of a feature from one retraining to the next, newest first, as far back as it is the same."""
        found: list[Ancestor] = []
        at, number = None, feature
        while rows := [r for r in self._about(number, "lineage") if at is None or r["generation"] == at]:
            at = max(row["generation"] for row in rows)
            lines = [Ancestor(at, r["fate"], r["previous"], r["cosine"], r["correlation"])
                     for r in rows if r["generation"] == at]  # fmt: skip
            found += lines
            own = next((line for line in lines if line.fate in {"kept", "moved"}), None)
            if own is None or own.previous is None:
                break
            at, number = at - 1, own.previous
        return found

    def documents(self, numbers: Iterable[int]) -> dict[int, dict[str, str]]:
        """Source, title and language of documents, by number; nothing for those that are not there any more."""
        known = self._documents
        if known is None:
            return {}
        wanted = np.array(sorted(set(numbers)), np.int64)
        at = np.searchsorted(known["document"].to_numpy(), wanted)
        rows = known.take(pa.array(at[at < len(known)])).to_pylist()
        return {row.pop("document"): row for row in rows if row["document"] in wanted}

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
        self, features: Int64[np.ndarray, " n"], total: Float64[np.ndarray, " d_sae"], filters: Filters, sort: str,
        limit: int, offset: int, why: Callable[[int], str] = lambda feature: "",
    ) -> list[Hit]:  # fmt: skip
        """Some features, filtered and in order; `total` is the relevance of every feature."""
        if sort not in SORTS:
            raise SearchError(f"{sort!r} is no order: choose one of {', '.join(SORTS)}")
        of, direction = SORTS[sort]
        columns = self._columns_of_features()
        features = features[_passing(columns, filters)[features]]
        keys = {"total": total, "feature": np.arange(len(total))}.get(of)
        keys = direction * (getattr(columns, of) if keys is None else keys)[features]
        return [
            Hit(
                feature=i,
                label=self.name(i),
                score=float(total[i]),
                why=why(i),
                density=float(columns.density[i]),
                max_act=float(columns.max_act[i]),
                kind=columns.kind[i].as_py() or "",
                label_score=_known(columns.label_score[i]),
                cluster=None if columns.cluster[i] == _NOWHERE else int(columns.cluster[i]),
                beats_control=columns.beats_control[i].as_py(),
            )
            for i in features[_least(keys, offset + limit)[offset:]].tolist()
        ]

    def feature(self, feature: int, neighbors: int = 10) -> FeatureCard:
        """Everything about one feature. Raises FeatureError when there is no such feature."""
        row = self.features.feature(feature)
        labels = self._about(feature, "labels")
        nearest = sorted(self._about(feature, "neighbors"), key=lambda row: row["rank"])[:neighbors]
        place = self._about(feature, "map")
        return FeatureCard(
            row=row,
            name=self.name(feature),
            label=labels[0] if labels else None,
            examples=self.features.examples(feature),
            neighbors=[Neighbor(n["neighbor"], self.name(n["neighbor"]), n["cosine"]) for n in nearest],
            place=Place(place[0]["x"], place[0]["y"], place[0]["cluster"]) if place else None,
            steering=next(iter(self._about(feature, "steering")), None),
            history=self.history(feature),
        )

    def suggested_strength(self, feature: int) -> float | None:
        """The largest strength at which its texts were fluent; None where none was looked for."""
        return next((row["suggested_strength"] for row in self._about(feature, "steering")), None)

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
    def _names(self) -> pa.Array | None:
        """What every feature is called; None before labels are made."""
        if "labels" not in self._tables:
            return None
        sql = "SELECT coalesce(nullif(label, ''), lexical, '') AS name FROM labels ORDER BY feature"
        return self._arrow(sql)["name"]

    @cached_property
    def _documents(self) -> pa.RecordBatch | None:
        """Where documents come from, by number; None where that is not known."""
        if not {"source", "title", "language"} <= self._columns("documents"):
            return None
        return self._arrow("SELECT document, source, title, language FROM documents ORDER BY document")

    def _words(self) -> WordIndex:
        """The index of all words; made first where it is not there."""
        with self._lock:
            if self._index is None:
                self._index = WordIndex.open(self.store, self.dictionary)
            return self._index

    def _columns_of_features(self) -> _Columns:
        with self._lock:
            if self._sorted_by is None:
                self._sorted_by = self._read_columns()
            return self._sorted_by

    def _read_columns(self) -> _Columns:
        has = self._columns("labels")
        score = f"CAST({BEST_SCORE} AS DOUBLE)" if self.has_scores else "NULL::DOUBLE"
        columns = {
            "label_score": score,
            "kind": "kind" if "kind" in has else "''",
            "is_written": "coalesce(label, '') <> ''" if has else "false",
            "beats_control": "beats_control" if "beats_control" in has else "NULL::BOOLEAN",
        }
        table = "labels" if has else "features"
        told = self._arrow(
            f"SELECT {', '.join(f'{sql} AS {name}' for name, sql in columns.items())} FROM {table} ORDER BY feature"
        )
        facts = self._arrow("SELECT density, max_act, n_fired FROM features ORDER BY feature")
        cluster = np.full(len(facts), _NOWHERE)
        if "map" in self._tables:
            places = self._arrow("SELECT feature, cluster FROM map")
            cluster[places["feature"].to_numpy()] = places["cluster"].to_numpy()
        return _Columns(
            **{name: facts[name].to_numpy() for name in ("density", "max_act", "n_fired")},
            label_score=told["label_score"].to_numpy(zero_copy_only=False),
            cluster=cluster,
            kind=told["kind"],
            is_written=told["is_written"].to_numpy(zero_copy_only=False),
            beats_control=told["beats_control"],
        )

    def _about(self, feature: int, table: str) -> list[dict[str, Any]]:
        """The feature's rows of a table; none when the table's stage is not made yet."""
        return self._files[table].rows(feature) if table in self._files else []

    def _columns(self, table: str) -> set[str]:
        """Names of a table's columns; none when its stage is not made yet."""
        return {row[0] for row in self._query(f"DESCRIBE {table}")} if table in self._tables else set()

    def _query(self, sql: str, parameters: list[Any] | None = None) -> list[tuple[Any, ...]]:
        return self._database.cursor().execute(sql, parameters or []).fetchall()

    def _arrow(self, sql: str) -> pa.RecordBatch:
        table = self._database.cursor().sql(sql).to_arrow_table().combine_chunks()
        return pa.record_batch([c.combine_chunks() for c in table.columns], names=table.column_names)


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


def _passing(columns: _Columns, filters: Filters) -> Bool[np.ndarray, " d_sae"]:
    """Which features pass the filters."""
    passing = (columns.density >= filters.min_density) & (columns.density <= filters.max_density)
    if filters.min_score is not None:
        passing &= columns.label_score >= filters.min_score
    if filters.kind:
        passing &= pc.fill_null(pc.equal(columns.kind, filters.kind), False).to_numpy(zero_copy_only=False)
    if filters.cluster is not None:
        passing &= columns.cluster == filters.cluster
    if filters.written:
        passing &= columns.is_written
    if filters.alive:
        passing &= columns.n_fired > 0
    return passing


def _least(keys: Num[np.ndarray, " n"], count: int) -> Int64[np.ndarray, " count"]:
    """Places of the `count` least keys in order, of equal ones the first; NaN comes last."""
    keys = np.where(np.isnan(keys), np.inf, keys)
    if count < len(keys):
        bound = np.partition(keys, count)[count]
        less, same = np.flatnonzero(keys < bound), np.flatnonzero(keys == bound)
        some = np.concatenate([less, same[: max(count - len(less), 0)]])
        return some[np.argsort(keys[some], kind="stable")]
    return np.argsort(keys, kind="stable")


def _known(score: float) -> float | None:
    return None if math.isnan(score) else float(score)


def _why(field: str, term: str, text: str) -> str:
    """The field, and the text around the term's first occurrence, on one line."""
    at = max(text.casefold().find(term), 0)
    start, stop = max(at - _SNIPPET, 0), at + len(term) + _SNIPPET
    snippet = " ".join(text[start:stop].split())
    return f"{field}: {'...' if start else ''}{snippet}{'...' if stop < len(text) else ''}"
