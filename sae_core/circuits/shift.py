"""SHIFT (Marks et al. 2024, 4): take out of a classifier what should not matter to it, without data that shows what.

A linear probe on a model's activations is trained on texts in which a cue goes with the label every time. Its circuit
is found (`graph.effects`, on the logit of the right label); features in it that stand for the cue are named, by hand or
by words of their labels, and set to 0 wherever the model reads. The probe is measured on texts in which cue and label
are independent: how often it is right, how often it says what the cue says, and how it does in the worst of the groups.

Beside it: as many features of the circuit at random; as many coordinates of x at the same places, by their effect when
the cue is exchanged, at their means; features by that same effect (which wants texts with the cue exchanged, as SHIFT
does not); the words of the cue taken out of the texts; and a probe trained on texts without the correlation.
"""

import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32
from pydantic import Field
from torch import Tensor

from sae_core.circuits.ablate import DRAWS, HeldOut, without
from sae_core.circuits.faithfulness import coordinates
from sae_core.circuits.graph import ERROR, Node, effects, means, nodes
from sae_core.circuits.network import Batch, CircuitError, Network, Place, Visit
from sae_core.pretrained import expected_bos
from sae_core.progress import Report, silent
from sae_core.settings import Settings
from sae_core.toml_files import read_toml

BIOGRAPHIES = Path(__file__).with_name("biographies.toml")
EACH = 32
"""Texts of each group: of a label, and of a cue."""
_LAST = 2
"""In `names` and `words`: what takes the cue out."""


class Sentences(Settings):
    """What a text is made of."""

    professor: list[str] = Field(min_length=1)
    nurse: list[str] = Field(min_length=1)
    filler: list[str] = Field(min_length=1)


class Biographies(Settings):
    """Texts with a label and a cue."""

    name: str
    description: str
    license: str
    labels: tuple[str, str]
    cues: tuple[str, str]
    keywords: list[str]
    names: tuple[list[str], list[str], list[str]]
    words: tuple[tuple[str, str, str], tuple[str, str, str], tuple[str, str, str]]
    find: Sentences
    test: Sentences


class Text(NamedTuple):
    """One text."""

    text: str
    twin: str
    """The same with the other cue."""
    plain: str
    """The same without a cue."""
    label: int
    cue: int


class Score(NamedTuple):
    """How a probe does on texts in which cue and label are independent."""

    how: str
    label: float
    """Share of the texts of which it says the label."""
    cue: float
    """Share of which it says what the cue says."""
    worst: float
    """Share right in the worst of the four groups."""
    features: int
    """That are taken out."""
    loss: float | None
    """By how much the loss on held-out text rises, nats a token; None where nothing is taken out of the model."""


def load_biographies(path: Path = BIOGRAPHIES) -> Biographies:
    """Read and check the file. Raises CircuitError."""
    return read_toml(path, Biographies, CircuitError)


def write_texts(made_of: Biographies, part: str, groups: Sequence[tuple[int, int]], each: int, seed: int) -> list[Text]:
    """`each` texts of every group (label, cue): a sentence of the label, then two that say nothing of it."""
    rng, sentences, found = np.random.default_rng(seed), getattr(made_of, part), []
    for label, cue in groups:
        own: list[str] = getattr(sentences, ("professor", "nurse")[label])
        half = len(made_of.names[cue]) // 2
        names = [some[:half] if part == "find" else some[half:] for some in made_of.names[:_LAST]]
        for number in range(each):
            fillers = rng.choice(sentences.filler, 2, replace=False)
            body = " ".join((own[number % len(own)], *fillers))
            which = int(rng.integers(half))
            chosen = [names[0][which], names[1][which], made_of.names[_LAST][0]]
            versions = [_fill(body, name, *words) for name, words in zip(chosen, made_of.words, strict=True)]
            found.append(Text(versions[cue], versions[1 - cue], versions[_LAST], label, cue))
    return found


def _fill(body: str, name: str, They: str, they: str, their: str) -> str:
    return body.format(name=name, They=They, they=they, their=their)


class Probe(NamedTuple):
    """A linear classifier of pooled activations."""

    weight: Float32[Tensor, " d_model"]
    bias: float

    @classmethod
    def train(cls, x: Float32[Tensor, "texts d_model"], labels: Sequence[int]) -> "Probe":
        """Logistic regression with an L2 penalty (C = 1) on standardized coordinates."""
        from sklearn.linear_model import LogisticRegression

        mean, scale = x.mean(0), x.std(0).clamp(min=1e-6)
        fitted = LogisticRegression(max_iter=2000).fit(((x - mean) / scale).cpu().numpy(), list(labels))
        weight = torch.tensor(fitted.coef_[0], dtype=torch.float32, device=x.device) / scale
        return cls(weight, float(fitted.intercept_[0]) - float(mean @ weight))

    def says(self, x: Float32[Tensor, "texts d_model"]) -> np.ndarray:
        """The label of each."""
        return (x @ self.weight + self.bias > 0).long().cpu().numpy()


