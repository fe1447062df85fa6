"""`mind-atlas circuit` and `mind-atlas shift`: what is shown, written, and refused in one line."""

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from pipelines.commands.circuits import circuit, shift
from sae_core.artifacts import ArtifactStore
from sae_core.circuits.reader import ERROR, read_circuit
from sae_core.errors import MindAtlasError


def run(command: click.Command, *arguments: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("pipelines.commands.circuits.home", lambda: root)
    monkeypatch.setattr("assets.resources.home", lambda: root)
    done = CliRunner().invoke(command, [*arguments], obj=False, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_circuit_is_shown_and_exported(circuit_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shown = run(circuit, "tiny-circuits", root=circuit_store, monkeypatch=monkeypatch)
    assert "of the prompts right" in shown
    told = json.loads(run(circuit, "tiny-circuits", "--json", root=circuit_store, monkeypatch=monkeypatch))
    assert told["nodes"]
    for format_, keys in (("json", {"nodes", "edges", "curve"}), ("attribution-graph", {"nodes", "links", "metadata"})):
        file = tmp_path / f"{format_}.json"
        arguments = ("tiny-circuits", "--task", "mini", "--export", str(file), "--format", format_)
        assert "nodes" in run(circuit, *arguments, root=circuit_store, monkeypatch=monkeypatch)
        assert keys <= json.loads(file.read_text("utf-8")).keys()


@pytest.mark.parametrize(
    ("command", "arguments", "why"),
    [
        (
            circuit,
            ["tiny"],
            "tiny has dictionaries at one site, and a circuit wants two or more: give activations.layer",
        ),
        (shift, ["tiny"], "tiny has dictionaries at one site"),
        (circuit, ["coders"], "coders names no tasks: add"),
        (circuit, ["tiny-circuits", "--task", "other"], "has no task 'other': it names mini"),
        (circuit, ["tiny-circuits", "--ablate", "3:error"], "has no dictionary at layer 3: there are 1, 2"),
        (circuit, ["tiny-circuits", "--ablate", "1:64"], "has no node 1:64: choose among the"),
        (shift, ["tiny-circuits", "--layer", "3"], "no dictionary at layer 3: there are 1, 2"),
        (shift, ["tiny-circuits", "--feature", "2:64"], "there is no feature 2:64"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    command: click.Command, arguments: list[str], why: str, circuit_store: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipelines.commands.circuits.home", lambda: circuit_store)
    monkeypatch.setattr("assets.resources.home", lambda: circuit_store)
    with pytest.raises(MindAtlasError, match=why) as refused:
        CliRunner().invoke(
            command, [*arguments, *(["--each", "8"] if command is shift else [])], obj=False, catch_exceptions=False
        )
    assert "\n" not in str(refused.value)


def test_a_feature_that_is_none_is_a_usage_error():
    done = CliRunner().invoke(shift, ["tiny-circuits", "--feature", "twelve"], obj=False)
    assert done.exit_code == 2
    assert "is no LAYER:N" in done.output
    done = CliRunner().invoke(circuit, ["tiny-circuits", "--ablate", "9:"], obj=False)
    assert (done.exit_code, "is no LAYER:N" in done.output) == (2, True)
    done = CliRunner().invoke(circuit, ["tiny-circuits", "--ablate", "9:1", "--export", "x.json"], obj=False)
    assert (done.exit_code, "give one" in done.output) == (2, True)


def test_a_task_is_told_without_nodes_of_its_circuit(circuit_store: Path, monkeypatch: pytest.MonkeyPatch):
    circuit_ = read_circuit(ArtifactStore(circuit_store), "tiny-circuits.mini")
    node = next(n for n in circuit_.nodes if n.feature != ERROR)
    name = f"{circuit_.places[node.place].layer}:{node.feature}"
    told = json.loads(
        run(circuit, "tiny-circuits", "--ablate", name, "--json", root=circuit_store, monkeypatch=monkeypatch)
    )
    assert [(row["layer"], row["feature"]) for row in told["taken_out"]] == [tuple(map(int, name.split(":")))]
    assert told["done"] == told["total"]
    shown = run(circuit, "tiny-circuits", "--ablate", name, root=circuit_store, monkeypatch=monkeypatch)
    assert f"{told['after']['loss']:.4f}" in shown
    assert f"{told['after']['difference']:+.3f}" in shown


def test_shift_tells_what_it_takes_out_and_what_stands_beside_it(circuit_store: Path, monkeypatch: pytest.MonkeyPatch):
    arguments = ("tiny-circuits", "--feature", "1:3", "--feature", "2:5", "--each", "8", "--json")
    told = json.loads(run(shift, *arguments, root=circuit_store, monkeypatch=monkeypatch))
    assert [(row["layer"], row["feature"]) for row in told["taken_out"]] == [(1, 3), (2, 5)]
    assert {"as trained", "SHIFT, by hand", "SHIFT, by exchanging the cue", "oracle: trained on balanced texts"} <= {
        score["how"] for score in told["scores"]
    }
