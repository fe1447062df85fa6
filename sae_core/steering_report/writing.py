"""The report for people, in Markdown."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from sae_core.steering_levers import Lever
from sae_core.steering_report.choosing import SELDOM, Choice
from sae_core.steering_report.measuring import REPORTING
from sae_core.steering_report.rows import Row, expected_to_rise, raised
from sae_core.study import SteeringReportSettings


def markdown(
    choices: Sequence[Choice], rows: Sequence[Row], pulled: Sequence[Lever], settings: SteeringReportSettings,
    summary: dict[str, Any],
) -> str:  # fmt: skip
    """How features were chosen, all that was measured of them with its failures, and a transcript of each."""
    if not rows:
        return "# Steering, measured\n\nNo feature was measured.\n"
    lines = ["# Steering, measured", "", *_verdict(rows, settings, summary), *_choosing(choices, settings)]
    lines += _words(rows, settings) + _judges(rows, summary) + _means(rows) + _levers(pulled)
    lines += ["", "## Transcripts", "", f"The first text of each, to {json.dumps(REPORTING[0])}.", ""]
    for feature in dict.fromkeys(row.feature for row in rows):
        own = [row for row in rows if row.feature == feature]
        lines += [f"**{feature}**: {_cell(own[0].label)} ({_cell(own[0].words)})", ""]
        lines += [f"- {row.condition}: {_cell(row.sample)}" for row in own]
        lines.append("")
    return "\n".join(lines)


def _verdict(rows: Sequence[Row], settings: SteeringReportSettings, summary: dict[str, Any]) -> list[str]:
    most, n_texts = settings.perplexity_ratio_max, [row.n_texts for row in rows]
    return [
        f"{summary['n_features']} features; {min(n_texts)} texts of at most {settings.max_tokens} tokens for each "
        f"condition, {max(n_texts)} of the model as it is, at temperature {settings.temperature:g}. "
        f"Of these features, {summary['n_raised']} say their words at least ten times as often as the model does "
        f"anyway, with an interval above that, at a perplexity ratio of at most {most:g}; by the probabilities of the "
        f"words in the same texts it is {summary['n_expected']}.",
        "",
    ]


def _choosing(choices: Sequence[Choice], settings: SteeringReportSettings) -> list[str]:
    """What the prompts that choose said of each strength."""
    n_candidates = len({choice.candidate.feature for choice in choices})
    lines = [
        "## Choosing",
        "",
        "Of the features that have words of their own (promoted, or often fired on; rare in the corpus and in what "
        f"the model says), the {n_candidates} of the highest output scores were tried on "
        "prompts that report nothing. By the probabilities of the next token along the model's own texts, each got the "
        "strength of the most words at an expected perplexity ratio of at most "
        f"{settings.forecast_ratio_max:g}, and those whose words rise most are reported, over what the model says "
        f"anyway, or over {SELDOM:g} of the tokens where that is less.",
        "",
        "| strength | fluent | of these, words tenfold | median share of words | median perplexity ratio |",
        "| --- | --- | --- | --- | --- |",
    ]
    for strength in sorted({choice.strength for choice in choices}):
        some = [choice for choice in choices if choice.strength == strength]
        rate, ratio = np.median([(choice.rate, choice.perplexity_ratio) for choice in some], 0)
        fluent = [choice for choice in some if choice.perplexity_ratio <= settings.forecast_ratio_max]
        lines.append(
            f"| {strength:g} | {len(fluent)} of {len(some)} | {sum(choice.rise >= 10 for choice in fluent)} | "
            f"{rate:.5f} | {ratio:.2f} |"
        )
    return lines


def _words(rows: Sequence[Row], settings: SteeringReportSettings) -> list[str]:
    """The lexical judge."""
    most = settings.perplexity_ratio_max
    said, expected = raised(rows, most), expected_to_rise(rows, most)
    lines = [
        "",
        "## Words",
        "",
        "*Said*: share of the tokens that are words of the feature's own. *Expected*: the mean probability of these "
        "words as the same texts were drawn. Both with 95% bootstrap intervals over texts, and as a multiple of what "
        "the model says as it is. *Perplexity* is a ratio, too, under the model as it is.",
        "",
        "| feature | words | condition | strength | said | times | texts with it | expected | times | perplexity "
        "| repetition | KL, first token |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        strength = "" if row.strength is None else f"{row.strength:g}"
        marks = [name for name, some in (("raised", said), ("expected", expected)) if row.feature in some]
        mark = f" ({', '.join(marks)})" if row.condition == "steered" and marks else ""
        lines.append(
            f"| {row.feature} | {_cell(row.words)} | {row.condition}{mark} | {strength} | "
            f"{_between(row.concept_rate, row.low, row.high, 4)} | {row.ratio:.1f} | {row.texts_with_concept:.0%} | "
            f"{_between(row.expected_rate, row.expected_low, row.expected_high, 4)} | {row.expected_ratio:.1f} | "
            f"{row.perplexity_ratio:.2f} | {row.repetition:.2f} | {row.kl_first:.2f} |"
        )
    return lines


def _judges(rows: Sequence[Row], summary: dict[str, Any]) -> list[str]:
    """Nearness to the label, and the grades of a language model where there are some."""
    graded = summary["judged"] > 0
    lines = [
        "",
        "## Labels",
        "",
        "*Similarity*: cosine of the texts and the feature's label, by a sentence-embedding model, with a 95% "
        "bootstrap interval over texts.",
    ]
    if graded:
        why = f" It asked no more: {summary['stopped']}." if summary["stopped"] else ""
        lines[-1] += (
            " *Grades* are a language model's, from 0 to 2, as AxBench has them: concept, instruction, fluency; "
            f"*overall* is their harmonic mean, 0 when one is. Of {summary['judged']} texts, {summary['failed']} have "
            f"none: the answer was missing or could not be read, and they count nowhere.{why}"
        )
    more = " graded | concept | instruction | fluency | overall |" if graded else ""
    lines += [
        "",
        f"| feature | label | condition | similarity |{more}",
        f"| --- | --- | --- | --- |{' --- |' * 5 * graded}",
    ]
    for row in rows:
        near = _between(row.similarity, row.similarity_low, row.similarity_high, 3)
        line = f"| {row.feature} | {_cell(row.label)} | {row.condition} | {near} |"
        lines.append(line + (f" {row.n_graded} | {_grades(row)} |" if graded else ""))
    return lines


def _grades(row: Row) -> str:
    if row.overall is None or row.overall_low is None or row.overall_high is None:
        return " |  |  | "
    overall = _between(row.overall, row.overall_low, row.overall_high, 2)
    return f"{row.concept:.2f} | {row.instruction:.2f} | {row.fluency:.2f} | {overall}"


def _means(rows: Sequence[Row]) -> list[str]:
    """Every condition, over all features."""
    graded = any(row.overall is not None for row in rows)
    lines = [
        "",
        "## Means over features",
        "",
        f"| condition | said | expected | similarity | perplexity | repetition |{' overall |' if graded else ''}",
        f"| --- | --- | --- | --- | --- | --- |{' --- |' if graded else ''}",
    ]
    keys = ("concept_rate", "expected_rate", "similarity", "perplexity_ratio", "repetition")
    for kind in dict.fromkeys(row.condition for row in rows):
        some = [row for row in rows if row.condition == kind]
        said, expected, *others = (float(np.mean([getattr(row, key) for row in some])) for key in keys)
        overall = [row.overall for row in some if row.overall is not None]
        last = (f" {np.mean(overall):.2f} |" if overall else "  |") if graded else ""
        lines.append(f"| {kind} | {said:.4f} | {expected:.4f} | {' | '.join(f'{x:.2f}' for x in others)} |{last}")
    return lines


def _levers(pulled: Sequence[Lever]) -> list[str]:
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
        cells = [_between(x.rise, x.low, x.high, 4) for x in map(own.get, ("ablated", "doubled", "random")) if x]
        lines.append(f"| {feature} | {own['ablated'].n_windows} | {' | '.join(cells)} |")
    return lines


def _between(value: float, low: float, high: float, digits: int) -> str:
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _cell(text: str) -> str:
    """Text on one line that cannot end a table's cell or begin markup."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
