"""Texts that a person gives, read by the model and the dictionary: every feature on every token, or pooled over tokens.

A text is read as the corpus was: in windows of the same length, each a context of its own. Attention sinks (tokens of
an extreme norm, mostly the first) are left out, as they are of training.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32
from scipy import sparse

from sae_core.atlas import Atlas
from sae_core.dictionary import Dictionary
from sae_core.errors import MindAtlasError
from sae_core.language_model import LanguageModel
from sae_core.names import Hook
from sae_core.pretrained import expected_bos
from sae_core.progress import Report, silent

BATCH_TOKENS = 4096
"""Tokens a forward pass, padding included; as many as the harvest takes on a CPU."""


class PromptError(MindAtlasError):
    """Texts that cannot be read or compared."""


class Window(NamedTuple):
    """A stretch of one text that the model sees at once."""

    text: int
    """Which text."""
    start: int
    """Place of its first token in the text."""
    ids: list[int]


class WindowActs(NamedTuple):
    """What the model computes at the site on a window."""

    window: Window
    acts: Float32[torch.Tensor, "tokens d_model"]
    is_sink: Bool[torch.Tensor, " tokens"]


class Pooled(NamedTuple):
    """Features of texts, pooled over their tokens; sinks do not count."""

    max: sparse.csr_array
    """[texts, d_sae], float32: a feature's largest value in the text."""
    mean: sparse.csr_array
    """[texts, d_sae], float32: its mean over all tokens, zeros included."""
    raw: Float32[np.ndarray, "texts d_model"]
    """Mean activation."""
    tokens: np.ndarray
    """Tokens of each text."""
    n_windowed: int
    """Texts longer than the context, which were read in several windows."""

    def rows(self, which: Sequence[int] | np.ndarray) -> "Pooled":
        """Some of the texts."""
        index = np.asarray(which, dtype=np.int64)
        tokens = self.tokens[index]
        return Pooled(self.max[index], self.mean[index], self.raw[index], tokens, self.n_windowed)


def joined(parts: Sequence[Pooled]) -> Pooled:
    """Texts that were pooled apart, in order."""
    most, mean = (sparse.csr_array(sparse.vstack([getattr(p, name) for p in parts])) for name in ("max", "mean"))
    raw, tokens = (np.concatenate([getattr(p, name) for p in parts]) for name in ("raw", "tokens"))
    return Pooled(most, mean, raw, tokens, sum(p.n_windowed for p in parts))


