"""How much of a behavior a circuit has, alone, and how much is left without it.

    F(C) = (m(C) - m(nothing)) / (m(everything) - m(nothing))

m is the mean over prompts of what is explained; m(C) that of the model in which, at every place in turn, what is not in
C is put to its mean over the task's prompts (by distance from the prompt's end), and what is in C keeps the value that
it comes to have. *Nothing* has all features and errors at their means, *everything* is the model as it is: so F is 0
and 1 there. *Faithfulness* is F(C), *completeness* what F(everything but C) falls to (Marks et al. 2024, 3.3).

A dictionary's error is a node like others: in C, it is what the dictionary misses of what comes to it; else its mean.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from sae_core.circuits.graph import ERROR, Means, Node, effects, means, nodes
from sae_core.circuits.network import Batch, Coordinates, Network, Place
from sae_core.progress import Report, silent

DRAWS = 3
"""Random circuits of each size."""

Keys = set[tuple[int, int]]
"""Nodes: place and feature."""


class Kept(NamedTuple):
    """What a circuit keeps at a place."""

    features: Bool[Tensor, " d_sae"]
    error: bool


class Point(NamedTuple):
    """One circuit's faithfulness."""

    kind: str
    """`circuit`: the nodes of the largest effects; `without`: everything but these; `random`: as many, the same errors
    among them, features drawn at random of those that fire; `features`: the features of the largest effects, all
    errors at their means; `random_features`: as many at random; `neurons`, `without_neurons`: coordinates of x at the
    same places in place of features."""
    nodes: int
    faithfulness: float
    low: float
    """Of several draws, the lowest."""
    high: float


class Runner:
    """Runs circuits on prompts."""

    def __init__(self, network: Network, batches: Sequence[Batch], mean: Sequence[Means]) -> None:
        self._network, self._batches, self._mean = network, batches, mean
        self._sinks = [[seen.is_sink for seen in network.seen(batch)] for batch in batches]
        self.full = self.value(self.kept(set(), everything=True))
        self.empty = self.value(self.kept(set()))

    def faithfulness(self, keys: Keys, everything_but: bool = False) -> float:
        """F of some nodes, or of everything but these."""
        between = self.full - self.empty
        return (self.value(self.kept(keys, everything_but)) - self.empty) / between if between else float("nan")

    def kept(self, keys: Keys, everything: bool = False) -> list[Kept]:
        """What a circuit keeps; with `everything`, all but its nodes."""
        found = []
        for number, place in enumerate(self._network.places):
            features = torch.full((place.dictionary.d_sae,), everything, device=self._network.lm.device)
            features[[feature for at, feature in keys if at == number and feature != ERROR]] = not everything
            found.append(Kept(features, ((number, ERROR) in keys) != everything))
        return found

    @torch.no_grad()
    def value(self, kept: Sequence[Kept]) -> float:
        """m of a circuit."""
        total = 0.0
        for batch, sinks in zip(self._batches, self._sinks, strict=True):

            def keep(number: int, read: Tensor, x: Tensor, sinks: list[Tensor] = sinks) -> Tensor:
                place, mean = self._network.places[number], self._mean[number].of(x.shape[1])
                acts, error = place.split(read, x)
                made = place.decode(torch.where(kept[number].features, acts, mean.acts))
                made = made + (error if kept[number].error else mean.error)
                return torch.where(sinks[number][..., None], x, made)

            total += float(self._network.value(batch, keep).double().sum())
        return total / sum(len(batch.ids) for batch in self._batches)


def curve(
    network: Network, find: Sequence[Batch], test: Sequence[Batch], found: Sequence[Node], kept: int = 0,
    steps: int = 0, seed: int = 0, report: Report = silent,
) -> tuple[list[Point], dict[str, float]]:  # fmt: skip
    """Faithfulness and completeness at 1, 4, 16 and so on nodes, and at all, beside random features and neurons.

    Args:
        network: the model and its dictionaries.
        find: prompts on which effects were found.
        test: other prompts, on which circuits are run.
        found: all nodes, the largest effect first.
        kept: a size that is measured besides.
        steps: of integrated gradients, by which neurons are ranked.
        seed: of the random features.
        report: progress, in circuits.

    Returns the points, and `full` and `empty`: m of both ends.
    """
    both = [*find, *test]
    runner = Runner(network, test, means(network, both))
    neurons = network.with_places([coordinates(place) for place in network.places])
    neuron_means = means(neurons, both)
    neuron_runner = Runner(neurons, test, neuron_means)
    by_effect = nodes(effects(neurons, find, neuron_means, steps))
    ranked, rng = [node.key for node in found], np.random.default_rng(seed)
    features = [key for key in ranked if key[1] != ERROR]
    others = [node.key for node in by_effect if node.feature != ERROR]
    points = [Point("circuit", 0, 0.0, 0.0, 0.0), Point("without", 0, 1.0, 1.0, 1.0)]
    sizes = sorted({*_sizes(max(len(ranked), len(others))), len(ranked), len(others), kept} - {0})
    for done, n in enumerate(sizes, 1):
        if n <= len(ranked):
            top = set(ranked[:n])
            errors = {key for key in top if key[1] == ERROR}
            points += [_point("circuit", n, [runner.faithfulness(top)])]
            points += [_point("without", n, [runner.faithfulness(top, everything_but=True)])]
            drawn = [errors | _draw(features, n - len(errors), rng) for _ in range(DRAWS)]
            points += [_point("random", n, [runner.faithfulness(keys) for keys in drawn])]
        if n <= len(features):
            points += [_point("features", n, [runner.faithfulness(set(features[:n]))])]
            drawn = [_draw(features, n, rng) for _ in range(DRAWS)]
            points += [_point("random_features", n, [runner.faithfulness(keys) for keys in drawn])]
        if n <= len(others):
            top = set(others[:n])
            points += [_point("neurons", n, [neuron_runner.faithfulness(top)])]
            points += [_point("without_neurons", n, [neuron_runner.faithfulness(top, everything_but=True)])]
        report(done, len(sizes), "sizes")
    errors = {key for key in ranked if key[1] == ERROR}
    ends = {"full": runner.full, "empty": runner.empty, "errors_alone": runner.faithfulness(errors)}
    return points, ends | {"features_alone": runner.faithfulness(set(features))}


def coordinates(place: Place) -> Place:
    """The same place with the coordinates of x for features: neurons; a transcoder's are where it writes."""
    one = Coordinates(place.dictionary.W_dec.shape[1], place.dictionary.W_dec.device)
    return Place(place.name, place.acts_at, one, float("inf") if place.writes else place.sink_norm)


def _sizes(most: int) -> list[int]:
    """1, 4, 16 and so on, below the most."""
    return [4**i for i in range(most.bit_length()) if 4**i < most]


def _point(kind: str, n: int, values: list[float]) -> Point:
    return Point(kind, n, float(np.mean(values)), min(values), max(values))


def _draw(of: Sequence[tuple[int, int]], n: int, rng: np.random.Generator) -> Keys:
    return {of[i] for i in rng.choice(len(of), min(n, len(of)), replace=False)}