class _Read(Exception):
    """Ends a pass at the site that the probe reads."""


class Probed(Network):
    """A model whose behavior is a probe's logit of the right label, which is `Batch.target`.

    The probe reads the last of the places: the mean over tokens that are no sinks.
    """

    def __init__(self, network: Network, probe: Probe | None = None) -> None:
        super().__init__(network.lm, network.places)
        self.probe = probe

    def with_places(self, places: Sequence[Place]) -> "Probed":
        """The same probe with other dictionaries."""
        return Probed(Network(self.lm, places), self.probe)

    def pooled(self, batch: Batch, visit: Visit | None = None) -> Float32[Tensor, "batch d_model"]:
        """What the probe reads; differentiable in what `visit` puts in."""
        last, found = self.places[-1], []

        def read(x: Tensor) -> Tensor:
            found.append(x.float())
            raise _Read

        with self.visited(visit), suppress(_Read), self.lm.edit(*last.acts_at, read):
            self.lm.last_logits(batch.ids)
        kept = (found[0].detach().norm(dim=-1) <= last.sink_norm)[..., None]
        return (found[0] * kept).sum(1) / kept.sum(1).clamp(min=1)

    def value(self, batch: Batch, visit: Visit | None = None) -> Float32[Tensor, " batch"]:
        """The probe's logit, turned to the right label."""
        x = self.pooled(batch, visit)
        if self.probe is None:
            return x.sum(1)
        return (x @ self.probe.weight + self.probe.bias) * (2 * batch.target - 1)


