"""What labels would cost, before the first request is sent."""

import asyncio
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sae_core.features import Example, Features
from sae_core.labels.build import asked_all, choose
from sae_core.labels.client import ChatClient, Completion
from sae_core.labels.endpoint import label_writer
from sae_core.labels.labeler import Labeler
from sae_core.labels.prices import Usage
from sae_core.labels.prompts import Message
from sae_core.progress import silent
from sae_core.study import LabelSettings

if TYPE_CHECKING:
    from sae_core.labels.scoring.nearest import Texts  # brings torch

BYTES_PER_TOKEN = 3.3
"""Of a prompt, chat template included: 2,070 bytes a feature are 630 tokens to Qwen 2.5 on `quickstart`."""
_ANSWER = '{{"label": "names of the week {}", "description": "Weekdays.", "kind": "input", "confidence": 0.9}}'
_ANSWER_TOKENS = 40  # what the label writers tried so far take on average
_JUDGED_SHARE = 0.3  # of the bound of a judge's answer: one that lists half of the texts


class Estimate(NamedTuple):
    """What a labeling is expected to take."""

    features: int
    requests: int
    """To be sent, when every answer can be used and no fault passes by."""
    cached: int
    """Answered already: free."""
    prompt_tokens: int
    completion_tokens: int
    dollars: float | None
    """None where the price is not known."""


class Rehearsal(ChatClient):
    """Stands in for a client: sends nothing, and answers what is not in the cache with something usable."""

    def __init__(self, client: ChatClient) -> None:
        c = client
        super().__init__(c.connect, c.endpoint, c.model, c.parameters, c.cache, c.budget)
        self.bought: dict[Path, Usage] = {}
        self.found: set[Path] = set()

    async def complete(self, messages: Sequence[Message], **parameters: Any) -> Completion:
        """The kept answer, or a stand-in of typical length."""
        path = self.place(messages, **parameters)
        if kept := self.cache.get(path):
            self.found.add(path)
            return kept
        size = sum(len(message["content"].encode()) for message in messages)
        written = max(1, _JUDGED_SHARE * parameters["max_tokens"]) if parameters else _ANSWER_TOKENS
        self.bought[path] = Usage(round(size / BYTES_PER_TOKEN), round(written))
        return Completion(_ANSWER.format(len(self.bought)), *self.bought[path], logprobs=[])


async def _rehearse(rehearsal: Rehearsal, source: Features, chosen: Sequence[int], settings: LabelSettings) -> None:
    """Ask all that would be asked; texts are of the right number, and any in place of the nearest ones."""
    texts = _any_texts(settings, source) if settings.contrast else None
    outcomes = await Labeler(rehearsal, source, settings, _forget, texts).label_all(chosen, 1, silent)
    if not (n_judged := settings.judged_of(len(outcomes))):
        return
    from sae_core.labels.scoring.judge import Judge
    from sae_core.labels.scoring.score import Scorer, tasks_of

    class Sketch(Scorer):
        def neighbors(self, feature: int) -> list[int]:
            return []

    scorer = Sketch(settings, source, Path(), texts or _any_texts(settings, source))
    trials = scorer.trials(asked_all(outcomes, source, settings), [], silent)
    await Judge(rehearsal, _forget, settings.asks_each).judge_all(trials[:n_judged], tasks_of(settings), 1, silent)


def _any_texts(settings: LabelSettings, source: Features) -> "Texts":
    """The sample, of which any window passes for the nearest: no model is loaded."""
    from sae_core.labels.scoring.nearest import Texts

    class AnyTexts(Texts):
        def nearest(self, examples: Sequence[Example]) -> Iterable[int]:
            return range(len(self.sample.tokens))

    return AnyTexts(settings.embedder, source)


def _forget(attempt: dict[str, Any]) -> None:
    pass


def estimate_labels(settings: LabelSettings, features: Path, only: Sequence[int] = ()) -> Estimate:
    """What `build_labels` with the same arguments would take, scores included: a rehearsal with every prompt.

    Nothing is sent.

    Raises:
        LabelError: as `build_labels`, but for what only a server can say.
    """
    source = Features.open(features)
    chosen = choose(source, settings, only)
    with label_writer(settings, "none", silent) as client:
        rehearsal = Rehearsal(client)
        asyncio.run(_rehearse(rehearsal, source, chosen, settings))
        costs = [client.budget.price(usage) for usage in rehearsal.bought.values()]
        return Estimate(
            len(chosen), len(rehearsal.bought), len(rehearsal.found),
            sum(usage.prompt_tokens for usage in rehearsal.bought.values()),
            sum(usage.completion_tokens for usage in rehearsal.bought.values()),
            None if None in costs else sum(cost or 0.0 for cost in costs),
        )  # fmt: skip
