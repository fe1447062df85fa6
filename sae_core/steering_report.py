"""What steering does, measured: features chosen by rule, against controls, with the failures kept.

Half the prompts choose each feature's strength, the other half report. The controls, at the same strength: the model
as it is, a random direction as far as the feature goes, another feature, and words that ask for the concept.

The judge is lexical: the share of a text's tokens that are words of the feature's own, those that its direction
promotes and those that it often fires on, when they are rare in the corpus. It knows no synonyms, and no sense.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor

from sae_core.artifacts import write_atomically
from sae_core.corpus import Corpus
from sae_core.generation import read_prompt
from sae_core.language_model import LanguageModel
from sae_core.names import Site
from sae_core.progress import Report, silent
from sae_core.steering import Steer
from sae_core.steering_levers import Lever, levers
from sae_core.steering_scores import SCORES
from sae_core.steering_texts import (
    Condition,
    Measures,
    Subject,
    Text,
    bootstrap,
    concept_rate,
    condition_steering,
    measure_texts,
    user_says,
    write_texts,
)
from sae_core.study import ModelSettings, Packing, SteeringReportSettings

REPORT, LEVERS, MARKDOWN = "steering_report.parquet", "levers.parquet", "report.md"
CHOOSING = ("Tell me about your day.", "Write a short story.", "What should I do this weekend?", "Describe a room.")
REPORTING = ("Who are you?", "Give me some advice.", "What happened yesterday?", "Tell me something interesting.")
_WORDS = 3
"""Words by which the prompt-only control names the concept."""


class Row(NamedTuple):
    """A feature under one condition, over one half of the prompts."""

    feature: int
    name: str
    """The words that stand for it."""
    output_score: float
    half: str
    """`choose` or `report`."""
    condition: str
    """`base`, `steered`, `random_direction`, `random_feature` or `prompt_only`."""
    strength: float | None
    chosen: bool
    """Whether this strength was chosen; always true of what is reported."""
    concept_rate: float
    """Share of the tokens that are the feature's words."""
    low: float
    high: float
    """95% bootstrap interval of that, over texts."""
    ratio: float
    """`concept_rate` over that of the model as it is on all prompts, or over half a token of them where it has none."""
    texts_with_concept: float
    perplexity_ratio: float
    """Perplexity under the model as it is, over that of its own texts on the same prompts (geometric means)."""
    repetition: float
    kl_first: float
    """KL divergence of the first token's distribution from the default one, nats, mean over prompts; NaN while a
    strength is chosen."""
    n_texts: int
    sample: str
    """The first of the texts."""


def build_steering_report(
    settings: SteeringReportSettings, model: ModelSettings, site: Site, sink_norm: float, dictionary: Path,
    features: Path, scores: Path, corpus: Path, packing: Packing, folder: Path, device: str = "cpu",
    report: Report = silent,
) -> dict[str, Any]:  # fmt: skip
    """Write `steering_report.parquet` (columns as in `Row`), `levers.parquet` and `report.md` into `folder`.

    Args:
        settings: how much is measured.
        model: the language model, run in float32.
        site: where the dictionary reads it.
        sink_norm: norm above which an activation is an attention sink.
        dictionary: folder of the finished dictionary.
        features: folder of its features.
        scores: folder of their output scores.
        corpus: folder of the finished corpus: its words say which are rare, its held-out text is for the levers test.
        packing: whether attention restarts at each document of it.
        folder: where to write.
        device: where to compute.
        report: progress, in texts.

    Returns:
        Features measured; how many raise their concept tenfold within the perplexity bound, on the reporting half;
        mean concept rates of all conditions.
    """
    subject = Subject.open(
        LanguageModel.load(model, device, precision="float32"), site, dictionary, features, sink_norm
    )
    rates = subject.word_rates(Corpus.open(corpus).train.token_ids)
    rows = measure(subject, scores, rates, settings, report)
    chosen = list(dict.fromkeys(row.feature for row in rows))
    pulled = levers(subject, chosen, corpus, packing, settings.lever_tokens, settings.seed, report)
    with write_atomically(folder / REPORT) as path:
        pq.write_table(pa.Table.from_pylist([row._asdict() for row in rows], _SCHEMA), path)
    with write_atomically(folder / MARKDOWN) as path:
        path.write_text(markdown(rows, pulled, settings.perplexity_ratio_max), "utf-8")
    with write_atomically(folder / LEVERS) as path:
        pq.write_table(pa.Table.from_pylist([lever._asdict() for lever in pulled], _LEVERS_SCHEMA), path)
    reported = [row for row in rows if row.half == "report"]
    kinds = sorted({row.condition for row in reported})
    means = {
        f"rate_{kind}": float(np.mean([r.concept_rate for r in reported if r.condition == kind])) for kind in kinds
    }
    return {"n_features": len(chosen), "n_raised": len(raised(rows, settings.perplexity_ratio_max)), **means}


