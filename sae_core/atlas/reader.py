"""`Atlas`: what is known of one dictionary's features, gathered from the stages' files."""

import threading
from collections.abc import Collection, Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sae_core.artifacts import ArtifactError, ArtifactStore, Made
from sae_core.atlas import choosing, lists
from sae_core.atlas.choosing import ALL, NOWHERE, Columns, Filters, Found, chosen, read_columns
from sae_core.atlas.counter import CounterExamples
from sae_core.atlas.fused import fused
from sae_core.atlas.shapes import Ancestor, ExplainedToken, FeatureCard, Fired, Hit, Neighbor, Place
from sae_core.atlas.tables import FILES, Tables
from sae_core.atlas.words import by_words
from sae_core.by_feature import ByFeature
from sae_core.features import Features
from sae_core.generations import served
from sae_core.labels.meaning import Meaning
from sae_core.labels.reader import doubted
from sae_core.mapped import read_through
from sae_core.names import DictionarySpec, Site
from sae_core.word_index import WordIndex

if TYPE_CHECKING:
    from sae_core.dictionary import Dictionary
    from sae_core.language_model import LanguageModel

_BY_FEATURE = ("labels", "neighbors", "map", "steering", "lineage")
"""Tables whose rows are asked for feature by feature."""


class Atlas:
    """What is known of one dictionary's features. Safe to use from several threads."""

    def __init__(self, store: ArtifactStore, dictionary: str) -> None:
        self.store, self.dictionary = served(store, dictionary), dictionary
        self.features = Features.open(self.store.get("features", dictionary).folder)
        self._lock = threading.Lock()
        self._tables = Tables(self.store, dictionary)
        paths = {table: self.store.get(FILES[table][0], dictionary).folder / FILES[table][1]
                 for table in _BY_FEATURE if table in self._tables}  # fmt: skip
        self._files = {table: ByFeature(path) for table, path in paths.items()}
        self._index: WordIndex | None = None
        self._sorted_by: Columns | None = None

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
        return self._beats[feature].as_py() if self._beats is not None else None

    def shown(self, feature: int) -> str:
        """The name as text shows it: marked when the label does not beat its control."""
        return doubted(self.name(feature), self.beats_control(feature))

    def search(
        self, query: str, limit: int = 20, filters: Filters = ALL, sort: str = "relevance", offset: int = 0
    ) -> list[Hit]:
        """Features by words, see `words.by_words`, and by meaning where the labels have an index of it.

        Raises SearchError when the query holds no word.
        """
        found = by_words(self._words(), query, len(self.features))
        if self._meaning:
            found = fused(found, *self._meaning.find(query))
        return self._hits(found, filters, sort, limit, offset)

    def browse(self, limit: int = 20, filters: Filters = ALL, sort: str = "number", offset: int = 0) -> list[Hit]:
        """Features that pass the filters, without a search. Raises SearchError when there is no such order."""
        every = Found(np.arange(len(self.features)), np.zeros(len(self.features)))
        return self._hits(every, filters, sort, limit, offset)

    def multilingual(self, limit: int = 20) -> list[Hit]:
        """Features whose strongest examples are spread most evenly over languages, see `lists.multilingual`."""
        return self._hits(lists.multilingual(self._tables, len(self.features)), limit=limit)

    def newest(self, limit: int = 20) -> list[Hit]:
        """Features that the last retraining brought, most often firing first; none where there was none."""
        found = lists.newest(self._tables, len(self.features))
        return self._hits(found, Filters(alive=True), "density", limit)

    def safety(self, limit: int = 20) -> list[Hit]:
        """The features that the safety audit points to, best first, with the concepts they are for."""
        return self._hits(lists.safety(self._tables, len(self.features)), limit=limit)

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

    def documents_of(self, sources: Collection[str]) -> list[int]:
        """The documents that come from any of the sources; none where that is not known."""
        if self._documents is None or not sources:
            return []
        wanted = pc.is_in(self._documents["source"], pa.array(sorted(sources)))
        return self._documents["document"].filter(wanted).to_pylist()

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
        return self._tables.query(sql, [feature, feature, limit])

    @cached_property
    def has_scores(self) -> bool:
        """Whether some label was scored."""
        return choosing.has_scores(self._tables)

    def open_indexes(self) -> None:
        """Open and read what the first search and the first page would else wait for."""
        self._columns_of_features()
        _ = self._names
        if self._meaning:
            self._meaning.find("a")
        self.counter_examples.prepare()
        there = [stage for stage in ("labels", "neighbors") if self.store.manifest(stage, self.dictionary)]
        folders = [self.store.get(stage, self.dictionary).folder for stage in there]
        read_through(
            [*self._words().folder.iterdir(), *(file for folder in folders for file in folder.glob("*.faiss"))]
        )

    @property
    def has_meaning(self) -> bool:
        """Whether features are found by meaning, too."""
        return self._meaning is not None

    def _hits(
        self, found: Found, filters: Filters = ALL, sort: str = "relevance", limit: int = 20, offset: int = 0
    ) -> list[Hit]:
        """Some of the features that were found, in order."""
        columns = self._columns_of_features()
        return [
            Hit(
                feature=i,
                label=self.name(i),
                score=float(found.total[i]),
                why=found.why(i),
                density=float(columns.density[i]),
                max_act=float(columns.max_act[i]),
                kind=columns.kind[i].as_py() or "",
                label_score=None if np.isnan(columns.label_score[i]) else float(columns.label_score[i]),
                cluster=None if columns.cluster[i] == NOWHERE else int(columns.cluster[i]),
                beats_control=columns.beats_control[i].as_py(),
                meaning=found.meaning.get(i),
            )
            for i in chosen(found, columns, filters, sort, limit, offset)
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
            neighbors=[
                Neighbor(i, self.name(i), cosine, self.beats_control(i))
                for i, cosine in ((n["neighbor"], n["cosine"]) for n in nearest)
            ],
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
                named = [Fired(i, act, self.name(i), self.beats_control(i)) for i, act in fired]
                yield ExplainedToken(token, named, value)

    @cached_property
    def sink_norm(self) -> float:
        """Norm above which a token counted as an attention sink in the harvest."""
        return sink_norm(self.store.get("activations", self.site.slug))

    @cached_property
    def _meaning(self) -> Meaning | None:
        return Meaning.open(self.store.get("labels", self.dictionary).folder) if "labels" in self._tables else None

    @cached_property
    def counter_examples(self) -> CounterExamples:
        """Finds text in which what is said of a feature would mislead."""
        return CounterExamples(self.features, self._meaning)

    @cached_property
    def _names(self) -> pa.Array | None:
        """What every feature is called; None before labels are made."""
        if "labels" not in self._tables:
            return None
        sql = "SELECT coalesce(nullif(label, ''), lexical, '') AS name FROM labels ORDER BY feature"
        return self._tables.arrow(sql)["name"]

    @cached_property
    def _beats(self) -> pa.Array | None:
        """Of every feature, whether its label beats its control; None before labels are made."""
        if "beats_control" not in self._tables.columns("labels"):
            return None
        return self._tables.arrow("SELECT beats_control FROM labels ORDER BY feature")["beats_control"]

    @cached_property
    def _documents(self) -> pa.RecordBatch | None:
        """Where documents come from, by number; None where that is not known."""
        if not {"source", "title", "language"} <= self._tables.columns("documents"):
            return None
        return self._tables.arrow("SELECT document, source, title, language FROM documents ORDER BY document")

    def _words(self) -> WordIndex:
        """The index of all words; made first where it is not there."""
        with self._lock:
            if self._index is None:
                self._index = WordIndex.open(self.store, self.dictionary)
            return self._index

    def _columns_of_features(self) -> Columns:
        with self._lock:
            if self._sorted_by is None:
                self._sorted_by = read_columns(self._tables)
            return self._sorted_by

    def _about(self, feature: int, table: str) -> list[dict[str, Any]]:
        """The feature's rows of a table; none when the table's stage is not made yet."""
        return self._files[table].rows(feature) if table in self._files else []


def sink_norm(harvest: Made) -> float:
    """Norm above which a token counted as an attention sink in a harvest."""
    return float(harvest.manifest.summary["median_norm"] * harvest.manifest.settings["sink_norm"])
