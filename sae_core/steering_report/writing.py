"""The report for people, in Markdown."""

import json
from collections.abc import Sequence

import numpy as np

from sae_core.steering_levers import Lever
from sae_core.steering_report.measuring import REPORTING
from sae_core.steering_report.rows import Row, raised


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
