"""The sample's windows by how similar they read to other texts: FAISS over embeddings of their texts."""

import threading
from collections.abc import Iterable, Sequence
from functools import cached_property

import faiss

from sae_core.features import Example, Features
from sae_core.features.reader import Sample
from sae_core.labels.scoring.embedding import Embedder, joined
from sae_core.progress import Report, silent

_OVERFETCH = 32  # windows looked at for each example, of which those are taken in which the feature does not fire


class Texts:
    """The sample of a corpus, searched by text. Safe to use from several threads.

    Args:
        source: of the sentence-embedding model, as `labels.embedder`; loaded when something is searched for.
        features: whose sample of the corpus.
        report: progress in bytes, while the model is fetched.
    """

    def __init__(self, source: str, features: Features, report: Report = silent) -> None:
        self.features = features
        self._source, self._report = source, report
        self._lock = threading.Lock()

    @cached_property
    def sample(self) -> Sample:
        return self.features.sample()

    @cached_property
    def embedder(self) -> Embedder:
        return Embedder(self._source, self._report)

    @cached_property
    def _index(self) -> faiss.IndexFlatIP:
        windows = self.embedder.texts([joined(tokens) for tokens in self.sample.tokens])
        index = faiss.IndexFlatIP(windows.shape[1])
        index.add(windows)
        return index

    def nearest(self, examples: Sequence[Example]) -> Iterable[int]:
        """The nearest window of each example, then the second nearest of each, and so on."""
        with self._lock:
            texts = self.embedder.texts([joined(example.tokens) for example in examples])
            count = min(_OVERFETCH, self._index.ntotal)
            return self._index.search(texts, count)[1].T.ravel().tolist()

    def silent(self, feature: int, examples: Sequence[Example], count: int) -> list[Example]:
        """At most `count` windows nearest to the examples in which the feature does not fire at all, nearest first.

        They are shown around the place where the first example has its peak.
        """
        if not count or not examples:
            return []
        fires = self.sample.acts(feature).keys()
        windows = [window for window in dict.fromkeys(self.nearest(examples)) if window not in fires]
        found = []
        for window in windows[:count]:
            tokens, peak = self.sample.tokens[window], examples[0].peak
            place = min(peak, len(tokens) - 1)
            document = self.sample.documents[window]
            found.append(Example(feature, 0, "silent", 0.0, document, 0, place, tokens, [0.0] * len(tokens)))
        return found
