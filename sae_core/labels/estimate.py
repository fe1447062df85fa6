"""What labels would cost, before the first request is sent."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sae_core.features import Features
from sae_core.labels.build import choose
from sae_core.labels.client import ChatClient, Completion
from sae_core.labels.endpoint import label_writer
from sae_core.labels.labeler import Labeler
from sae_core.labels.prices import Usage
from sae_core.labels.prompts import Message
from sae_core.progress import silent
from sae_core.study import LabelSettings

BYTES_PER_TOKEN = 3.3
"""Of a prompt, chat template included: 2,070 bytes a feature are 630 tokens to Qwen 2.5 on `quickstart`."""
_ANSWER = '{"label": "days of the week", "description": "Names of weekdays.", "kind": "input", "confidence": 0.9}'
_ANSWER_TOKENS = 40  # what the label writers tried so far take on average


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
        self.bought[path] = Usage(round(size / BYTES_PER_TOKEN), _ANSWER_TOKENS)
        return Completion(_ANSWER, *self.bought[path])


def estimate_labels(settings: LabelSettings, features: Path, only: Sequence[int] = ()) -> Estimate:
    """What `build_labels` with the same arguments would take: it is rehearsed with every prompt, and nothing is sent.

    Raises:
        LabelError: as `build_labels`, but for what only a server can say.
    """
    source = Features.open(features)
    chosen = choose(source, settings, only)
    with label_writer(settings, "none", silent) as client:
        rehearsal = Rehearsal(client)
        labeler = Labeler(rehearsal, source, settings, record=lambda attempt: None)
        asyncio.run(labeler.label_all(chosen, 1, silent))
        costs = [client.budget.price(usage) for usage in rehearsal.bought.values()]
        return Estimate(
            len(chosen), len(rehearsal.bought), len(rehearsal.found),
            sum(usage.prompt_tokens for usage in rehearsal.bought.values()),
            sum(usage.completion_tokens for usage in rehearsal.bought.values()),
            None if None in costs else sum(cost or 0.0 for cost in costs),
        )  # fmt: skip
