"""Sparse feature circuits (Marks et al. 2024): which features a behavior rests on, and which of them make which.

Let m be what is explained (a difference of two logits), f_i the activation of a feature where the model is and f'_i
where it is held against: the contrast prompt's at the same token or, where a task has none, the mean over its prompts.

    effect of a node     sum over tokens of  (f_i - f'_i) * W_dec[i] . dm/dx
    effect of an error   sum over tokens of  (error - error') . dm/dx
    weight of u -> d     sum over tokens of  (f_u - f'_u) * W_dec[u] . d/dx_u [ (dm/dx_d . W_dec[d]) * f_d ]

each in the mean over prompts, in logits: above 0 it speaks for the target. A node is a feature, or what a dictionary
misses at its place, over all tokens together: one can then be taken out of any prompt, and prompts need not be aligned.
An edge is the direct effect: what other places between two would pass on is held. Between places of the residual stream
there is therefore none but from one to the next, and, as all that a later layer reads passes there,

    the weights of all edges that leave a node add up to its effect

exactly, errors of later places included (tested). `steps` of integrated gradients take the mean of dm/dx over the way
from the base to x, at one place at a time, in place of its value at x (Marks et al.'s better estimate).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from sae_core.circuits.network import Batch, Network, Place, Seen
from sae_core.progress import Report, silent

ERROR = -1
"""In place of a feature's number: what the dictionary misses."""
OUTPUT = -1
"""In place of a place's number: what is explained."""


class Node(NamedTuple):
    """A feature, or what a dictionary misses, over all tokens."""

    place: int
    """Number of the dictionary, in the order of a forward pass."""
    feature: int
    """`ERROR` for what it misses."""
    effect: float
    """In logits, in the mean over prompts."""
    act: float
    """Mean over prompts of its largest activation; of an error, of its largest norm."""
    prompts: float
    """Share of the prompts in which it fires."""

    @property
    def key(self) -> tuple[int, int]:
        """Its place and feature."""
        return self.place, self.feature


class Edge(NamedTuple):
    """What one node does through another."""

    source: tuple[int, int]
    """Place and feature."""
    target: tuple[int, int]
    """The same; (`OUTPUT`, `OUTPUT`) is what is explained."""
    weight: float


class Means(NamedTuple):
    """Means over prompts at a place, by the distance of a token from the prompt's end; sinks do not count."""

    acts: Float32[Tensor, "longest d_sae"]
    error: Float32[Tensor, "longest d_model"]

    def of(self, length: int) -> "Means":
        """For prompts of a length."""
        return Means(self.acts[-length:], self.error[-length:])


def means(network: Network, batches: Sequence[Batch]) -> list[Means]:
    """What stands at each place in the mean over prompts."""
    longest = max(batch.ids.shape[1] for batch in batches)
    sums: list[list[Tensor]] = []
    for batch in batches:
        short = longest - batch.ids.shape[1]
        for number, seen in enumerate(network.seen(batch)):
            parts = (seen.acts.sum(0), seen.error.sum(0), (~seen.is_sink).sum(0)[:, None])
            padded = [torch.nn.functional.pad(part, (0, 0, short, 0)) for part in parts]
            if number == len(sums):
                sums.append([torch.zeros_like(part) for part in padded])
            sums[number] = [total + part for total, part in zip(sums[number], padded, strict=True)]
    return [Means(acts / count.clamp(min=1), error / count.clamp(min=1)) for acts, error, count in sums]


class Away(NamedTuple):
    """How far a batch is from its base at one place; 0 on sinks of either."""

    acts: Float32[Tensor, "batch length d_sae"]
    error: Float32[Tensor, "batch length d_model"]
    x: Float32[Tensor, "batch length d_model"]