_SCHEMA = pa.schema(
    [
        ("feature", pa.int32()), ("name", pa.string()), ("output_score", pa.float32()), ("half", pa.string()),
        ("condition", pa.string()), ("strength", pa.float32()), ("chosen", pa.bool_()), ("concept_rate", pa.float32()),
        ("low", pa.float32()), ("high", pa.float32()), ("ratio", pa.float32()), ("texts_with_concept", pa.float32()),
        ("perplexity_ratio", pa.float32()), ("repetition", pa.float32()), ("kl_first", pa.float32()),
        ("n_texts", pa.int32()), ("sample", pa.string()),
    ]
)  # fmt: skip
_LEVERS_SCHEMA = pa.schema(
    [
        ("feature", pa.int32()), ("change", pa.string()), ("rise", pa.float32()), ("low", pa.float32()),
        ("high", pa.float32()), ("n_windows", pa.int32()),
    ]
)  # fmt: skip


class _Chosen(NamedTuple):
    feature: int
    output_score: float
    concept: list[str]


def choose_features(
    subject: Subject,
    scores: Path,
    settings: SteeringReportSettings,
    rates: Mapping[str, float],
    base_texts: Sequence[Text],
) -> list[_Chosen]:
    """The features of the highest output scores that have words of their own for the judge to look for.

    Words that are said anyway cannot be said ten times as often. Only words count that are rare by `rates`, those of
    the corpus (see `Subject.concept`), and only features whose words together are rare in `base_texts`, those of the
    model as it is on the prompts that choose.
    """
    table = pq.read_table(scores / SCORES, columns=["feature", "output_score"]).to_pylist()
    scored = sorted((r for r in table if r["output_score"] is not None), key=lambda r: -r["output_score"])
    found: list[_Chosen] = []
    for row in scored:
        if len(found) == settings.features:
            break
        concept = subject.concept(subject.features.feature(row["feature"]), rates, settings.word_rate_max)
        said = np.mean([concept_rate(subject, text, set(concept)) for text in base_texts])
        if len(concept) >= settings.words_min and said <= settings.base_rate_max:
            found.append(_Chosen(row["feature"], row["output_score"], concept))
    return found


def measure(
    subject: Subject, scores: Path, rates: Mapping[str, float], settings: SteeringReportSettings, report: Report
) -> list[Row]:
    """Both halves: every strength of every feature that is chosen, then the chosen strength and its controls."""
    first = _Half(subject, "choose", CHOOSING, settings, report)
    base_texts = first.write_base()
    chosen = choose_features(subject, scores, settings, rates, base_texts)
    if not chosen:
        return []
    strengths = sorted(settings.strengths)
    first.write([Condition(Steer(c.feature, s)) for c in chosen for s in strengths])
    second = _Half(subject, "report", REPORTING, settings, report)
    second_base = second.write_base()
    rows, best = [], []
    for place, item in enumerate(chosen):
        tried = [
            first.row(1 + place * len(strengths) + step, item, "steered", strength, base_texts)
            for step, strength in enumerate(strengths)
        ]
        fluent = [row for row in tried if row.perplexity_ratio <= settings.perplexity_ratio_max] or tried[:1]
        best.append(max(fluent, key=lambda row: (row.concept_rate, row.strength)))
        rows += [row._replace(chosen=row is best[-1]) for row in tried]
    second.write([c for item, row in zip(chosen, best, strict=True) for c in _against(subject, item, row, settings)])
    base_texts = base_texts + second_base
    kinds = ("steered", "random_direction", "random_feature", "prompt_only")
    for place, (item, row) in enumerate(zip(chosen, best, strict=True)):
        rows.append(second.row(0, item, "base", None, base_texts))
        for step, kind in enumerate(kinds):
            strength = None if kind == "prompt_only" else row.strength
            rows.append(second.row(1 + place * len(kinds) + step, item, kind, strength, base_texts))
    return rows


