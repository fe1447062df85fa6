"""What a person is shown at the end of a run, of one feature, and of two answers side by side."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.columns import Columns
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from pipelines.console import out, print_json, table, tokens
from sae_core.artifacts import ArtifactStore
from sae_core.atlas import FeatureCard
from sae_core.checks import verdicts
from sae_core.features import Features
from sae_core.labels import LabelRow
from sae_core.labels.labelers import best
from sae_core.labels.prompts import mark
from sae_core.labels.reader import doubted
from sae_core.studies import Order
from sae_core.study import LabelSettings, Study

if TYPE_CHECKING:  # these bring torch, or the client
    from sae_core.generation import Token
    from sae_core.labels.estimate import Estimate
    from sae_core.labels.labelers import Compared, Labeler

HEALTH = {
    "fvu": "variance unexplained on held-out tokens (FVU)",
    "l0": "features active on a token (L0)",
    "dead": "share of features that never fire",
    "delta_ce": "cross-entropy added by splicing it in, nats a token",
    "ce_recovered": "cross-entropy recovered, against mean ablation",
    "ce_recovered_zero": "cross-entropy recovered, against zero ablation",
}
NEXT = """
What to do next:
  mind-atlas serve                                 the atlas in the browser
  mind-atlas features "some words"                 find features
  mind-atlas feature N                             one feature, with examples and neighbors
  mind-atlas explain "some text"                   which features fire on it, token by token
  mind-atlas steer --feature N=10 "Who are you?"   the model's answer with a feature turned up
  mind-atlas ui                                    the pipeline in Dagster's web UI"""


def summarize(study: Study, store: ArtifactStore) -> dict[str, Any]:
    """The numbers of a finished study, as JSON values."""
    corpus = store.get("corpus", study.corpus.name).manifest.summary
    dictionaries = []
    for one, settings in study.trainings:
        slug, order = one.spec(settings).slug, Order(one, settings)
        stages = ("dictionary", "features", "neighbors", "feature_map", "labels")
        summaries = {stage: store.get(stage, slug).manifest.summary for stage in stages}
        failed = [v.text for stage in stages for v in verdicts(stage, summaries[stage], order) if not v.passed]
        dictionaries.append({"name": slug, "failed_checks": failed, **summaries})
    return {"study": study.name, "home": str(store.root), "corpus": corpus, "dictionaries": dictionaries}


def show(summary: dict[str, Any], json_: bool) -> None:
    """Print a study's summary, and what to do next."""
    if json_:
        print_json(summary)
        return
    corpus = summary["corpus"]
    out.print(
        f"\n[bold]{summary['study']}[/bold]: {corpus['documents']:,} documents, {corpus['tokens']:,} tokens, "
        f"{corpus['tokens_held_out']:,} of them held out"
    )
    for found in summary["dictionaries"]:
        out.print(f"\n[bold]{found['name']}[/bold]")
        out.print(table(("measure", "value"), [(text, float(found["dictionary"][k])) for k, text in HEALTH.items()]))
        if found["labels"]["stopped"]:
            out.print(f"labels stopped: {found['labels']['stopped']}", markup=False)
        for text in found["failed_checks"]:
            out.print(f"[bold red]check failed[/bold red]: {text}")
        examples = found["labels"]["examples"]
        rows = [(e["feature"], doubted(e["label"], e.get("beats_control")), e["example"]) for e in examples]
        out.print()
        out.print(table(("feature", "label", "strongest example"), rows))
    out.print(f"\nEverything is in {summary['home']} (atlas.duckdb there answers SQL).", markup=False)
    out.print(NEXT, markup=False)


def show_feature(card: FeatureCard, limit: int) -> None:
    """One feature: label, statistics, promoted tokens, examples with highlighted tokens, neighbors."""
    row = card.row
    out.print(f"[bold]feature {row.feature}[/bold]", end="  ")
    beats_control = card.label.get("beats_control") if card.label else None
    out.print(doubted(card.name, beats_control) or "no label yet", markup=False)
    if card.label and card.label["description"]:
        out.print(f"{card.label['description']}  [{card.label['kind']}; by {card.label['model']}]", markup=False)
    if card.label and card.label.get("scores"):
        _show_scores(card.label)
    if row.is_dead:
        out.print("dead: it never fires on the corpus", markup=False)
    out.print(
        f"fires on {row.density:.3%} of tokens ({row.n_fired:,}); "
        f"at most {row.max_act:.3g}, {row.mean_act:.3g} on average"
    )
    if card.steering:
        suggested = card.steering["suggested_strength"]
        strength = f"; suggested strength {suggested:g}" if suggested is not None else ""
        out.print(f"steers: output score {card.steering['output_score']:.3f} ({card.steering['role']}){strength}")
    out.print(f"fires on:   {_tokens(row.top_tokens)}", markup=False)
    out.print(f"promotes:   {_tokens(row.promoted)}", markup=False)
    out.print(f"suppresses: {_tokens(row.suppressed)}", markup=False)
    seen = set(card.label["examples"]) if card.label else set()
    for i, example in enumerate(card.examples[:limit]):
        mark_ = "*" if i in seen else " "
        out.print(Text(f"{mark_}{example.act:7.3g}  ") + tokens(example.tokens, example.acts, row.max_act))
    if seen:
        out.print(f"* shown to the label's writer, with {len(seen)} in all; no label is scored on these", markup=False)
    if card.neighbors:
        out.print()
        rows = [(n.feature, n.cosine, doubted(n.label, n.beats_control)) for n in card.neighbors]
        out.print(table(("neighbor", "cosine", "label"), rows))


