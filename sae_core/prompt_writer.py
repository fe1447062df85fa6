"""Prompts of two kinds, written by the study's label writer from a description of the first kind."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from sae_core.labels.client import ChatClient, RequestFailed
from sae_core.labels.endpoint import label_writer
from sae_core.progress import Report, silent
from sae_core.prompt_reader import PromptError
from sae_core.study import LabelSettings

FORMS = (
    "a sentence of a news report", "a question to a friend", "a line of a dialogue", "a sentence of an encyclopedia",
    "a short message", "a complaint", "an instruction", "a sentence of a diary", "a headline", "a sentence of a novel",
)  # fmt: skip
"""What is asked for in turn: prompts of one form would be told apart by their form."""
EACH = 10
"""Prompts that one request asks for."""
_MAX_TOKENS = 900
_SCHEMA = {
    "type": "object", "properties": {"prompts": {"type": "array", "items": {"type": "string"}}},
    "required": ["prompts"], "additionalProperties": False,
}  # fmt: skip
_FORMAT = {"type": "json_schema", "json_schema": {"name": "prompts", "strict": True, "schema": _SCHEMA}}


def write_prompts(
    settings: LabelSettings, description: str, count: int, key: str, report: Report = silent
) -> tuple[list[str], list[str]]:
    """About `count` prompts that fit the description, and as many of the same forms that do not.

    Args:
        settings: who writes, and what it may cost.
        description: of the positives, as "texts about immune systems".
        count: of each side; a form of text is asked for in turn, `EACH` at a time.
        key: the endpoint's key.
        report: progress, in requests; in bytes while a local model is fetched.

    Raises:
        LabelError: the writer cannot be asked, or the budget is used up.
        PromptError: the description is empty, or no answer could be read.
    """
    if not description.strip():
        raise PromptError("the description is empty: say what the positives are about")
    with label_writer(settings, key, report) as client:
        sides = asyncio.run(_written(client, settings, description.strip(), count, report))
    for name, side in zip(("positive", "negative"), sides, strict=True):
        if not side:
            raise PromptError(f"{settings.model} wrote no {name} prompts that can be read: name another model")
    return sides


async def _written(
    client: ChatClient, settings: LabelSettings, description: str, count: int, report: Report
) -> tuple[list[str], list[str]]:
    rounds = range(-(-count // EACH))
    gate, done = asyncio.Semaphore(settings.concurrency if settings.base_url else 1), 0

    async def ask(number: int, is_about: bool) -> list[str]:
        nonlocal done
        async with gate:
            messages = _question(description, FORMS[number % len(FORMS)], is_about)
            try:
                answer = await client.complete(
                    messages, temperature=1.0, seed=number, max_tokens=_MAX_TOKENS, response_format=_FORMAT
                )
            except RequestFailed:
                return []
            finally:
                done += 1
                report(done, 2 * len(rounds), "requests")
        return read_answer(answer.text)

    try:
        found = await asyncio.gather(*(ask(n, is_about) for is_about in (True, False) for n in rounds))
    finally:
        await client.close()
    return _joined(found[: len(rounds)], count), _joined(found[len(rounds) :], count)


def _question(description: str, form: str, is_about: bool) -> list[dict[str, str]]:
    wanted = f"fit this description: {description}" if is_about else (
        f"have nothing to do with this description, not even by a word: {description}. Take many other subjects"
    )  # fmt: skip
    asked = (
        f"Write {EACH} short texts, each {form}, all different, that {wanted}. Name topics only; give no instructions "
        'that could do harm. Answer with one JSON object: {"prompts": ["...", ...]}.'
    )
    return [{"role": "user", "content": asked}]


def read_answer(text: str) -> list[str]:
    """The prompts of an answer, on one line each; none of one that is no such JSON."""
    start, end = text.find("{"), text.rfind("}")
    try:
        found: Any = json.loads(text[start : end + 1])
    except (ValueError, RecursionError):
        return []
    prompts = found.get("prompts") if isinstance(found, dict) else None
    if not isinstance(prompts, list):
        return []
    return [line for prompt in prompts if isinstance(prompt, str) and (line := " ".join(prompt.split()))]


def _joined(parts: Sequence[list[str]], count: int) -> list[str]:
    return list(dict.fromkeys(prompt for part in parts for prompt in part))[:count]
