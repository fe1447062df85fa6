"""One feature after another, several at a time: asked, read, asked again once, and every attempt recorded."""

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sae_core.features import Features
from sae_core.labels.asker import Record, run_all
from sae_core.labels.budget import BudgetReached
from sae_core.labels.client import ChatClient, Completion, EndpointDown, EndpointError, RequestFailed
from sae_core.labels.prices import NOTHING, Usage
from sae_core.labels.prompts import Answer, BadAnswer, Message, ask, ask_again, choose_examples, read_answer
from sae_core.progress import Report
from sae_core.study import LabelSettings

if TYPE_CHECKING:
    from sae_core.labels.scoring.nearest import Texts  # brings torch

TURNS = 2
"""Times a feature is asked about: once, and once more when the answer cannot be used."""
_GIVE_UP_AFTER = 5  # requests in a row that the server failed: it is not this or that request, it is the server


class Outcome(NamedTuple):
    """What came of asking about a feature."""

    feature: int
    answer: Answer | None
    """None when it failed; `error` says why."""
    error: str
    examples: list[int]
    """Those shown: indices into `Features.examples(feature)`."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    dollars: float | None = None
    """What the answers cost; None where no price is known."""
    seconds: float = 0.0
    """Time until the answers were there, when they were bought."""
    made_at: str = ""
    """When the last of them was there."""


class _Begun(NamedTuple):
    """What came of asking so far, and what is asked next."""

    outcome: Outcome
    messages: list[Message]
    turn: int


class Labeler:
    """Asks a client about features.

    Args:
        client: answers.
        features: what is known of the features.
        settings: how many examples, and the seed of their choice.
        record: told of every attempt, as JSON values.
        texts: where texts in which a feature does not fire are looked for; without it, none is shown.
    """

    def __init__(
        self, client: ChatClient, features: Features, settings: LabelSettings, record: Record,
        texts: "Texts | None" = None,
    ) -> None:  # fmt: skip
        self.client = client
        self.features = features
        self.settings = settings
        self.record = record
        self.texts = texts
        self.stopped = ""
        """Why features were left out, when the budget was used up."""
        self._failures = 0
        self._answered = False
        self._begun: dict[int, _Begun] = {}
        """Features that the budget has no room for in the midst: gone on with when it has, failed when it never has."""

    async def label_all(self, chosen: Sequence[int], concurrency: int, report: Report) -> list[Outcome]:
        """Outcomes in the order of `chosen`, with at most `concurrency` requests under way (the client sees to it).

        Some more features are at work: while their questions are made or their answers kept, no place is empty.

        When the budget is used up, what is under way is waited for, and the features that are left have no outcome,
        but for those whose answer was to be asked for again: they have failed.

        Raises:
            EndpointError: the server answers nothing, or failed several requests in a row.
            ArtifactError: the disk is full.
        """
        kept = {feature for feature in chosen if self._settle(feature)} if self.client.budget.is_limited else set()
        outcomes: dict[int, Outcome] = {}
        todo, failed = deque(sorted(chosen, key=lambda feature: feature not in kept)), 0.0

        async def work() -> None:
            nonlocal failed
            while todo:  # shared: each worker takes the next one
                feature = todo.popleft()
                try:
                    outcomes[feature] = await self.label(feature)
                except BudgetReached as reached:
                    self.stopped = str(reached)
                    todo.appendleft(feature)  # for a worker whose own request leaves something over
                    return
                failed += outcomes[feature].answer is None
                report(len(outcomes), len(chosen), "labels", failed=failed, dollars=self.client.budget.dollars)

        self._give_up_after = min(_GIVE_UP_AFTER, len(chosen))
        await run_all([work() for _ in range(min(concurrency + concurrency // 4, len(chosen)))])
        self.stopped = self.stopped if todo else ""
        outcomes |= {feature: begun.outcome for feature, begun in self._begun.items()}
        return [outcomes[feature] for feature in chosen if feature in outcomes]

    async def label(self, feature: int) -> Outcome:
        """Ask about one feature; a failure is an outcome. Raises as `label_all`, and BudgetReached."""
        begun = self._begun.pop(feature) if feature in self._begun else await self._begin(feature)
        outcome, messages, first = begun
        for turn in range(first, TURNS):
            try:
                completion = await self.client.complete(messages)
            except BudgetReached:
                if turn:
                    self._begun[feature] = _Begun(outcome, messages, turn)
                raise
            except RequestFailed as failure:
                self._note(feature, turn, failure.usage, error=str(failure))
                self._count_failure(str(failure))
                return self._paid(outcome, failure.usage)._replace(error=str(failure))
            self._failures, self._answered = 0, self._answered or not completion.cached
            outcome = self._read(outcome, completion)
            self._note(feature, turn, completion.usage, outcome.error, **completion.told())
            if outcome.answer:
                break
            messages = ask_again(messages, completion.text, outcome.error)
        return outcome

    async def _begin(self, feature: int) -> _Begun:
        indices, messages = await asyncio.to_thread(self._question, feature)  # others' answers need not wait for it
        return _Begun(Outcome(feature, None, "", indices, dollars=self.client.budget.price(NOTHING)), messages, 0)

    def _question(self, feature: int) -> tuple[list[int], list[Message]]:
        """The examples to show, and what is asked about them."""
        examples, row = self.features.examples(feature), self.features.feature(feature)
        indices = choose_examples(row, examples, self.settings.examples, self.settings.seed)
        shown = [examples[i] for i in indices]
        silent = self.texts.silent(feature, shown, self.settings.contrast) if self.texts else []
        return indices, ask(row, shown, silent)

    def _settle(self, feature: int) -> bool:
        """Count the answers about a feature that are kept already; whether they are all that it wants."""
        _, messages = self._question(feature)
        for _ in range(TURNS):
            if (kept := self.client.settle(messages)) is None:
                return False
            try:
                read_answer(kept.text)
                return True
            except BadAnswer as problem:
                messages = ask_again(messages, kept.text, str(problem))
        return True

    def _count_failure(self, error: str) -> None:
        self._failures += 1
        if self._failures >= self._give_up_after:
            kind = EndpointDown if self._answered else EndpointError
            raise kind(
                f"{self.client.endpoint} failed {self._failures} requests in a row, the last with: {error}; "
                "see that it runs, then run again: what was answered is kept"
            )

    def _read(self, outcome: Outcome, completion: Completion) -> Outcome:
        """The outcome with what another answer says and cost."""
        answer, error = None, ""
        try:
            answer = read_answer(completion.text)
        except BadAnswer as problem:
            error = str(problem)
        return self._paid(outcome, completion.usage)._replace(
            answer=answer, error=error, seconds=outcome.seconds + completion.seconds, made_at=completion.made_at
        )

    def _paid(self, outcome: Outcome, usage: Usage) -> Outcome:
        """The outcome with the tokens of another answer."""
        more = self.client.budget.price(usage)
        return outcome._replace(
            prompt_tokens=outcome.prompt_tokens + usage.prompt_tokens,
            completion_tokens=outcome.completion_tokens + usage.completion_tokens,
            dollars=None if more is None else (outcome.dollars or 0.0) + more,
        )

    def _note(self, feature: int, turn: int, usage: Usage, error: str, **answered: Any) -> None:
        told = {"feature": feature, "turn": turn, "error": error, "model": self.client.model}
        self.record(told | usage._asdict() | {"dollars": self.client.budget.price(usage)} | answered)
