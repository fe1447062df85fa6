"""What the claims are judged by: the sweep's dictionaries, their controls, and everything measured of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sae_core.activations import Activations
from sae_core.corpus import Corpus
from sae_core.corpus.packing import Blocks
from sae_core.dictionary import Dictionary
from sae_core.display import display_strings
from sae_core.language_model import LanguageModel
from sae_core.pretrained import load_tokenizer
from sae_core.progress import Report
from sae_core.science.coverage import (
    BREAK_EVEN,
    Concept,
    Logistic,
    Proxy,
    best_feature,
    concept_lists,
    kinds_of_text,
    likelihood_ratio,
    logistic,
    occurrences,
    proxy,
)
from sae_core.science.firings import Firings, Sample, principal_directions, random_directions, top_tokens
from sae_core.science.formal import Found, formal_kinds
from sae_core.science.kinship import Kin, Universality, kin, tree, universality
from sae_core.science.letters import Absorption, Probe, Words, absorption, probe, words
from sae_core.science.neurons import Alike, Neurons, neurons
from sae_core.science.reading import Reading, read_units, shown
from sae_core.science.scaling import REPORT as SWEEP
from sae_core.science.scaling import Scaling, held_out, train_sweep
from sae_core.science.seeds import Twins, by_architecture
from sae_core.science.shuffled import Control, shuffled_control
from sae_core.science.specificity import Rated, rated
from sae_core.study import ActivationSettings, DictionarySettings, LabelSettings, ModelSettings, ScienceSettings

SHOWN = 6
"""Units of each basis whose strongest tokens are shown."""


class Given(NamedTuple):
    """What a site's findings are made from."""

    model: ModelSettings
    site: ActivationSettings
    scaling: Path
    """Folder of the site's finished sweep."""
    activations: Path
    corpus: Path
    labels: LabelSettings
    """Who is asked, where a judge is wanted."""


class Covered(NamedTuple):
    """What one dictionary has features of."""

    name: str
    alive: int
    has: list[bool]
    """Of each concept."""
    fit: Logistic


class Bases(NamedTuple):
    """Features beside neurons and other directions, all on the same tokens."""

    readings: list[Reading]
    """Features, neurons, random directions, principal ones."""
    shown: list[list[str]]
    """Of some units of each, the tokens among the strongest."""
    tokens: int
    layers: int
    """Whose neurons the features are held against."""
    neurons: int
    """Of them all."""
    alike: list[Alike]
    """Features, random directions, and features on other tokens, with the most similar neuron."""


class Letters(NamedTuple):
    """First letters."""

    told: Probe
    told_by_chance: Probe
    """Of letters that were dealt out to the words anew."""
    found: list[Absorption]
    """Dictionaries, smallest first; then random directions."""


@dataclass(frozen=True)
class Findings:
    """Everything that the table and the pictures are made from."""

    scaling: Scaling
    universality: Universality
    twins: int
    """d_sae of the two seeds."""
    by_architecture: list[Twins]
    kin: list[Kin]
    kin_random: list[Kin]
    """The larger ones held against random directions in place of the smaller."""
    concepts: list[Concept]
    tokens: int
    """Of the sample."""
    covered: list[Covered]
    """Dictionaries, smallest first; then random directions, then principal ones."""
    bases: Bases | None
    """None when it was not asked for."""
    control: Control | None
    """Likewise."""
    letters: Letters
    proxies: list[tuple[Proxy, Proxy]]
    """Each kind of text: the largest dictionary's, and that of random directions."""
    formal: list[Found]
    rated: Rated | None
    """None when no judge was asked."""
    family: list[str]
    """The largest families, as `kinship.tree` draws them."""

    @property
    def frequency(self) -> np.ndarray:
        """Of each concept, as a share of the tokens."""
        return np.array([len(concept.rows) for concept in self.concepts]) / self.tokens


