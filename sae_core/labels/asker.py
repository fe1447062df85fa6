"""Questions to a language model whose answers are read: what cannot be had or read is recorded, and is no answer."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sae_core.labels.budget import BudgetReached
from sae_core.labels.client import ChatClient, Completion, EndpointError, RequestFailed
from sae_core.labels.prompts import BadAnswer, Message
from sae_core.progress import Report

_GIVE_UP_AFTER = 5  # requests in a row that the server failed

Record = Callable[[dict[str, Any]], None]
T = TypeVar("T")


class Question(NamedTuple):
    """What is asked of a language model."""

    about: dict[str, Any]
    """What the question is about, for the record."""
    messages: list[Message]


class Asker:
    """Asks a client, and counts the requests that failed in a row.

    Args:
        client: answers.
        record: told of every answer, as JSON values.
    """

    def __init__(self, client: ChatClient, record: Record) -> None:
        self.client = client
        self.record = record
        self._failures = 0

    async def ask(
        self, about: dict[str, Any], messages: Sequence[Message], read: Callable[[Completion], T], **parameters: Any
    ) -> T | None:
        """What `read` makes of the answer; None where there is none, or it raises BadAnswer.

        Args:
            about: what the question is about; what came of it is added, and recorded.
            messages: the conversation.
            read: of an answer.
            parameters: fields of this request in place of the client's.

        Raises:
            EndpointError: the server answers nothing, or failed several requests in a row.
            BudgetReached: the answer might cost more than is left.
            ArtifactError: the disk is full.
        """
        found: T | None = None
        about["error"] = ""
        try:
            completion = await self.client.complete(messages, **parameters)
            self._failures = 0
            about |= completion.told()
            found = read(completion)
        except BadAnswer as problem:
            about["error"] = str(problem)
        except RequestFailed as failure:
            about["error"] = str(failure)
            self._count_failure(str(failure))
        self.record(about)
        return found

    def _count_failure(self, error: str) -> None:
        self._failures += 1
        if self._failures >= _GIVE_UP_AFTER:
            raise EndpointError(
                f"{self.client.endpoint} failed {self._failures} requests in a row, the last with: {error}; "
                "see that it runs, then run again: what was answered is kept"
            )


async def run_all(work: Sequence[Awaitable[None]]) -> None:
    """Run all to their ends; the first error ends the others and is raised as it is."""
    tasks = [asyncio.ensure_future(w) for w in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def ask_all(
    client: ChatClient, questions: Sequence[Question], read: Callable[[Completion], T], at_once: int, record: Record,
    report: Report, **parameters: Any,
) -> tuple[list[T | None], str]:  # fmt: skip
    """What `read` makes of each answer, None where it is none; and why the client asked no more, if it did not.

    Args:
        client: answers; it is closed at the end.
        questions: what is asked.
        read: of an answer; raises BadAnswer.
        at_once: requests under way, at most.
        record: told of every answer, as JSON values.
        report: progress, in questions.
        parameters: fields of these requests in place of the client's.

    Raises:
        EndpointError: the server answers nothing, or failed several requests in a row.
        ArtifactError: the disk is full.
    """
    asker, places = Asker(client, record), asyncio.Semaphore(at_once)
    found: list[T | None] = [None] * len(questions)
    done, stopped = 0, ""

    async def work(place: int, asked: Question) -> None:
        nonlocal done, stopped
        async with places:
            try:
                found[place] = await asker.ask(dict(asked.about), asked.messages, read, **parameters)
            except BudgetReached as reached:
                stopped = str(reached)
        done += 1
        report(done, len(questions), "judged")

    try:
        if client.budget.is_limited:
            for asked in questions:
                client.settle(asked.messages, **parameters)
        await run_all([work(place, asked) for place, asked in enumerate(questions)])
    finally:
        await client.close()
    return found, stopped


@contextmanager
def recorder(path: Path) -> Iterator[Record]:
    """Add lines of JSON to a file; a line that a killed run left half written is dropped first."""
    with path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)

        def record(attempt: dict[str, Any]) -> None:
            file.write(json.dumps(attempt, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
            file.flush()

        yield record
