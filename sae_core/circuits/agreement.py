"""Does an attribution say what an ablation does? Asked of every feature that fires, on the prompts of tasks.

For each prompt that the model gets right, every feature at every token is taken away, one at a time, and what that does
to the difference of logits is compared with its attribution, and with its activation, which is the baseline
(Templeton et al. 2024 report correlations of 0.81 and 0.12 on two prompts).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32

from sae_core.circuits.attribution import Trace
from sae_core.circuits.tasks import Prompt, Task
from sae_core.progress import Report, silent
from sae_core.prompt_reader import PromptReader

TOP = 10
"""Features at tokens that count as the ones that matter most."""


class OnPrompt(NamedTuple):
    """One prompt that the model gets right."""

    prompt: Prompt
    ablation: Float32[np.ndarray, " nodes"]
    """By how much the difference of logits falls without each feature at each token."""
    guesses: dict[str, Float32[np.ndarray, " nodes"]]
    """What stands for it: `attribution`, `integrated` (gradients) and `activation`."""


class Agreement(NamedTuple):
    """How well a guess agrees with ablation, in the mean over prompts, with its standard error."""

    guess: str
    correlation: float
    """Pearson's, over the features at tokens of a prompt."""
    correlation_error: float
    of_size: float
    """The same of their sizes, signs left out."""
    overlap: float
    """How many of the ten that matter most are the same, by size."""
    n_prompts: int


def measure_task(
    reader: PromptReader, task: Task, steps: int = 8, report: Report = silent
) -> tuple[list[OnPrompt], float]:
    """Every feature of every prompt that the model gets right; and the share of prompts that it does.

    Args:
        reader: the model and the dictionary.
        task: whose prompts are read.
        steps: of integrated gradients.
        report: progress, in prompts.

    Raises AttributionError when target and other of a prompt begin with the same token.
    """
    found: list[OnPrompt] = []
    for done, prompt in enumerate(task.prompts, 1):
        trace = Trace(reader, prompt.text)
        plain = trace.attribute(prompt.target, prompt.against)
        if plain.difference > 0:
            guesses = {
                "attribution": plain.values,
                "integrated": trace.attribute(prompt.target, prompt.against, steps).values,
                "activation": plain.acts.value,
            }
            ablation = trace.ablated(plain, torch.arange(len(plain.values), device=plain.values.device))
            found.append(
                OnPrompt(prompt, ablation.cpu().numpy(), {name: g.cpu().numpy() for name, g in guesses.items()})
            )
        report(done, len(task.prompts), "prompts")
    return found, len(found) / len(task.prompts)


def agreement(prompts: Sequence[OnPrompt], guess: str) -> Agreement:
    """A guess beside ablation, over some prompts; prompts in which nothing fires do not count."""
    rows = [
        (_correlation(one.guesses[guess], one.ablation), _correlation(abs(one.guesses[guess]), abs(one.ablation)),
         _overlap(one.guesses[guess], one.ablation))
        for one in prompts
        if len(one.ablation) > 1
    ]  # fmt: skip
    table = np.array(rows, np.float64) if rows else np.full((1, 3), np.nan)
    correlation, of_size, overlap = table.mean(0).tolist()
    error = float(table[:, 0].std(ddof=1) / np.sqrt(len(table))) if len(table) > 1 else np.nan
    return Agreement(guess, correlation, error, of_size, overlap, len(rows))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else 0.0


def _overlap(guess: np.ndarray, ablation: np.ndarray) -> float:
    best, wanted = (set(np.argsort(-abs(values), kind="stable")[:TOP].tolist()) for values in (guess, ablation))
    return float(len(best & wanted))
