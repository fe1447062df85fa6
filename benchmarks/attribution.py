"""How well attributions say what ablations do, and what an answer to "why this token?" costs.

    python benchmarks/attribution.py                        the newest atlas, the shipped tasks
    python benchmarks/attribution.py --task capitals --limit 4 --threads 1

On every prompt that the model gets right, every feature at every token is really taken away, one at a time.
"""

import argparse
import time
from pathlib import Path

import torch

from sae_core.artifacts import ArtifactStore, home
from sae_core.atlas import Atlas
from sae_core.circuits.agreement import OnPrompt, agreement, measure_task
from sae_core.circuits.attribution import Trace
from sae_core.circuits.tasks import SHIPPED, load_tasks
from sae_core.language_model import LanguageModel
from sae_core.prompt_reader import PromptReader
from sae_core.studies import Studies, study_folders

GUESSES = ("attribution", "integrated", "activation")
TEXT = "The capital of the state where the old iron bridge crosses the bay is a city that was founded long ago, and "


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dictionary", default="", help="default: the newest")
    parser.add_argument("--tasks", type=Path, default=SHIPPED, help="folder of task files")
    parser.add_argument("--task", action="append", default=[], help="only this one; may be given several times")
    parser.add_argument("--limit", type=int, help="prompts of each task")
    parser.add_argument("--steps", type=int, default=8, help="of integrated gradients")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=64, help="of the prompt that is timed")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    atlas = Atlas.open(ArtifactStore(home()), options.dictionary)
    study = Studies.load(*study_folders()).order(atlas.dictionary).study
    reader = PromptReader.of(atlas, LanguageModel.load(study.model, precision="float32"))
    every: list[OnPrompt] = []
    print(f"{atlas.dictionary}\n")
    print("| task | prompts | right | guess | correlation | of sizes | top 10 shared |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for task in load_tasks(options.tasks, options.task):
        task = task.model_copy(update={"prompts": task.prompts[: options.limit]})
        found, share = measure_task(reader, task, options.steps)
        every += found
        show(task.name, found, f"{share:.0%}")
    show("all", every, "")
    print(f"\n{sum(len(one.ablation) for one in every):,} features at tokens were taken away, one at a time")
    timed(reader, options.tokens)


def show(name: str, found: list[OnPrompt], share: str) -> None:
    """Lines of the table."""
    for guess in GUESSES:
        a = agreement(found, guess)
        size = f"{a.correlation:.2f} ± {a.correlation_error:.2f} | {a.of_size:.2f} | {a.overlap:.1f}"
        print(f"| {name} | {a.n_prompts} | {share} | {guess} | {size} |", flush=True)


def timed(reader: PromptReader, tokens: int) -> None:
    """An answer with its ten ablations, the model loaded; the middle one of five, after one that warms up."""
    ids = reader.ids(TEXT * (tokens // 16))[: tokens - len(reader.start)]
    prompt, seconds = reader.lm.tokenizer.decode(ids), []
    for _ in range(6):
        start = time.perf_counter()
        trace = Trace(reader, prompt)
        found = trace.attribute()
        trace.ablated(found, found.top(10))
        seconds.append(time.perf_counter() - start)
    middle = sorted(seconds[1:])[2]
    print(f"why, {len(found.tokens)} tokens, ten ablations: {middle:.2f} s, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