def _against(subject: Subject, item: _Chosen, row: Row, settings: SteeringReportSettings) -> list[Condition]:
    """The feature at its strength, and the controls."""
    assert row.strength is not None, "what is chosen among strengths has one"
    steer = Steer(item.feature, row.strength)
    alive = np.flatnonzero(subject.max_acts.numpy() > 0)
    others = alive[alive != item.feature] if len(alive) > 1 else alive
    other = int(np.random.default_rng([settings.seed, item.feature]).choice(others))
    direction = subject.random_directions(1, settings.seed + item.feature)[0]
    words = f"Use words such as {', '.join(item.concept[:_WORDS])}."
    return [
        Condition(steer),
        Condition(steer, direction),
        Condition(Steer(other, row.strength)),
        Condition(instruction=words),
    ]


class _Half:
    """The texts of one half of the prompts, measured."""

    def __init__(
        self, subject: Subject, name: str, prompts: Sequence[str], settings: SteeringReportSettings, report: Report
    ) -> None:
        self._subject, self._name, self._prompts, self._settings, self._report = (
            subject,
            name,
            prompts,
            settings,
            report,
        )

    def write_base(self) -> list[Text]:
        """What the model says as it is: more texts than of other conditions, as all of them are held against these."""
        self._texts = self._written([Condition()], self._settings.seeds + self._settings.base_seeds)
        return list(self._texts)

    def write(self, conditions: Sequence[Condition]) -> None:
        """Write the texts of further conditions, numbered from 1, and measure all."""
        texts = self._written(conditions, self._settings.seeds)
        self._texts += [text._replace(condition=text.condition + 1) for text in texts]
        self._measures = measure_texts(self._subject, self._texts)
        if self._name == "report":
            self._kl = first_token_kl(self._subject, self._prompts, [Condition(), *conditions]).tolist()
        else:
            self._kl = [math.nan] * (1 + len(conditions))

    def _written(self, conditions: Sequence[Condition], seeds: int) -> list[Text]:
        s = self._settings
        return write_texts(
            self._subject, self._prompts, conditions, seeds, s.max_tokens, s.temperature, s.seed, self._report
        )

    def of(self, condition: int) -> list[Text]:
        """Texts of a condition."""
        return [text for text in self._texts if text.condition == condition]

    def _measures_of(self, condition: int) -> list[Measures]:
        return [m for text, m in zip(self._texts, self._measures, strict=True) if text.condition == condition]

    def row(self, condition: int, item: _Chosen, kind: str, strength: float | None, base_texts: Sequence[Text]) -> Row:
        """What is measured of a feature's words in the texts of a condition."""
        texts, measures, base = self.of(condition), self._measures_of(condition), self._measures_of(0)
        words = set(item.concept)
        rates = np.array([concept_rate(self._subject, text, words) for text in texts])
        default = np.mean([concept_rate(self._subject, text, words) for text in base_texts])
        least = 0.5 / sum(len(text.ids) for text in base_texts)
        low, high = bootstrap(rates)
        return Row(
            item.feature, ", ".join(item.concept[:5]), item.output_score, self._name, kind, strength, True,
            float(rates.mean()), low, high, float(rates.mean() / max(default, least)), float((rates > 0).mean()),
            math.exp(np.mean([m.nll for m in measures]) - np.mean([m.nll for m in base])),
            float(np.mean([m.repetition for m in measures])), self._kl[condition], len(texts),
            self._subject.lm.tokenizer.decode(texts[0].ids, skip_special_tokens=True),
        )  # fmt: skip


@torch.no_grad()
def first_token_kl(
    subject: Subject, prompts: Sequence[str], conditions: Sequence[Condition]
) -> Float[Tensor, " conditions"]:
    """KL(condition || default) of the first token of an answer, nats, mean over prompts."""
    total = torch.zeros(len(conditions))
    for prompt in prompts:
        default = _first_token(subject, prompt, Condition())
        for place, condition in enumerate(conditions):
            logprobs = _first_token(subject, prompt, condition)
            total[place] += (logprobs.exp() * (logprobs - default)).sum()
    return total / len(prompts)


def _first_token(subject: Subject, prompt: str, condition: Condition) -> Float[Tensor, " vocab"]:
    """Log-probabilities of the first token of an answer."""
    ids = torch.tensor([read_prompt(subject.lm, user_says(prompt, condition.instruction)).ids])
    steering = condition_steering(subject, [condition])
    with steering.applied(subject.lm) if steering else nullcontext():
        return subject.lm.logits(ids)[0, -1].float().log_softmax(-1).cpu()


