"""How large a dictionary a budget is best spent on: the site's law of losses, and this machine's measured speed.

The time of a run is that of its parts, each measured here: steps, whose time a token is a line in d_sae; the pass over
all activations that counts dead features, another line; what does not hang on d_sae (splicing the dictionary into the
model); and, where a site was never read, the reading.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_core.activations import Activations
from sae_core.artifacts import PROJECT, ArtifactStore
from sae_core.dictionary.trainer import Source, Training, default_lr
from sae_core.errors import MindAtlasError
from sae_core.language_model import LanguageModel
from sae_core.metrics import measure
from sae_core.names import Site
from sae_core.science.laws import Interval
from sae_core.science.scaling import REPORT, Scaling, require_k
from sae_core.stages import report_of
from sae_core.study import DictionarySettings, Study
from sae_core.training import IN_TRAINING

REFERENCE = PROJECT / "sae_core" / "science" / "smollm2-135m.json"
"""A sweep that ships: layer 15 of SmolLM2-135M-Instruct. Of other sites it says no more than which way things go."""
TIMED_SIZES = (1024, 4096, 16_384)
"""d_sae that are timed; the line through them is what is used."""
WARM_STEPS, TIMED_STEPS = 2, 5
TIMED_TOKENS = 4096
"""Of the model's passes."""
PASSES = 4
"""Of the model over the text that a dictionary is spliced into: `sae_core.metrics.splice`."""
LEAST_STEPS = 30
"""Fewer are no training; the law was fitted to no fewer."""
MEMORY = 8 << 30
"""Bytes that weights, gradients and moments may take at most in a plan."""
GRID = tuple(int(2 ** (e / 2)) // 64 * 64 for e in range(14, 41))
"""d_sae that are considered: 128 to a million, two to an octave, multiples of 64."""


class PlanError(MindAtlasError):
    """A budget that nothing can be trained with."""


class Line(NamedTuple):
    """Seconds for an activation: base + slope * d_sae."""

    base: float
    slope: float

    def at(self, d_sae: int) -> float:
        return self.base + self.slope * d_sae

    @classmethod
    def through(cls, sizes: Sequence[int], seconds: Sequence[float]) -> "Line":
        """The line of least relative errors; neither number is below 0."""
        slope, base = np.polyfit(sizes, seconds, 1, w=1 / np.asarray(seconds))
        return cls(max(float(base), 0.0), max(float(slope), 0.0))


class Speed(NamedTuple):
    """What this machine was measured to take."""

    step: Line
    """Of training, an activation."""
    measuring: Line
    """Of encoding and decoding, an activation."""
    splice: float = 0.0
    """Seconds of judging a dictionary inside of the model."""
    reading: float = 0.0
    """Seconds of reading the site, where it is still to be read."""

    def seconds(self, d_sae: int, tokens: int, measured: int) -> float:
        """Of a dictionary that is trained on `tokens` activations and measured on `measured`."""
        return self.fixed + tokens * self.step.at(d_sae) + measured * self.measuring.at(d_sae)

    @property
    def fixed(self) -> float:
        """Seconds that hang on neither d_sae nor tokens."""
        return self.splice + self.reading


class Budget(NamedTuple):
    """What may be spent; exactly one of them is given."""

    seconds: float | None = None
    flops: float | None = None
    """Of training, as if dense: see `flops`."""
    tokens: int | None = None
    """Activations of training."""


class Proposal(NamedTuple):
    """What to train, and what to expect."""

    d_sae: int
    tokens: int
    lr: float
    fvu: Interval
    """Expected loss on held-out activations."""
    seconds: float
    """Estimated time of the whole stage."""
    beyond: float
    """Compute, as a multiple of the largest run that the law was fitted to."""


def flops(d_model: int, d_sae: int, tokens: int) -> int:
    """Floating-point operations of training, as if dense: two matrices, multiplied once forward and twice backward."""
    return 2 * 3 * 2 * d_model * d_sae * tokens


class Gaussian:
    """Activations that were never read: of the right width, to measure speed with."""

    def __init__(self, d_model: int, n_kept: int = 65_536) -> None:
        self.d_model, self.n_kept = d_model, n_kept

    def statistics(self) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " 1"]]:
        """Mean 0, and a mean squared norm of d_model."""
        return torch.zeros(self.d_model), torch.tensor([float(self.d_model)])

    def batches(
        self, batch_tokens: int, n_steps: int, seed: int, start_step: int = 0
    ) -> Iterator[Float[Tensor, "batch d_model"]]:
        """Normal deviates, the same for the same seed and step."""
        generators = (torch.Generator().manual_seed(seed + step) for step in range(start_step, n_steps))
        return (torch.randn(batch_tokens, self.d_model, generator=g) for g in generators)