def away(network: Network, batch: Batch, seen: Sequence[Seen], base: Sequence[Means]) -> list[Away]:
    """f - f', error - error' and x - x' at every place."""
    if batch.contrast is not None:
        others = network.seen(batch.other_side)
        parts = [(o.acts, o.error, ~(s.is_sink | o.is_sink)[..., None]) for s, o in zip(seen, others, strict=True)]
    else:
        mean = [one.of(batch.ids.shape[1]) for one in base]
        parts = [(m.acts, m.error, ~s.is_sink[..., None]) for s, m in zip(seen, mean, strict=True)]
    found = []
    for place, s, (acts, error, kept) in zip(network.places, seen, parts, strict=True):
        far, missed = (s.acts - acts) * kept, (s.error - error) * kept
        found.append(Away(far, missed, (far.flatten(0, 1) @ place.dictionary.W_dec).view_as(missed) + missed))
    return found


def gradients(
    network: Network, batch: Batch, far: Sequence[Away], steps: int = 0
) -> list[Float32[Tensor, "batch length d_model"]]:
    """dm/dx at every place; with steps, its mean over so many points (midpoints) between the base and x."""
    if not steps:
        return _slopes(network, batch, lambda number, x: x)
    found = []
    for number in range(len(network.places)):
        total = torch.zeros_like(far[number].x)
        for step in range(steps):
            back = (1 - (step + 0.5) / steps) * far[number].x
            total += _slopes(network, batch, _back(number, back))[number] / steps
        found.append(total)
    return found


def _back(number: int, by: Tensor) -> Callable[[int, Tensor], Tensor]:
    return lambda at, x: x - by if at == number else x