class Shift:
    """A probe with a spurious cue on one model, its circuit, and what becomes of it without some features.

    Attributes:
        found: features and errors by their effect on the probe, the largest first; `kept` of them are its circuit.
        by_cue: the same by the effect of exchanging the cue.
    """

    def __init__(
        self, network: Network, corpus: Path, made_of: Biographies, kept: int = 100, seed: int = 0, each: int = EACH,
        report: Report = silent,
    ) -> None:  # fmt: skip
        """Write the texts, train the probe and find its circuit."""
        self.made_of, self.seed, self._text = made_of, seed, HeldOut(network, corpus)
        self._plain = Probed(network)
        ambiguous, every = [(0, 0), (1, 1)], [(0, 0), (0, 1), (1, 0), (1, 1)]
        self.train = write_texts(made_of, "find", ambiguous, 2 * each, seed)
        self.balanced = write_texts(made_of, "find", every, each, seed + 1)
        self.test = write_texts(made_of, "test", every, each, seed + 2)
        self._labels = [text.label for text in self.train]
        self.probe = Probe.train(self.read(self.train), self._labels)
        self.network = Probed(network, self.probe)
        some = [text for label in (0, 1) for text in [t for t in self.train if t.label == label][:each]]
        batches = self._batches(some)
        self._mean = means(self.network, batches)
        self.found = nodes(effects(self.network, batches, self._mean, report=report))
        self.circuit = self.found[:kept]
        self._twins = self._batches(some, twins=True)
        self.by_cue = nodes(effects(self.network, self._twins, self._mean, report=report))

    def read(
        self, texts: Sequence[Text], visit: Visit | None = None, version: str = "text"
    ) -> Float32[Tensor, "texts d_model"]:
        """What a probe reads of each text."""
        rows = [(self._ids(getattr(text, version)), None, text.label, i) for i, text in enumerate(texts)]
        found = torch.zeros(len(texts), self._plain.lm.d_model, device=self._plain.lm.device)
        with torch.no_grad():
            for batch in self._plain.batches(rows):
                found[batch.against] = self._plain.pooled(batch, visit)
        return found

    def labeled(self, labels: dict[tuple[int, int], str], keywords: Sequence[str] = ()) -> list[Node]:
        """Features of the circuit whose labels hold one of some words (default: those of the texts' cue)."""
        words = "|".join(map(re.escape, keywords or self.made_of.keywords))
        holds = re.compile(rf"(?<!\w)({words})(?!\w)", re.IGNORECASE)
        return self.of_circuit({key for key, label in self.names_of(labels).items() if holds.search(label)})

    def names_of(self, labels: dict[tuple[int, int], str]) -> dict[tuple[int, int], str]:
        """The labels of the circuit's features; empty where there is none."""
        keys = [(n.place, n.feature) for n in self.circuit if n.feature != ERROR]
        return {key: labels.get(key, "") for key in keys}

    def of_circuit(self, keys: Collection[tuple[int, int]]) -> list[Node]:
        """Those of the circuit's features, the largest effect first."""
        return [node for node in self.circuit if (node.place, node.feature) in keys]

    def named(self, features: Sequence[tuple[int, int]]) -> list[Node]:
        """Features by layer and number. Raises CircuitError when there is no such one."""
        layers = {place.acts_at[1]: number for number, place in enumerate(self.network.places)}
        known = {(node.place, node.feature): node for node in self.found}
        chosen = []
        for layer, feature in features:
            if layer not in layers or not 0 <= feature < self.network.places[layers[layer]].dictionary.d_sae:
                told = ", ".join(map(str, sorted(layers)))
                raise CircuitError(f"there is no feature {layer}:{feature}: layers before the probe are {told}")
            chosen.append(known.get((layers[layer], feature)) or Node(layers[layer], feature, 0.0, 0.0, 0.0))
        return chosen

    def measure(self, chosen: dict[str, list[Node]]) -> list[Score]:
        """Every way of choosing features, and all that stands beside it; random ones are as many as the first has."""
        scores = [self._score("as trained", self.probe, self.read(self.test), 0)]
        for how, features in chosen.items():
            visit = self.without(features)
            loss = self.loss(features) if features else 0.0
            x = self.read(self.test, visit)
            scores.append(self._score(how, self.probe, x, len(features), loss))
            again = Probe.train(self.read(self.train, visit), self._labels)
            scores.append(self._score(f"{how}, trained again", again, x, len(features), loss))
        count = len(next(iter(chosen.values())))
        scores += [self._at_random(count), self._neurons(count)]
        plain = Probe.train(self.read(self.train, version="plain"), self._labels)
        scores.append(self._score("words of the cue taken out", plain, self.read(self.test, version="plain"), 0))
        oracle = Probe.train(self.read(self.balanced), [text.label for text in self.balanced])
        return [*scores, self._score("oracle: trained on balanced texts", oracle, self.read(self.test), 0)]

    def without(self, features: Sequence[Node]) -> Visit:
        """The model with features at 0, wherever they fire but on sinks."""
        return without(self.network, [node.key for node in features])

    def loss(self, features: Sequence[Node]) -> float:
        """By how much the loss on held-out text rises without some features, nats a token."""
        return self._text.loss(self.without(features)) - self._clean_loss

    @cached_property
    def _clean_loss(self) -> float:
        return self._text.loss()

    def _at_random(self, count: int) -> Score:
        rng, drawn = np.random.default_rng(self.seed), []
        pool = [node for node in self.circuit if node.feature != ERROR]
        for _ in range(DRAWS):
            some = [pool[i] for i in rng.choice(len(pool), min(count, len(pool)), replace=False)]
            drawn.append(self._score("", self.probe, self.read(self.test, self.without(some)), count))
        label, cue, worst = (float(np.mean([getattr(s, name) for s in drawn])) for name in ("label", "cue", "worst"))
        return Score(f"features of the circuit at random, {DRAWS} draws", label, cue, worst, count, None)

    def _neurons(self, count: int) -> Score:
        """As many coordinates, by their effect when the cue is exchanged, put to their means."""
        network = self.network.with_places([coordinates(place) for place in self.network.places])
        mean = means(network, self._twins)
        best = [node for node in nodes(effects(network, self._twins, mean)) if node.feature != ERROR][:count]
        by_place: dict[int, list[int]] = {}
        for node in best:
            by_place.setdefault(node.place, []).append(node.feature)

        def put(number: int, read: Tensor, x: Tensor) -> Tensor:
            if not (own := by_place.get(number)):
                return x
            x, level = x.clone(), mean[number].acts[:, own].mean(0)
            kept = (read.norm(dim=-1) <= self.network.places[number].sink_norm)[..., None]
            x[..., own] = torch.where(kept, level, x[..., own])
            return x

        return self._score("neurons, by exchanging the cue", self.probe, self.read(self.test, put), len(best))

    def _score(self, how: str, probe: Probe, x: Tensor, count: int, loss: float | None = None) -> Score:
        said = probe.says(x)
        label, cue = (np.array([getattr(text, name) for text in self.test]) for name in ("label", "cue"))
        groups = [said[(label == a) & (cue == b)] == a for a in (0, 1) for b in (0, 1)]
        worst = min(float(group.mean()) for group in groups)
        return Score(how, float((said == label).mean()), float((said == cue).mean()), worst, count, loss)

    def _ids(self, text: str) -> list[int]:
        tokenizer = self._plain.lm.tokenizer
        bos = expected_bos(tokenizer)
        return [*([] if bos is None else [bos]), *tokenizer(text, add_special_tokens=False).input_ids]

    def _batches(self, texts: Sequence[Text], twins: bool = False) -> list[Batch]:
        """Texts with their labels; with `twins`, those whose twin has as many tokens, held against it."""
        rows = []
        for text in texts:
            ids, other = self._ids(text.text), self._ids(text.twin) if twins else None
            if other is None or len(other) == len(ids):
                rows.append((ids, other, text.label, 0))
        if not rows:
            raise CircuitError("no text has as many tokens as its twin: give names and words of one token each")
        return list(self._plain.batches(rows))
