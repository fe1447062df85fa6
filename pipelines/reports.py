"""How searches by prompts, reports and alerts are shown."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import click

from pipelines.console import out, print_json, table
from sae_core.artifacts import Made, write_atomically
from sae_core.circuits.answer import Answer, Why
from sae_core.circuits.edit import Edit, Level
from sae_core.circuits.reader import ERROR, Circuit
from sae_core.errors import MindAtlasError
from sae_core.labels.reader import doubted
from sae_core.prompt_search import Contrast
from sae_core.safety.monitor import Monitor, read_stream


def show_contrast(found: Contrast) -> None:
    """The features, what was compared, and what may be claimed."""
    head = ("feature", "AUC", "interval", "find AUC", "p, corrected", "effect", "fires on + / -", "pool", "label")
    rows = [
        (
            f.feature, "-" if f.auc is None else f"{f.auc:.3f}",
            "-" if f.low is None or f.high is None else f"{f.low:.2f} to {f.high:.2f}", f.find_auc, f.p, f.effect,
            f"{f.active[0]:.0%} / {f.active[1]:.0%}", f.pool, doubted(f.label, f.beats_control),
        )
        for f in found.features
    ]  # fmt: skip
    out.print(table(head, rows))
    out.print(", ".join(f"{n} {key.replace('_', ' ')}" for key, n in found.prompts.items()), markup=False)
    if found.duplicates:
        out.print(f"{found.duplicates} prompts taken out as duplicates", markup=False)
    if found.windowed:
        out.print(f"{found.windowed} prompts are longer than the context and were read in windows", markup=False)
    if found.exclusive:
        shown = ", ".join(map(str, found.exclusive[:20]))
        out.print(f"active on all positives that find and on no negative: {shown}", markup=False)
    out.print(found.claim, markup=False)


def show_rows(rows: Sequence[Any]) -> None:
    """Features, all of one named tuple."""
    told = [row._asdict() for row in rows]
    for row in told:
        row["label"] = doubted(row["label"], row.pop("beats_control"))
    out.print(table([*told[0]], [[*row.values()] for row in told]) if told else "no feature fires")


def show_answer(found: Answer) -> None:
    """Why a token is preferred: sums, features at tokens; for two prompts, what stays."""
    _show_why(found.why)
    if found.compared:
        out.print()
        _show_why(found.compared)
        out.print("\nfeatures of both prompts, all tokens together", style="bold")
        rows = [
            (f.feature, f"{f.left:+.3f}", f"{f.right:+.3f}", "stays" if f.stays else "",
             doubted(f.label, f.beats_control))
            for f in found.features
        ]  # fmt: skip
        out.print(table(("feature", "first", "second", "", "label"), rows))


def _show_why(why: Why) -> None:
    out.print(why.prompt, style="bold", markup=False)
    for note in why.notes:
        out.print(f"note: {note}", markup=False)
    one, other = why.target, why.against
    out.print(
        f"{one.token!r} ({one.probability:.2%}) against {other.token!r} ({other.probability:.2%}): "
        f"{why.difference:+.3f} logits\n= {why.of_features:+.3f} from {why.n_active:,} features "
        f"{why.of_error:+.3f} from what they miss {why.base:+.3f} from elsewhere "
        f"{why.rest:+.3f} beyond the first order", markup=False,
    )  # fmt: skip
    rows = [
        (c.position, repr(c.token), c.feature, c.act, f"{c.attribution:+.3f}", f"{c.ablation:+.3f}",
         doubted(c.label, c.beats_control))
        for c in why.causes
    ]  # fmt: skip
    out.print(table(("at", "token", "feature", "activation", "attribution", "ablation", "label"), rows))


def show_circuit(found: Circuit, labels: dict[tuple[int, int], str], limit: int) -> None:
    """Its largest nodes and edges, and how faithful it is."""
    out.print(f"{found.task}: {found.description}", style="bold", markup=False)
    share = f"; {found.aligned:.0%} of the pairs have as many tokens" if found.paired else ""
    out.print(
        f"the model gets {found.right:.0%} of the prompts right{share}; {found.found_on} found it, "
        f"{len(found.prompts) - found.found_on} measured it", markup=False,
    )  # fmt: skip
    for note in found.notes:
        out.print(f"note: {note}", markup=False)
    layers = [f"{place.hook} {place.layer}" for place in found.places]

    def name(place: int, feature: int) -> str:
        return "output" if place < 0 else f"{layers[place]}: {'error' if feature == ERROR else feature}"

    rows = [
        (name(n.place, n.feature), f"{n.effect:+.3f}", n.act, f"{n.prompts:.0%}", labels[n.place, n.feature])
        for n in found.nodes[:limit]
    ]
    out.print(table(("node", "effect", "activation", "fires", "label"), rows))
    links = [
        (name(e.source_place, e.source_feature), name(e.target_place, e.target_feature), f"{e.weight:+.3f}")
        for e in found.edges[:limit]
    ]
    out.print(table(("from", "to", "weight"), links))
    by_size: dict[int, dict[str, str]] = {}
    for point in found.curve:
        by_size.setdefault(point.nodes, {})[point.kind] = f"{point.faithfulness:.2f}"
    kinds = ("circuit", "without", "random", "features", "random_features", "neurons")
    curve = [(n, *(by_size[n].get(kind, "") for kind in kinds)) for n in sorted(by_size) if n]
    out.print(table(("nodes", *(kind.replace("_", " ") for kind in kinds)), curve))


def show_edit(taken: Sequence[tuple[int, int, str]], edit: Edit) -> None:
    """A task without some nodes of its circuit, and other text."""
    out.print(table(("layer", "node", "label"), [(at, "error" if n == ERROR else n, label) for at, n, label in taken]))

    def row(name: str, of: Callable[[Level], float | None], form: str) -> tuple[str, ...]:
        drawn = [of(level) or 0.0 for level in edit.random]
        beside = ""
        if drawn:
            mean, low, high = (format(value, form) for value in (sum(drawn) / len(drawn), min(drawn), max(drawn)))
            beside = f"{mean} ({low} to {high})"
        return name, *(format(of(level) or 0.0, form) for level in (edit.before, edit.after)), beside

    rows = [
        row("prompts right", lambda level: level.right, ".0%"),
        row("difference of logits", lambda level: level.difference, "+.3f"),
        row("loss on other text, nats a token", lambda level: level.loss, ".4f"),
    ]
    out.print(table(("", "as it is", "without", f"without {edit.drawn} others, at random"), rows))
    told = [
        (one.text, one.target, one.against, f"{one.before:+.3f}", f"{one.after:+.3f}", "" if one.after > 0 else "wrong")
        for one in edit.prompts
    ]
    out.print(table(("prompt", "right", "against", "as it is", "without", ""), told))
    out.print(
        f"{len(edit.prompts)} prompts that did not find the circuit, all of which the model gets right; "
        f"{edit.tokens:,} held-out tokens; at random: features of the circuit at the same places, "
        f"{len(edit.random)} draws", markup=False,
    )  # fmt: skip


def show_shift(taken: Sequence[tuple[int, Any, str]], scores: Sequence[Any]) -> None:
    """What was taken out of a probe, and how it does."""
    rows = [(layer, node.feature, f"{node.effect:+.3f}", label) for layer, node, label in taken]
    out.print(table(("layer", "feature", "effect", "label"), rows))
    told = [
        (s.how, f"{s.label:.1%}", f"{s.cue:.1%}", f"{s.worst:.1%}", s.features,
         "" if s.loss is None else f"{s.loss:+.4f}")
        for s in scores
    ]  # fmt: skip
    out.print(table(("probe", "label", "cue", "worst group", "taken out", "loss elsewhere"), told))


def show_report(made: Made, json_: bool) -> None:
    """A finished report: as it was written for people, or for machines."""
    if json_:
        file = next(path for path in made.folder.glob("*.json") if path.name != "monitor.json")
        print_json({"summary": made.manifest.summary, "report": json.loads(file.read_text("utf-8"))})
    else:
        click.echo(_markdown(made))


def insert(made: Made, target: Path) -> None:
    """Put the report between `<!-- safety -->` and `<!-- /safety -->` (the stage's name) of a Markdown file.

    Raises MindAtlasError when the file has no such marks.
    """
    stage = made.manifest.stage
    begin, end = f"<!-- {stage} -->", f"<!-- /{stage} -->"
    text = target.read_text("utf-8") if target.is_file() else ""
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise MindAtlasError(f"{target} has no lines {begin} and {end}: write them where the report shall go")
    with write_atomically(target) as path:
        path.write_text(f"{before}{begin}\n{_markdown(made).strip()}\n{end}{after}", "utf-8")


def watch(monitor: Monitor, file: IO[bytes], batch: int) -> None:
    """Print the alerts of a stream of lines, each as a line of JSON, as soon as a batch of lines is there."""
    done = 0
    waiting: list[str] = []
    for text in read_stream(_decoded(file), monitor.reader.lm.tokenizer):
        waiting.append(text)
        if len(waiting) == batch:
            done += _alert(monitor, waiting, done)
            waiting = []
    if waiting:
        _alert(monitor, waiting, done)


def _alert(monitor: Monitor, texts: list[str], first: int) -> int:
    for alerts in monitor.scan(texts):
        for alert in alerts:
            click.echo(json.dumps(asdict(alert) | {"text": first + alert.text}, ensure_ascii=False))
    return len(texts)


def _decoded(file: IO[bytes]) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise MindAtlasError(f"line {number} is not UTF-8 (byte {error.object[error.start]:#04x})") from None


def _markdown(made: Made) -> str:
    return next(made.folder.glob("*.md")).read_text("utf-8")