class Measuring:
    """The sample and the sweep's dictionaries on it.

    Args:
        settings: how much of the text, and what of it is looked at.
        given: the site.
        scratch: folder for what is trained, and for the shuffled model.
        device: where models run and dictionaries are trained.
        report: told of its steps.
    """

    def __init__(
        self, settings: ScienceSettings, given: Given, scratch: Path, device: str, report: Report
    ) -> None:  # fmt: skip
        self.settings, self.given, self.scratch, self.device, self.report = settings, given, scratch, device, report
        self.swept = Scaling.open(given.scaling / SWEEP)
        self.sizes, self.seed = self.swept.settings.d_sae, settings.seed
        self.dictionaries = {d_sae: Dictionary.load(given.scaling / f"w{d_sae}") for d_sae in self.sizes}
        self.sample = Sample.of(given.activations, settings.tokens)
        self.corpus = Corpus.open(given.corpus)
        self.blocks: Blocks = self.corpus.train
        self.tokenizer = load_tokenizer(given.model)
        self.strings = display_strings(
            self.tokenizer, int(max(self.blocks.token_ids.max() + 1, len(self.tokenizer)))
        )  # fmt: skip
        k = self.k = self.swept.base.k or 1  # the sweep lets nothing else through
        self.firings = {d_sae: Firings.of(one, self.sample) for d_sae, one in self.dictionaries.items()}
        self.random = {d_sae: random_directions(d_sae, k, self.sample, self.seed) for d_sae in self.sizes}
        self.random_firings = {d_sae: Firings.of(one, self.sample) for d_sae, one in self.random.items()}
        self.principal = Firings.of(principal_directions(k, self.sample), self.sample)
        self.twins = settings.twins if settings.twins in self.sizes else self.sizes[-2]

    def findings(self) -> Findings:
        """All of them."""
        related = [self._kin(self.dictionaries, self.firings, a, b) for a, b in pairwise(self.sizes)]
        by_chance = [self._kin(self.random, self.random_firings, a, b) for a, b in pairwise(self.sizes)]
        concepts = occurrences(concept_lists(), self.sample, self.blocks, self.tokenizer, self.strings)
        firings = {f"{d_sae} features": one for d_sae, one in self.firings.items()}
        firings |= {f"{self.sizes[-1]} random directions": self.random_firings[self.sizes[-1]]}
        firings |= {"principal directions": self.principal}
        return Findings(
            self.swept, self.universality(), self.twins, self.by_architecture(), related, by_chance, concepts,
            len(self.sample.token), [_covered(name, one, concepts, self.sample) for name, one in firings.items()],
            self.bases() if self.settings.neuron_tokens else None,
            self.control() if self.settings.control_tokens else None,
            self.letters(), self.proxies(), self.formal(), self.rated() if self.settings.judged else None,
            self.family(related),
        )  # fmt: skip

    def _kin(self, smaller: dict[int, Dictionary], firings: dict[int, Firings], a: int, b: int) -> Kin:
        return kin(smaller[a], self.dictionaries[b], (firings[a], self.firings[b]))

    def universality(self) -> Universality:
        """Of one of the sweep's longest runs, made again from another seed."""
        run = max((run for run in self.swept.grid if run.d_sae == self.twins), key=lambda run: run.tokens)
        wanted = self._settings(self.twins, run.tokens, self.swept.settings.seed + 1)
        activations = self.given.activations
        x = held_out(
            Activations.open(activations, "held_out", self.device), self.swept.settings.evaluation_tokens
        )  # fmt: skip
        source = Activations.open(activations, device=self.device)
        ((_, _, other),) = train_sweep([wanted], source, x, self.scratch, self.device, self.report)
        one, random = self.twins, self.random[self.twins]
        firings = self.firings[one], Firings.of(other, self.sample), self.random_firings[one]
        return universality(self.dictionaries[one], other, random, firings)

    def by_architecture(self) -> list[Twins]:
        """Two seeds of each architecture, after as many activations as the middle of the sweep."""
        base = self._settings(self.twins, self._middle, self.swept.settings.seed)
        return by_architecture(
            self.settings.architectures, base, self.given.activations, self.sample, self.scratch, self.device,
            self.report, self.seed,
        )  # fmt: skip

    def bases(self) -> Bases:
        """The largest dictionary beside neurons and directions."""
        rows = self.sample.whole_blocks(self.settings.neuron_tokens, self.seed)
        sample, largest = self.sample.at(rows), self.sizes[-1]
        features, random, principal = (
            one.at(rows) for one in (self.firings[largest], self.random_firings[largest], self.principal)
        )
        lm = LanguageModel.load(self.given.model, self.device, self.given.site.precision)
        found: Neurons = neurons(
            lm, self.given.site, sample, self.blocks, features, random, self.k, self.settings.neuron_features,
            self.seed, self.report,
        )  # fmt: skip
        named = {
            f"{largest} features": features, "neurons": found.firings, f"{largest} random directions": random,
            "principal directions": principal,
        }  # fmt: skip
        return Bases(
            [read_units(name, one, sample, self.strings) for name, one in named.items()],
            [list(shown(one, sample, self.strings, SHOWN, self.seed)) for one in named.values()],
            len(rows), found.layers, found.number, [found.features, found.random, found.shuffled],
        )  # fmt: skip

    def control(self) -> Control:
        """The second largest size on the model with shuffled weights."""
        wanted = self._settings(self.sizes[-2], self._middle, self.swept.settings.seed)
        return shuffled_control(
            wanted, self.given.model, self.given.site, self.given.activations, self.given.corpus,
            self.settings.control_tokens, self.strings, self.scratch / "control", self.device, self.report, self.seed,
        )  # fmt: skip

    def letters(self) -> Letters:
        """First letters in every size, and in random directions."""
        found = words(self.sample, self.strings, self.seed)
        x = self.sample.acts[found.rows]
        told = probe(x, found)
        largest = self.sizes[-1]
        named = [(f"{n} features", self.dictionaries[n], self.firings[n]) for n in self.sizes]
        named += [(f"{largest} random directions", self.random[largest], self.random_firings[largest])]
        return Letters(
            told, probe(x, _dealt(found, self.sample, self.seed)),
            [absorption(name, one, firings, x, found, told) for name, one, firings in named],
        )  # fmt: skip

    def proxies(self) -> list[tuple[Proxy, Proxy]]:
        """Languages and kinds of document."""
        kinds = kinds_of_text(self.sample, self.blocks, self.corpus.documents(), self.settings.kind_least)
        found = []
        for kind, inside in kinds:
            ratio = likelihood_ratio(inside, self.sample, self.blocks, len(self.strings))
            of_features, of_chance = (
                proxy(kind, inside, ratio, one[self.sizes[-1]]) for one in (self.firings, self.random_firings)
            )
            found.append((of_features, of_chance))
        return found

    def formal(self) -> list[Found]:
        """Text of formal meaning."""
        firings = self.firings[self.sizes[-1]], self.random_firings[self.sizes[-1]]
        return list(formal_kinds(self.sample, self.blocks, self.strings, *firings))

    def rated(self) -> Rated:
        """Names of some features of the largest dictionary, by a judge."""
        given, largest = self.given, self.given.scaling / f"w{self.sizes[-1]}"
        return rated(
            given.labels, self.settings.judged, given.model, given.corpus, given.activations, largest,
            self.scratch / "rated", self.device, self.report,
        )  # fmt: skip

    def family(self, related: Sequence[Kin]) -> list[str]:
        """The largest families."""

        def tokens(one: Firings, feature: int) -> str:
            return " ".join(top_tokens(one, feature, self.sample, self.strings)[:4])

        names = {d_sae: [tokens(one, i) for i in range(d_sae)] for d_sae, one in self.firings.items()}
        return tree(related, names, self.settings.families)

    @property
    def _middle(self) -> int:
        """Activations of a run at the middle of the sweep."""
        return self.swept.settings.tokens[len(self.swept.settings.tokens) // 2]

    def _settings(self, d_sae: int, tokens: int, seed: int) -> DictionarySettings:
        """As the sweep trains that size."""
        lr = next(run.lr for run in self.swept.grid if run.d_sae == d_sae)
        return self.swept.base.model_copy(update={"d_sae": d_sae, "tokens": tokens, "lr": lr, "seed": seed})


def _covered(name: str, firings: Firings, concepts: Sequence[Concept], sample: Sample) -> Covered:
    has = [best_feature(concept.rows, firings)[1] >= BREAK_EVEN for concept in concepts]
    frequency = np.array([len(concept.rows) for concept in concepts]) / len(sample.token)
    return Covered(name, int((firings.counts > 0).sum()), has, logistic(frequency, np.array(has, bool)))


def _dealt(found: Words, sample: Sample, seed: int) -> Words:
    """The same places, with the letters dealt out to the tokens anew."""
    _, first, of = np.unique(sample.token[found.rows], return_index=True, return_inverse=True)
    letters = np.random.default_rng(seed).permutation(found.letter[first])
    return found._replace(letter=letters[of])