class PromptReader:
    """Reads texts at the site of a dictionary. One model serves one thread at a time."""

    def __init__(
        self, lm: LanguageModel, dictionary: Dictionary, hook: Hook, layer: int, block_tokens: int, sink_norm: float
    ) -> None:
        self.lm, self.dictionary, self.hook, self.layer = lm, dictionary, hook, layer
        self.sink_norm = sink_norm
        bos = expected_bos(lm.tokenizer)
        self.start = [] if bos is None else [bos]
        """What every window begins with, before its text."""
        self.window_tokens = block_tokens - len(self.start)

    @classmethod
    def of(cls, atlas: Atlas, lm: LanguageModel, dictionary: Dictionary | None = None) -> "PromptReader":
        """The reader of an atlas's dictionary, which may be open already.

        Raises ArtifactError when the dictionary or its corpus is gone.
        """
        site = atlas.site
        block_tokens = atlas.store.get("corpus", site.corpus).manifest.settings["block_tokens"]
        dictionary = dictionary or atlas.load_dictionary()
        return cls(lm, dictionary, site.hook, site.layer, block_tokens, atlas.sink_norm)

    def windows(self, texts: Sequence[str]) -> list[Window]:
        """The texts, tokenized and cut. Raises PromptError for a text without a token."""
        found = []
        for number, text in enumerate(texts):
            if not (ids := self._tokens(text)):
                raise PromptError(f"text {number + 1} holds no token: {text!r:.60}; take it out")
            step = self.window_tokens
            found += [Window(number, at, ids[at : at + step]) for at in range(0, len(ids), step)]
        return found

    def ids(self, prompt: str) -> list[int]:
        """One prompt, uncut. Raises PromptError when it holds no token."""
        if not (ids := self._tokens(prompt)):
            raise PromptError(f"the prompt {prompt!r} holds no token: give some text")
        return ids

    def read(self, windows: Sequence[Window]) -> Iterator[list[WindowActs]]:
        """Activations of the windows, a batch at a time, windows of like length together.

        Shorter ones are padded at the end, which in a causal model changes nothing before it.
        """
        order = sorted(windows, key=lambda window: len(window.ids))
        at = 0
        while at < len(order):
            width = len(order[at].ids) + len(self.start)
            stop = at + 1
            while stop < len(order) and (stop + 1 - at) * (len(order[stop].ids) + len(self.start)) <= BATCH_TOKENS:
                stop += 1
            width = len(order[stop - 1].ids) + len(self.start)
            batch = torch.zeros(stop - at, width, dtype=torch.long)
            for row, window in enumerate(order[at:stop]):
                ids = [*self.start, *window.ids]
                batch[row, : len(ids)] = torch.tensor(ids)
            acts = self.lm.capture(self.hook, self.layer, batch).float()
            yield [self._of_window(window, acts[row]) for row, window in enumerate(order[at:stop])]
            at = stop

    def pool(self, texts: Sequence[str], report: Report = silent) -> Pooled:
        """The texts' features, pooled. Memory grows with the texts times L0. Raises PromptError as `windows`."""
        windows = self.windows(texts)
        tokens = np.bincount([w.text for w in windows], [len(w.ids) for w in windows], len(texts)).astype(np.int64)
        raw = np.zeros((len(texts), self.dictionary.d_model), np.float32)
        kept = np.zeros(len(texts))
        parts: list[tuple[np.ndarray, ...]] = []
        done = 0
        for batch in self.read(windows):
            acts = torch.cat([w.acts[~w.is_sink] for w in batch])
            text = np.repeat([w.window.text for w in batch], [int((~w.is_sink).sum()) for w in batch])
            np.add.at(raw, text, acts.cpu().numpy())
            kept += np.bincount(text, minlength=len(texts))
            parts.append(_by_text(self.dictionary, acts, text))
            done += sum(len(w.window.ids) for w in batch)
            report(done, int(tokens.sum()), "tokens")
        largest, total = _matrices(parts, (len(texts), self.dictionary.d_sae))
        scale = 1 / np.maximum(kept, 1)
        mean = sparse.csr_array(sparse.diags_array(scale) @ total).astype(np.float32)
        n_windowed = len({w.text for w in windows if w.start})
        return Pooled(largest, mean, (raw * scale[:, None]).astype(np.float32), tokens, n_windowed)

    def on_tokens(self, text: str, features: Sequence[int]) -> tuple[list[str], Float32[np.ndarray, "tokens features"]]:
        """The tokens of a text, and what some features have on each; nothing on sinks. Raises PromptError."""
        windows = sorted((w for batch in self.read(self.windows([text])) for w in batch), key=lambda w: w.window.start)
        acts = torch.cat([w.acts for w in windows])
        values = self.dictionary.encode(acts.to(self.dictionary.device))[:, list(features)]
        values[torch.cat([w.is_sink for w in windows])] = 0
        strings = self.lm.token_strings([token for w in windows for token in w.window.ids])
        return strings, values.cpu().numpy()

    def _tokens(self, text: str) -> list[int]:
        return list(self.lm.tokenizer(_readable(text), add_special_tokens=False).input_ids)

    def _of_window(self, window: Window, row: torch.Tensor) -> WindowActs:
        first = len(self.start)
        acts = row[first : first + len(window.ids)]
        return WindowActs(window, acts, acts.norm(dim=1) > self.sink_norm)


def _readable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()  # lone surrogates are no text


def _by_text(dictionary: Dictionary, acts: torch.Tensor, text: np.ndarray) -> tuple[np.ndarray, ...]:
    """Key (text and feature in one number), largest value and sum of the firings in each text of a batch."""
    fired = dictionary.encode_sparse(acts.to(dictionary.device))
    value = fired.value.cpu().numpy()
    key, place = np.unique(
        text[fired.row.cpu().numpy()] * dictionary.d_sae + fired.feature.cpu().numpy(), return_inverse=True
    )
    largest = np.zeros(len(key), np.float32)
    np.maximum.at(largest, place, value)
    return key, largest, np.bincount(place, value, len(key))


def _matrices(parts: list[tuple[np.ndarray, ...]], shape: tuple[int, int]) -> tuple[sparse.csr_array, sparse.csr_array]:
    """Largest values and sums as matrices; a text's windows may lie in several parts."""
    key, largest, total = (np.concatenate(part) for part in zip(*parts, strict=True))
    keys, place = np.unique(key, return_inverse=True)
    most = np.zeros(len(keys), np.float32)
    np.maximum.at(most, place, largest)
    where = (keys // shape[1], keys % shape[1])
    sums = np.bincount(place, total, len(keys))
    return sparse.csr_array((most, where), shape), sparse.csr_array((sums, where), shape)
