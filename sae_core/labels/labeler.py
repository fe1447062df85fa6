"""One feature after another, several at a time: asked, read, asked again once, and every attempt recorded."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from sae_core.features import Features
from sae_core.labels.client import ChatClient, Completion, EndpointError, RequestFailed
from sae_core.labels.prompts import Answer, BadAnswer, ask, ask_again, choose_examples, mark, read_answer
from sae_core.progress import Report
from sae_core.study import LabelSettings

TURNS = 2
"""Times a feature is asked about: once, and once more when the answer cannot be used."""
_GIVE_UP_AFTER = 5  # requests in a row that the server failed: it is not this or that request, it is the server

Record = Callable[[dict[str, Any]], None]


class Outcome(NamedTuple):
    """What came of asking about a feature."""

    feature: int
    answer: Answer | None
    """None when it failed; `error` says why."""
    error: str
    prompt_tokens: int
    completion_tokens: int
    examples: list[int]
    """Those shown: indices into `Features.examples(feature)`."""
    shown: str
    """The strongest of them, as the label writer saw it."""


class Labeler:
    """Asks a client about features.

    Args:
        client: answers.
        features: what is known of the features.
        settings: how many examples, and the seed of their choice.
        record: told of every attempt, as JSON values.
    """

    def __init__(self, client: ChatClient, features: Features, settings: LabelSettings, record: Record) -> None:
        self.client = client
        self.features = features
        self.settings = settings
        self.record = record
        self._failures = 0

    async def label_all(self, chosen: Sequence[int], concurrency: int, report: Report) -> list[Outcome]:
        """Outcomes in the order of `chosen`, with at most `concurrency` requests under way.

        Raises:
            EndpointError: the server answers nothing, or failed several requests in a row.
            ArtifactError: the disk is full.
        """
        outcomes: dict[int, Outcome] = {}
        todo, failed = iter(chosen), 0.0

        async def work() -> None:
            nonlocal failed
            for feature in todo:  # shared: each worker takes the next one
                outcomes[feature] = await self.label(feature)
                failed += outcomes[feature].answer is None
                report(len(outcomes), len(chosen), "labels", failed=failed)

        self._give_up_after = min(_GIVE_UP_AFTER, len(chosen))
        await _all([work() for _ in range(min(concurrency, len(chosen)))])
        return [outcomes[feature] for feature in chosen]

    async def label(self, feature: int) -> Outcome:
        """Ask about one feature; a failure is an outcome. Raises as `label_all`."""
        examples = self.features.examples(feature)
        indices = choose_examples(examples, self.settings.examples, self.settings.seed)
        messages = ask(self.features.feature(feature), [examples[i] for i in indices])
        outcome = Outcome(feature, None, "", 0, 0, indices, mark(examples[indices[0]]) if indices else "")
        for turn in range(TURNS):
            try:
                completion = await self.client.complete(messages)
            except RequestFailed as failure:
                self._note(feature, turn, error=str(failure))
                self._count_failure(str(failure))
                return outcome._replace(error=str(failure))
            self._failures = 0
            outcome = _answered(outcome, completion)
            self._note(feature, turn, completion, outcome.error)
            if outcome.answer:
                break
            messages = ask_again(messages, completion.text, outcome.error)
        return outcome

    def _count_failure(self, error: str) -> None:
        self._failures += 1
        if self._failures >= self._give_up_after:
            raise EndpointError(
                f"{self.client.endpoint} failed {self._failures} requests in a row, the last with: {error}; "
                "see that it runs, then run again: what was answered is kept"
            )

    def _note(self, feature: int, turn: int, completion: Completion | None = None, error: str = "") -> None:
        answered = completion._asdict() if completion else {}
        self.record({"feature": feature, "turn": turn, "error": error, "model": self.client.model} | answered)


def _answered(outcome: Outcome, completion: Completion) -> Outcome:
    """The outcome with what another answer says and cost."""
    answer, error = None, ""
    try:
        answer = read_answer(completion.text)
    except BadAnswer as problem:
        error = str(problem)
    return outcome._replace(
        answer=answer, error=error, prompt_tokens=outcome.prompt_tokens + completion.prompt_tokens,
        completion_tokens=outcome.completion_tokens + completion.completion_tokens,
    )  # fmt: skip


async def _all(work: Sequence[Awaitable[None]]) -> None:
    """Run all to their ends; the first error ends the others and is raised as it is."""
    tasks = [asyncio.ensure_future(w) for w in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