def raised(rows: Iterable[Row], perplexity_ratio_max: float) -> list[int]:
    """Features whose concept steering raises at least tenfold within the bound, on the reporting half."""
    return [
        row.feature
        for row in rows
        if (row.half, row.condition) == ("report", "steered")
        and row.ratio >= 10
        and row.perplexity_ratio <= perplexity_ratio_max
    ]


def read_report(folder: Path) -> list[Row]:
    """The rows of a finished report."""
    return [Row(**row) for row in pq.read_table(folder / REPORT).to_pylist()]


def markdown(rows: Sequence[Row], pulled: Sequence[Lever], perplexity_ratio_max: float) -> str:
    """The report for people: every feature, with its failures, and a transcript of each."""
    reported = [row for row in rows if row.half == "report"]
    if not reported:
        return "# Steering, measured\n\nNo feature was measured.\n"
    names = {row.feature: row.name for row in reported}
    success = raised(rows, perplexity_ratio_max)
    lines = [
        "# Steering, measured",
        "",
        f"{len(names)} features, those of the highest output scores among those with words that are rare in the corpus "
        f"and in what the model says anyway; {min(row.n_texts for row in reported)} texts for each condition, "
        f"{max(row.n_texts for row in reported)} of the model as it is. "
        f"Of these, {len(success)} raise their concept at least tenfold at a perplexity ratio of at most "
        f"{perplexity_ratio_max:g}.",
        "",
        "Half the prompts chose the strength; these numbers are of the other half. *Concept rate* is the share of "
        "tokens that are words of the feature's own (promoted, or often fired on; rare in the corpus), with a 95% "
        "bootstrap interval; *ratio* is over the model as it is; *perplexity* is a ratio, too.",
        "",
        "| feature | words | condition | strength | concept rate | ratio | texts with it | perplexity | repetition "
        "| KL, first token |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in reported:
        strength = "" if row.strength is None else f"{row.strength:g}"
        mark = " (raised)" if row.condition == "steered" and row.feature in success else ""
        lines.append(
            f"| {row.feature} | {_cell(row.name)} | {row.condition}{mark} | {strength} | {row.concept_rate:.3f} "
            f"[{row.low:.3f}, {row.high:.3f}] | {row.ratio:.1f} | {row.texts_with_concept:.0%} | "
            f"{row.perplexity_ratio:.2f} | {row.repetition:.2f} | {row.kl_first:.2f} |"
        )
    lines += [
        "",
        "## Means over features",
        "",
        "| condition | concept rate | perplexity | repetition |",
        "| --- | --- | --- | --- |",
    ]
    for kind in dict.fromkeys(row.condition for row in reported):
        some = [row for row in reported if row.condition == kind]
        means = [
            np.mean([getattr(row, key) for row in some]) for key in ("concept_rate", "perplexity_ratio", "repetition")
        ]
        lines.append(f"| {kind} | {means[0]:.4f} | {means[1]:.2f} | {means[2]:.2f} |")
    lines += _levers_lines(pulled)
    lines += ["", "## Transcripts", "", f"The first text of each, to {json.dumps(REPORTING[0])}.", ""]
    for feature, name in names.items():
        lines += [f"**{feature}** ({_cell(name)})", ""]
        lines += [f"- {r.condition}: {_cell(r.sample)}" for r in reported if r.feature == feature]
        lines.append("")
    return "\n".join(lines)


def _levers_lines(pulled: Sequence[Lever]) -> list[str]:
    """The table of the levers test."""
    if not pulled:
        return []
    lines = [
        "",
        "## Levers",
        "",
        "Rise of the loss on held-out text where the feature fires, nats a prediction from its first firing on, with a "
        "95% bootstrap interval over windows: the feature taken away, doubled, and moved as far in a random direction.",
        "",
        "| feature | windows | ablated | doubled | random direction |",
        "| --- | --- | --- | --- | --- |",
    ]
    for feature in dict.fromkeys(lever.feature for lever in pulled):
        own = {lever.change: lever for lever in pulled if lever.feature == feature}
        cells = [
            f"{x.rise:.4f} [{x.low:.4f}, {x.high:.4f}]" for x in map(own.get, ("ablated", "doubled", "random")) if x
        ]
        lines.append(f"| {feature} | {own['ablated'].n_windows} | {' | '.join(cells)} |")
    return lines


def _cell(text: str) -> str:
    """Text on one line that cannot end a table's cell or begin markup."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