def measure_speed(base: DictionarySettings, source: Source, device: str = "cpu") -> Speed:
    """Time a few steps, and a few batches of encoding, at `TIMED_SIZES`; takes seconds.

    The first steps warm up, and are not counted; of the others the median is, which a busy moment does not move.
    """
    steps, encoded = [], []
    batches = list(source.batches(base.batch_tokens, WARM_STEPS + TIMED_STEPS, base.seed))
    for d_sae in TIMED_SIZES:
        settings = base.model_copy(update={"d_sae": d_sae, "tokens": base.batch_tokens * len(batches), "lr": None})
        training = Training(settings, source, device)
        times = [_timed(training.learn, batch) for batch in batches]
        steps.append(float(np.median(times[WARM_STEPS:])) / base.batch_tokens)
        dictionary = training.dictionary()
        times = [_timed(measure, dictionary, [batch]) for batch in batches[:TIMED_STEPS]]
        encoded.append(float(np.median(times)) / base.batch_tokens)
    return Speed(Line.through(TIMED_SIZES, steps), Line.through(TIMED_SIZES, encoded))


def measure_model(study: Study, lm: LanguageModel, load: float, speed: Speed, read: bool) -> Speed:
    """The speed with what the model takes: of splicing a dictionary in, and of reading the site unless it was `read`.

    Its passes are timed on random tokens, which cost what others do; `load` are the seconds that loading it took.
    """
    length = study.corpus.block_tokens
    ids = torch.randint(lm.vocab_size, (max(1, TIMED_TOKENS // length), length), dtype=torch.int32, device=lm.device)
    site = study.activations.hook, study.activations.layer
    lm.capture_many([site], ids[:1])  # the first pass warms up
    passed = _timed(lm.logits, ids) / ids.numel()
    spliced = PASSES * passed * study.dictionaries[0].evaluation_tokens
    if read:
        return speed._replace(splice=load + spliced)
    reading = _timed(lm.capture_many, [site], ids) / ids.numel() * study.corpus.tokens
    return speed._replace(splice=load + spliced, reading=load + reading)


def _timed(work: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    work(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def propose(
    budget: Budget, scaling: Scaling, speed: Speed, base: DictionarySettings, d_model: int, measured: int
) -> Proposal:
    """The d_sae and number of activations of least expected loss that the budget allows.

    Args:
        budget: what may be spent.
        scaling: the law.
        speed: of this machine.
        base: batch size and k; its k should be the law's.
        d_model: width of an activation.
        measured: activations that a finished dictionary is measured on.

    Raises:
        PlanError: the budget is too small for `LEAST_STEPS` steps of the smallest dictionary.
    """
    sizes = [d for d in GRID if 2 * (base.k or 1) <= d and IN_TRAINING * d * d_model <= MEMORY]
    afforded = {d_sae: _tokens(budget, scaling, speed, d_sae, d_model, measured, base) for d_sae in sizes}
    least = LEAST_STEPS * base.batch_tokens
    expected = {
        d_sae: float(scaling.joint.law.at(np.array([[d_sae], [tokens // base.batch_tokens]], float))[0])
        for d_sae, tokens in afforded.items() if tokens >= least
    }  # fmt: skip
    if not expected:
        raise PlanError(
            f"the budget does not reach {LEAST_STEPS} steps of {sizes[0]} features, which is "
            f"{speed.seconds(sizes[0], least, measured):.0f} s, {flops(d_model, sizes[0], least):.2g} flops or "
            f"{least} tokens here: give more"
        )
    d_sae = min(expected, key=lambda size: expected[size])
    tokens = afforded[d_sae] // base.batch_tokens * base.batch_tokens
    steps = tokens // base.batch_tokens
    largest = max(run.compute for run in scaling.grid)
    return Proposal(
        d_sae, tokens, round(scaling.settings.lr_factor * default_lr(d_sae), 6), scaling.predict(d_sae, steps),
        speed.seconds(d_sae, tokens, measured), d_sae * steps / largest,
    )  # fmt: skip


def _tokens(
    budget: Budget, scaling: Scaling, speed: Speed, d_sae: int, d_model: int, measured: int, base: DictionarySettings
) -> int:
    """Activations that the budget allows a dictionary of this size."""
    if budget.seconds is not None:
        left = budget.seconds - speed.seconds(d_sae, 0, measured)
        return max(0, int(left / speed.step.at(d_sae)))
    if budget.flops is not None:
        return int(budget.flops / flops(d_model, d_sae, 1))
    assert budget.tokens is not None, "one of the three is given"
    steps = budget.tokens // base.batch_tokens  # the law never says that fewer features are better; compute does
    return budget.tokens if d_sae <= scaling.joint.law.matching_d_sae(steps) else 0


def law_for(store: ArtifactStore, site: Site, k: int | None) -> tuple[Scaling, str]:
    """The sweep of the site, or the one that ships; and what is to be said of it, if anything."""
    made = report_of(store, "scaling", site.slug)
    scaling = Scaling.open(made.folder / REPORT if made else REFERENCE)
    said = []
    if not made:
        said.append(
            f"no sweep of {site.slug} is made: the law is that of layer 15 of SmolLM2-135M-Instruct, and the loss a "
            "guess; `mind-atlas scaling` measures it here"
        )
    if k != scaling.base.k:
        said.append(f"the law is of k = {scaling.base.k}, the study of k = {k}: the loss is not to be compared")
    return scaling, "; ".join(said)


class Plan(NamedTuple):
    """What is proposed for a study, and what that rests on."""

    site: str
    proposal: Proposal
    speed: Speed
    activations: int
    """That the site has, or will have when it is read."""
    note: str
    """What is to be said of the law; empty when it is the site's own."""

    def text(self) -> Iterator[str]:
        """The plan for people."""
        p, step = self.proposal, self.speed.step.at(self.proposal.d_sae)
        read = f", {self.speed.reading:,.0f} s to read the site" if self.speed.reading else ""
        yield f"{self.site}: d_sae = {p.d_sae}, tokens = {p.tokens:,}, lr = {p.lr:.2g}"
        yield f"the site is read {p.tokens / self.activations:.1f} times"
        yield f"expected FVU {p.fvu.value:.3f} ({p.fvu.low:.3f} to {p.fvu.high:.3f})"
        yield f"compute: {p.beyond:.1f} times that of the largest run that the law was fitted to"
        yield f"estimated time {p.seconds:,.0f} s: {p.tokens * step:,.0f} s of training ({1 / step:,.0f}/s){read}"
        if self.note:
            yield f"note: {self.note}"


def plan_study(study: Study, budget: Budget, store: ArtifactStore, device: str = "cpu") -> Plan:
    """Measure this machine, and propose the study's best dictionary within the budget, at its first site.

    Raises:
        ScalingError: the study's first dictionary has no k.
        PlanError: the budget is too small for anything.
    """
    study = study.at(study.activations)
    base, site = require_k(study.dictionaries[0]), study.site
    read = store.manifest("activations", site.slug) is not None
    start = time.perf_counter()
    lm = LanguageModel.load(study.model, device, study.activations.precision)
    load = time.perf_counter() - start
    source = Activations.open(store.get("activations", site.slug).folder, device=device) if read else None
    speed = measure_model(study, lm, load, measure_speed(base, source or Gaussian(lm.d_model), device), read)
    scaling, note = law_for(store, site, base.k)
    measured = source.n_kept if source else study.corpus.tokens
    return Plan(site.slug, propose(budget, scaling, speed, base, lm.d_model, measured), speed, measured, note)


def planned(study: Study, proposal: Proposal, name: str) -> Study:
    """The study with what is proposed as its one dictionary, which has a name of its own."""
    changes = {
        "d_sae": proposal.d_sae, "tokens": proposal.tokens, "lr": proposal.lr, "variant": f"plan-{proposal.tokens}",
    }  # fmt: skip
    dictionary = DictionarySettings.model_validate(study.dictionaries[0].model_dump() | changes)
    return study.at(study.activations).model_copy(update={"name": name, "dictionaries": [dictionary]})
