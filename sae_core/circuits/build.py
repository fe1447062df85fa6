"""The circuit of a task as an artifact: nodes and edges as tables, and all that is told of them as JSON.

Half of the task's prompts find the circuit, the other half say how faithful it is: every second one, or every second
pair. Only prompts that the model itself gets right count; of a pair, both.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sae_core.circuits.export import attribution_graph
from sae_core.circuits.faithfulness import Point, curve
from sae_core.circuits.graph import Edge, Node, edges, effects, means, nodes
from sae_core.circuits.network import Batch, CircuitError, Network, Row
from sae_core.circuits.reader import CIRCUIT, GRAPH, Circuit, CircuitEdge, CircuitNode, CircuitPlace, CircuitPoint
from sae_core.circuits.tasks import Prompt, Task
from sae_core.pretrained import expected_bos
from sae_core.progress import Report, silent
from sae_core.study import CircuitSettings

_LEAST = 4
"""Prompts, or pairs, that the model must get right: two to find a circuit, two to measure it."""


class Read(NamedTuple):
    """A prompt as tokens, and what it is asked for."""

    prompt: Prompt
    ids: list[int]
    contrast: list[int] | None
    target: int
    against: int

    @property
    def row(self) -> Row:
        """As `Network.batches` takes it."""
        return self.ids, self.contrast, self.target, self.against


@dataclass(frozen=True)
class Asked:
    """A task's prompts, as the model does them."""

    find: list[Read]
    test: list[Read]
    right: float
    """Share of the prompts that the model gets right."""
    aligned: float
    """Share of the pairs that have as many tokens; 1 where there are none."""
    notes: list[str]


def build_circuit(
    settings: CircuitSettings, slug: str, task: Task, network: Network, folder: Path, report: Report = silent
) -> dict[str, Any]:
    """Write `circuit.json`, `graph.json`, `circuit.md`, `nodes.parquet` and `edges.parquet`; returns the numbers.

    Raises CircuitError when the model gets too few prompts right.
    """
    asked = ask(network, task)
    find, test = (list(network.batches([one.row for one in some])) for some in (asked.find, asked.test))
    mean = means(network, [*find, *test])
    found = nodes(effects(network, find, mean, settings.steps, report))
    plain, whole = _value(network, test), _value(network, find)
    kept = [n for n in found[: settings.nodes] if abs(n.effect) >= settings.node_threshold * whole]
    linked = edges(network, find, mean, kept, settings.steps, report)
    linked = [e for e in linked if abs(e.weight) >= settings.edge_threshold * whole]
    points, ends = curve(network, find, test, found, len(kept), settings.steps, settings.seed, report)
    circuit = _told(settings, slug, task, network, asked, kept, linked, points, ends)
    _write(folder, circuit, found, linked, attribution_graph(circuit, network.lm, asked.find[0].ids))
    at = {p.kind: p for p in points if p.nodes == len(kept)}
    return {
        "prompts": len(task.prompts), "right": asked.right, "aligned": asked.aligned,
        "found_on": len(asked.find), "measured_on": len(asked.test),
        "nodes": len(kept), "edges": len(linked), "nodes_that_fire": len(found),
        "faithfulness": at["circuit"].faithfulness if kept else 0.0,
        "without": at["without"].faithfulness if kept else 1.0,
        "random": at["random"].faithfulness if kept and "random" in at else 0.0,
        "neurons": at["neurons"].faithfulness if kept and "neurons" in at else 0.0,
        "adds_up": abs(ends["full"] - plain) / max(abs(plain), 1e-6), **ends,
    }  # fmt: skip


def ask(network: Network, task: Task) -> Asked:
    """Read a task's prompts, and leave those that the model gets right.

    Raises CircuitError when there are too few.
    """
    notes: list[str] = []
    reads = [read_prompt(network, prompt, notes) for prompt in task.prompts]
    units = [[one] for one in reads]
    aligned = 1.0
    if task.paired:
        pairs = list(zip(reads[::2], reads[1::2], strict=True))
        units = [[a._replace(contrast=b.ids), b._replace(contrast=a.ids)] for a, b in pairs if len(a.ids) == len(b.ids)]
        aligned = len(units) / len(pairs)
    done = {one.prompt: _is_right(network, one) for one in reads}
    right = [unit for unit in units if all(done[one.prompt] for one in unit)]
    if len(right) < _LEAST:
        what = "pairs" if task.paired else "prompts"
        raise CircuitError(
            f"{task.name}: of {len(units)} {what} the model gets {len(right)} right, and a circuit wants {_LEAST}: "
            "give the task more prompts, or the study a larger model"
        )
    find, test = ([one for unit in right[start::2] for one in unit] for start in (0, 1))
    return Asked(find, test, sum(done[one.prompt] for one in reads) / len(reads), aligned, notes)


