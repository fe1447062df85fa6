"""How faithful the circuits of a study are: their curves as a picture, and gradients beside integrated ones.

python benchmarks/circuits.py --task agreement --plot docs/circuit-agreement-curve.png
python benchmarks/circuits.py --task agreement --steps 0 --steps 10
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from sae_core.artifacts import ArtifactStore, home
from sae_core.circuits.build import build_circuit
from sae_core.circuits.network import Network, places_of
from sae_core.circuits.reader import Circuit, read_circuit
from sae_core.circuits.tasks import tasks_of
from sae_core.language_model import LanguageModel
from sae_core.studies import Studies, study_folders

LINES = {
    "circuit": ("features and errors of the largest effects", "tab:orange", "-"),
    "random": ("random features, the same errors", "tab:gray", "-"),
    "features": ("features of the largest effects, no errors", "tab:orange", "--"),
    "random_features": ("random features, no errors", "tab:gray", "--"),
    "neurons": ("coordinates of the largest effects", "tab:blue", "-"),
    "without": ("all but the features and errors", "tab:orange", ":"),
    "without_neurons": ("all but the coordinates", "tab:blue", ":"),
}


def main() -> None:
    """Parse, draw or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="circuits")
    parser.add_argument("--task", default="agreement")
    parser.add_argument("--plot", type=Path, help="draw the curve of the circuit that was made")
    parser.add_argument("--steps", type=int, action="append", default=[], help="measure with so many; several times")
    options = parser.parse_args()
    study, store = Studies.load(*study_folders()).get(options.study), ArtifactStore(home())
    if options.plot:
        draw(read_circuit(store, study.circuit_slug(options.task)), options.plot)
    if not options.steps:
        return
    lm = LanguageModel.load(study.model, precision="float32")
    network = Network(lm, places_of(store, study, torch.device("cpu")))
    (task,) = (task for task in tasks_of(study.circuits) if task.name == options.task)
    for steps in options.steps:
        settings, start = study.circuits.model_copy(update={"steps": steps}), time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            summary = build_circuit(settings, study.circuit_slug(task.name), task, network, Path(folder))
            print(f"steps {steps}, {time.perf_counter() - start:.0f} s: {summary}")
            print((Path(folder) / "circuit.md").read_text("utf-8"))


def draw(circuit: Circuit, file: Path) -> None:
    """Faithfulness against the number of nodes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.5))
    for kind, (name, color, style) in LINES.items():
        points = [point for point in circuit.curve if point.kind == kind and point.nodes]
        at = [point.nodes for point in points]
        axes.plot(at, [point.faithfulness for point in points], style, color=color, label=name)
        axes.fill_between(at, [p.low for p in points], [p.high for p in points], color=color, alpha=0.15, lw=0)
    axes.axhline(0, color="black", lw=0.6)
    axes.axhline(1, color="black", lw=0.6)
    axes.set(xscale="log", xlabel="nodes", ylabel="faithfulness", title=circuit.description, ylim=(-0.5, 1.5))
    axes.legend(fontsize=7, loc="center right")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