def show_estimate(settings: LabelSettings, estimate: "Estimate", json_: bool) -> None:
    """What a labeling would take, and what it may."""
    limits = {"max_dollars": settings.max_dollars, "max_requests": settings.max_requests}
    if json_:
        print_json({**estimate._asdict(), **limits})
        return
    known = "unknown: its price is in no table" if estimate.dollars is None else f"about ${estimate.dollars:.4f}"
    out.print(
        f"{estimate.features:,} features by {settings.model} at {settings.base_url or 'this machine'}: "
        f"{estimate.requests:,} requests, {estimate.cached:,} answered already; about {estimate.prompt_tokens:,} "
        f"tokens read and {estimate.completion_tokens:,} written; dollars: {known}",
        markup=False,
    )
    for name, limit in limits.items():
        out.print(f"labels.{name} = {'none' if limit is None else f'{limit:g}'}", markup=False)


def show_labels(rows: Sequence[LabelRow], json_: bool) -> None:
    """Labels as they were written, and what they cost."""
    if json_:
        print_json(rows)
        return
    cells = [
        (r.feature, doubted(r.name, r.beats_control), r.kind, r.status, "unknown" if r.dollars is None else r.dollars)
        for r in rows
    ]
    out.print(table(("feature", "label", "kind", "status", "dollars"), cells))
    for row in (row for row in rows if row.error):
        out.print(f"feature {row.feature}: {row.error}", markup=False)


def extremes(rows: Sequence[LabelRow], features: Features, limit: int) -> list[dict[str, Any]]:
    """The scored labels of the best and of the worst scores, half and half, with an example each; JSON values."""
    scored = [(score.score, row) for row in rows if (score := best(row)) and score.score is not None]
    ordered = [row for _, row in sorted(scored, key=lambda pair: -pair[0])]
    chosen = ordered if len(ordered) <= limit else ordered[: limit - limit // 2] + ordered[-(limit // 2) :]
    return [
        asdict(row) | {"example": mark(features.examples(row.feature)[row.examples[0]]) if row.examples else ""}
        for row in chosen
    ]


def show_extremes(known: "Sequence[Labeler]", labels: Sequence[dict[str, Any]]) -> None:
    """All labelers, and some labels with every score, its interval and what the controls get."""
    out.print(table(known[0]._fields, [["-" if value is None else value for value in one] for one in known]))
    headers = ("feature", "label", "an example", "scorer", "score", "95%", "another's label", "lexical", "better")
    rows = [
        (label["feature"], label["label"], label["example"], s["scorer"], _cell(s["score"]),
         f"{_cell(s['low'])} to {_cell(s['high'])}", _cell(s["shuffled"]), _cell(s["lexical"]),
         {True: "yes", False: "no", None: "-"}[label["beats_control"]])
        for label in labels for s in label["scores"]
    ]  # fmt: skip
    out.print()
    out.print(table(headers, rows) if rows else "no label has a score yet")


def show_compared(pairs: "Sequence[Compared]", limit: int) -> None:
    """What two labelers call the same features, and how often which of them scores better."""
    scored = [(p.one_score, p.other_score) for p in pairs if p.one_score is not None and p.other_score is not None]
    better, worse = sum(one > other for one, other in scored), sum(one < other for one, other in scored)
    same = sum(pair.one.casefold() == pair.other.casefold() for pair in pairs)
    out.print(
        f"{len(pairs):,} features have both labels, {same:,} of them the same one; of {len(scored):,} scored ones the "
        f"first is better on {better:,}, the second on {worse:,}"
    )
    rows = [
        (p.feature, doubted(p.one, p.one_beats_control), _cell(p.one_score), doubted(p.other, p.other_beats_control),
         _cell(p.other_score))
        for p in pairs[:limit]
    ]  # fmt: skip
    out.print(table(("feature", "label", "score", "other label", "score"), rows))


def _show_scores(label: dict[str, Any]) -> None:
    """Each score with its interval, beside the controls' and by where the silent texts come from."""
    headers = (
        "scorer", "score", "95% interval", "another's label", "lexical label", "random", "nearest", "neighbor",
        "no answer", "texts",
    )  # fmt: skip
    rows = [
        (
            s["scorer"], _cell(s["score"]), f"{_cell(s['low'])} to {_cell(s['high'])}", _cell(s["shuffled"]),
            _cell(s["lexical"]), *(_cell(s[stratum]) for stratum in ("random", "nearest", "neighbor")),
            f"{s['failed']:.0%}", f"{s['n_firing']} + {s['n_silent']}",
        )
        for s in label["scores"]
    ]  # fmt: skip
    out.print(table(headers, rows))
    for levels in (s["levels"] for s in label["scores"] if s["scorer"] == "specificity"):
        out.print(f"specificity (0 to 3) by activation level, the lowest first: {' '.join(map(_cell, levels))}")


def _cell(score: float | None) -> str:
    return "-" if score is None else f"{score:.2f}"


def show_side_by_side(streams: Iterable[tuple[str, "Token"]], steering: list[dict[str, Any]]) -> None:
    """The default and the steered answer beside each other: growing on a terminal, else when both are whole."""
    told = [
        f"feature {s['feature']}, {s['method']} {s['strength']:g}: {doubted(s['label'], s['beats_control'])}"
        for s in steering
    ]
    out.print("; ".join(told), markup=False)
    texts = {"default": "", "steered": ""}
    growing = Live(console=out, auto_refresh=False, transient=True) if out.is_terminal else nullcontext()
    with growing as live:
        for name, token in streams:
            texts[name] += token.text
            if live is not None:
                live.update(_panels(texts), refresh=True)
    out.print(_panels(texts))


def _panels(texts: dict[str, str]) -> Columns:
    width = max(30, out.width // 2 - 2)
    return Columns([Panel(Text(text), title=name, width=width) for name, text in texts.items()])


def _tokens(strings: list[str]) -> str:
    return " ".join(repr(string) for string in strings)
