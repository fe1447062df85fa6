"""The *levers* test: does the model use a feature, or does it only go along with what the model uses?

On held-out text where the feature fires, it is taken away or doubled, and the loss of the later predictions compared
with that of the model as it is; and with that after the same activations went into a random direction instead.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from sae_core.corpus import Corpus
from sae_core.corpus.packing import kept_apart
from sae_core.progress import Report, silent
from sae_core.steering import Steer, Steering
from sae_core.steering_texts import Subject, bootstrap
from sae_core.study import Packing

_WIDTH = 64
"""Tokens of a window of text."""
_WINDOWS = 8
"""Windows of a feature, those in which it fires most."""
_AT_ONCE = 16


class Lever(NamedTuple):
    """What a change of one feature does to the loss."""

    feature: int
    change: str
    """`ablated`, `doubled`, or `random`: moved as far in a random direction."""
    rise: float
    """Rise of the loss, nats a prediction; mean over windows."""
    low: float
    high: float
    """95% bootstrap interval of that, over windows."""
    n_windows: int


class _Text(NamedTuple):
    ids: Int[Tensor, "windows width"]
    segments: Int[Tensor, "windows width"] | None
    counted: Bool[Tensor, "windows width"]
    """Whether the token is predicted from text of its own document."""

    def some(self, rows: Tensor) -> "_Text":
        return _Text(self.ids[rows], None if self.segments is None else self.segments[rows], self.counted[rows])


def levers(
    subject: Subject, features: Sequence[int], corpus: Path, packing: Packing, tokens: int, seed: int = 0,
    report: Report = silent,
) -> list[Lever]:  # fmt: skip
    """Three rows a feature; none for one that does not fire in the text.

    Args:
        subject: the model and the dictionary.
        features: those that are tested.
        corpus: folder of the finished corpus, whose held-out split is read.
        packing: whether attention restarts at each document.
        tokens: tokens of held-out text that are looked through for firings, at most.
        seed: of the random directions.
        report: progress, in features.
    """
    text = _held_out(corpus, packing, tokens)
    acts = _acts(subject, list(features), text)
    found: list[Lever] = []
    for place, feature in enumerate(features):
        own = acts[:, :, place]
        best = own.sum(1).argsort(descending=True, stable=True)[:_WINDOWS]
        best = best[own[best].sum(1) > 0]
        direction = subject.random_directions(1, seed + feature)
        edits = {
            "ablated": subject.steering([Steer(feature, 0.0, "scale")]),
            "doubled": subject.steering([Steer(feature, 2.0, "scale")]),
            "random": subject.steering([Steer(feature, 2.0, "scale")], directions=direction),
        }
        if len(best):
            later = (own[best] > 0).cumsum(1) > 0  # predictions that the feature can have a part in
            clean = _losses(subject, text.some(best), later, None)
            for change, edit in edits.items():
                rises = (_losses(subject, text.some(best), later, edit) - clean).numpy()
                rises = rises[np.isfinite(rises)]
                if len(rises):
                    found.append(Lever(feature, change, float(rises.mean()), *bootstrap(rises), len(rises)))
        report(place + 1, len(features), "features")
    return found


def _held_out(corpus: Path, packing: Packing, tokens: int) -> _Text:
    """The beginning of the held-out split, in windows."""
    blocks = Corpus.open(corpus).held_out
    width = min(_WIDTH, blocks.token_ids.shape[1])
    n, each = max(1, tokens // width), blocks.token_ids.shape[1] // width

    def windows(column: np.ndarray) -> Tensor:
        cut = column[: -(-n // each), : each * width].reshape(-1, width)
        return torch.from_numpy(np.ascontiguousarray(cut[:n])).long()

    documents = windows(blocks.documents)
    counted = torch.zeros_like(documents, dtype=torch.bool)
    counted[:, 1:] = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0)
    return _Text(windows(blocks.token_ids), kept_apart(documents, packing), counted)


@torch.no_grad()
def _acts(subject: Subject, features: list[int], text: _Text) -> Float[Tensor, "windows width features"]:
    """The features' activations; none on attention sinks."""
    parts = []
    for rows in torch.arange(len(text.ids)).split(_AT_ONCE):
        some = text.some(rows)
        x = subject.lm.capture(subject.site.hook, subject.site.layer, some.ids, some.segments).float()
        acts = subject.dictionary.encode(x.flatten(0, 1))[:, features].view(*x.shape[:2], -1)
        acts[x.norm(dim=-1) > subject.sink_norm] = 0
        parts.append(acts.cpu())
    return torch.cat(parts)


@torch.no_grad()
def _losses(
    subject: Subject, text: _Text, later: Bool[Tensor, "windows width"], edit: Steering | None
) -> Float[Tensor, " windows"]:
    """Mean loss of each window's predictions from tokens of `later`, nats; NaN where it has none."""
    with edit.applied(subject.lm) if edit else nullcontext():
        logits = subject.lm.logits(text.ids, text.segments)[:, :-1].float().cpu()
    loss = cross_entropy(logits.transpose(1, 2), text.ids[:, 1:], reduction="none")
    counted = text.counted[:, 1:] & later[:, :-1]
    return (loss * counted).sum(1) / counted.sum(1)