def read_prompt(network: Network, prompt: Prompt, notes: list[str]) -> Read:
    """A prompt as tokens; what is to be said of it is added to the notes. Raises CircuitError."""
    tokenizer = network.lm.tokenizer
    bos = expected_bos(tokenizer)
    ids, target, against = (
        list(tokenizer(text, add_special_tokens=False).input_ids)
        for text in (prompt.text, prompt.target, prompt.against)
    )
    if not (ids and target and against) or target[0] == against[0]:
        raise CircuitError(
            f"{prompt.text!r} with {prompt.target!r} against {prompt.against!r} asks for nothing: give text, and two "
            "words that begin with different tokens"
        )
    for text, tokens in ((prompt.target, target), (prompt.against, against)):
        if len(tokens) > 1 and (note := f"{text!r} has {len(tokens)} tokens: the first stands for it") not in notes:
            notes.append(note)
    return Read(prompt, [*([] if bos is None else [bos]), *ids], None, target[0], against[0])


@torch.no_grad()
def _is_right(network: Network, one: Read) -> bool:
    (batch,) = network.batches([one.row])
    return bool(network.value(batch) > 0)


@torch.no_grad()
def _value(network: Network, batches: list[Batch]) -> float:
    return float(torch.cat([network.value(batch) for batch in batches]).double().mean())


def _told(
    settings: CircuitSettings, slug: str, task: Task, network: Network, asked: Asked, kept: list[Node],
    linked: list[Edge], points: list[Point], ends: dict[str, float],
) -> Circuit:  # fmt: skip
    return Circuit(
        slug=slug,
        task=task.name,
        description=task.description,
        places=[CircuitPlace(p.name, *p.reads, *p.acts_at) for p in network.places],
        prompts=[[one.prompt.text, one.prompt.target, one.prompt.against] for one in (*asked.find, *asked.test)],
        found_on=len(asked.find),
        right=asked.right,
        aligned=asked.aligned,
        paired=task.paired,
        steps=settings.steps,
        nodes=[CircuitNode(*node) for node in kept],
        edges=[CircuitEdge(*edge.source, *edge.target, edge.weight) for edge in linked],
        curve=[CircuitPoint(*point) for point in points],
        ends=ends,
        notes=asked.notes,
    )


def _write(folder: Path, circuit: Circuit, found: list[Node], linked: list[Edge], graph: dict[str, Any]) -> None:
    names = [place.dictionary for place in circuit.places]
    kept = {(node.place, node.feature) for node in circuit.nodes}
    rows = [
        node._asdict() | {"dictionary": names[node.place], "kept": (node.place, node.feature) in kept} for node in found
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "nodes.parquet")
    fields = ("source_place", "source_feature", "target_place", "target_feature", "weight")
    columns = {name: [(*e.source, *e.target, e.weight)[i] for e in linked] for i, name in enumerate(fields)}
    types = [pa.int64()] * 4 + [pa.float64()]
    pq.write_table(pa.table(columns, schema=pa.schema(zip(fields, types, strict=True))), folder / "edges.parquet")
    (folder / CIRCUIT).write_text(json.dumps(asdict(circuit), ensure_ascii=False), "utf-8")
    (folder / GRAPH).write_text(json.dumps(graph, ensure_ascii=False), "utf-8")
    (folder / "circuit.md").write_text(_markdown(circuit), "utf-8")


def _markdown(circuit: Circuit) -> str:
    """What a person reads of it first."""
    kinds = ("circuit", "without", "random", "features", "random_features", "neurons", "without_neurons")
    by = {(point.kind, point.nodes): point.faithfulness for point in circuit.curve}
    sizes = sorted({point.nodes for point in circuit.curve if point.nodes})
    lines = [
        f"# {circuit.task}: {circuit.description}", "",
        f"The model gets {circuit.right:.0%} of the prompts right; {circuit.found_on} find the circuit, "
        f"{len(circuit.prompts) - circuit.found_on} others measure it. "
        f"{len(circuit.nodes)} nodes and {len(circuit.edges)} edges are kept.", "",
        f"| nodes | {' | '.join(kind.replace('_', ' ') for kind in kinds)} |", "| --- " * (1 + len(kinds)) + "|",
    ]  # fmt: skip
    for n in sizes:
        cells = [f"{by[kind, n]:.2f}" if (kind, n) in by else "" for kind in kinds]
        lines.append(f"| {n:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