def _slopes(network: Network, batch: Batch, moved: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
    """dm/dx at every place, where x is what `moved` makes of it."""
    kept: list[Tensor] = []

    def keep(number: int, read: Tensor, x: Tensor) -> Tensor:
        x = moved(number, x)
        kept.append(x if x.requires_grad else x.detach().requires_grad_())
        return kept[-1]

    with torch.enable_grad():
        total = network.value(batch, keep).sum()
        return [g.detach() for g in torch.autograd.grad(total, kept)]


class Effects(NamedTuple):
    """Of all features at a place, summed over the prompts seen so far."""

    effect: Float32[Tensor, " d_sae_and_one"]
    """The last one is the error's."""
    act: Float32[Tensor, " d_sae_and_one"]
    fires: Float32[Tensor, " d_sae_and_one"]
    """Prompts in which it fires."""


def effects(
    network: Network, batches: Sequence[Batch], base: Sequence[Means], steps: int = 0, report: Report = silent
) -> list[Effects]:
    """Effect of every feature and error at every place, in the mean over prompts.

    Args:
        network: the model and its dictionaries.
        batches: the prompts.
        base: what prompts without a contrast are held against.
        steps: of integrated gradients; 0: the gradient where the model is.
        report: progress, in prompts.
    """
    sums: list[Effects] = []
    total, done = sum(len(batch.ids) for batch in batches), 0
    for batch in batches:
        seen = network.seen(batch)
        far = away(network, batch, seen, base)
        slopes = gradients(network, batch, far, steps)
        for number, (place, s, f, g) in enumerate(zip(network.places, seen, far, slopes, strict=True)):
            of_features = ((g.flatten(0, 1) @ place.dictionary.W_dec.T).view_as(f.acts) * f.acts).sum((0, 1))
            most, missed = s.acts.abs().amax(1), s.error.norm(dim=2).amax(1)
            new = Effects(
                torch.cat([of_features, (g * f.error).sum()[None]]),
                torch.cat([most.sum(0), missed.sum()[None]]),
                torch.cat([(most != 0).sum(0), (missed > 0).sum()[None]]).float(),
            )
            old = sums[number] if number < len(sums) else None
            sums[number:] = [*([Effects(*map(torch.add, old, new))] if old else [new]), *sums[number + 1 :]]
        done += len(batch.ids)
        report(done, total, "prompts")
    return [Effects(*(part / total for part in one)) for one in sums]


def nodes(found: Sequence[Effects]) -> list[Node]:
    """Every feature that fires and every error, those of the largest effect, of either sign, first."""
    every = []
    for place, one in enumerate(found):
        last = len(one.effect) - 1
        for i in (one.fires > 0).nonzero().squeeze(1).tolist():
            feature = ERROR if i == last else i
            every.append(Node(place, feature, float(one.effect[i]), float(one.act[i]), float(one.fires[i])))
    return sorted(every, key=lambda node: -abs(node.effect))


def edges(
    network: Network, batches: Sequence[Batch], base: Sequence[Means], kept: Sequence[Node], steps: int = 0,
    report: Report = silent,
) -> list[Edge]:  # fmt: skip
    """Direct effects of the kept nodes through one another, and on what is explained; see the module.

    One way back through the model for each node: memory is that of one pass.
    """
    found: dict[tuple[tuple[int, int], tuple[int, int]], float] = {}
    total, done = sum(len(batch.ids) for batch in batches), 0
    for batch in batches:
        seen = network.seen(batch)
        far = away(network, batch, seen, base)
        slopes = gradients(network, batch, far, steps)
        cut = _Cut(network, batch)
        for down in [None, *kept]:
            through = cut.value.sum() if down is None else cut.through(down, seen[down.place], slopes[down.place])
            target = (OUTPUT, OUTPUT) if down is None else (down.place, down.feature)
            for number, g in cut.back(through):
                for up, weight in _weights(network.places[number], far[number], g, number, kept):
                    key = ((up.place, up.feature), target)
                    found[key] = found.get(key, 0.0) + weight / total
            done += 1
            report(done, len(batches) * (len(kept) + 1), "nodes")
    return sorted((Edge(*key, weight) for key, weight in found.items() if weight), key=lambda edge: -abs(edge.weight))


def _weights(place: Place, far: Away, g: Tensor, number: int, kept: Sequence[Node]) -> list[tuple[Node, float]]:
    """What each of the kept nodes of a place does along a gradient, summed over a batch."""
    own = [node for node in kept if node.place == number]
    features = [node.feature for node in own if node.feature != ERROR]
    along = g.flatten(0, 1) @ place.dictionary.W_dec[features].T
    by_feature = dict(zip(features, (along * far.acts[..., features].flatten(0, 1)).sum(0).tolist(), strict=True))
    return [(n, float((g * far.error).sum()) if n.feature == ERROR else by_feature[n.feature]) for n in own]


class _Cut:
    """A pass in which every place hands on a copy that knows nothing of the one before."""

    def __init__(self, network: Network, batch: Batch) -> None:
        self._network = network
        self._leaves: list[Tensor] = []
        self._came: list[tuple[Tensor, Tensor]] = []
        with torch.enable_grad():
            self.value = network.value(batch, self._visit)

    def _visit(self, number: int, read: Tensor, x: Tensor) -> Tensor:
        self._came.append((read, x))
        self._leaves.append(x.detach().requires_grad_())
        return self._leaves[-1]

    def through(self, node: Node, seen: Seen, slope: Float32[Tensor, "batch length d_model"]) -> Float32[Tensor, ""]:
        """What is explained as it hangs on the node alone, which is read off what comes to its place."""
        place = self._network.places[node.place].dictionary
        read, x = self._came[node.place]
        slope = slope * ~seen.is_sink[..., None]
        with torch.enable_grad():
            if node.feature != ERROR:
                return (
                    (read @ place.W_enc[:, node.feature])
                    * _on(seen, node.feature)
                    * (slope @ place.W_dec[node.feature])
                ).sum()
            z = read @ place.W_enc + place.b_enc
            return (x * slope).sum() - (z * (seen.acts != 0) * (slope @ place.W_dec.T)).sum()

    def back(self, through: Float32[Tensor, ""]) -> list[tuple[int, Float32[Tensor, "batch length d_model"]]]:
        """Its gradient at each place that it hangs on."""
        if not through.requires_grad:
            return []
        found = torch.autograd.grad(through, self._leaves, retain_graph=True, allow_unused=True)
        return [(number, g) for number, g in enumerate(found) if g is not None]


def _on(seen: Seen, feature: int) -> Bool[Tensor, "batch length"]:
    """Where a feature fires: there it is linear in what is read."""
    return seen.acts[..., feature] != 0
