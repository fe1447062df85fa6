"""Who writes the labels of a study: the model at an endpoint, or one served on this machine."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from sae_core.catalog import cache_dir, find_model, identify_model
from sae_core.downloads import CatalogError
from sae_core.labels.budget import Budget
from sae_core.labels.client import ChatClient, CompletionCache
from sae_core.labels.local_server import local_server
from sae_core.labels.prices import find_prices
from sae_core.labels.prompts import ANSWER_SCHEMA, MAX_TOKENS
from sae_core.labels.reader import LabelError
from sae_core.progress import Report
from sae_core.study import LabelSettings, ModelSettings

_LOCAL_TIMEOUT = 900.0  # seconds; a local model on a busy machine is slow, and not lost


@contextmanager
def label_writer(settings: LabelSettings, key: str, report: Report) -> Iterator[ChatClient]:
    """The client of the study's label writer. A local server starts with the first request, and ends with the block.

    Args:
        settings: `base_url` and `model`, and the parameters of every request.
        key: the endpoint's key.
        report: progress in bytes while a local model is fetched.

    Raises:
        LabelError: `base_url` is no URL, or one with a secret in it; it is empty, and there is no local model of that
            name; there is a limit in dollars, but no price.
    """
    budget = Budget(settings, find_prices(settings))
    cache = CompletionCache(cache_dir() / "completions")
    with ExitStack() as stack:
        if settings.base_url:
            endpoint, connect = settings.base_url, _remote(settings, key)
        else:
            endpoint, connect = _identity(settings), _local(settings, stack, report)
        at_once = settings.concurrency if settings.base_url else 1
        yield ChatClient(connect, endpoint, settings.model, _parameters(settings), cache, budget, at_once)


def _parameters(settings: LabelSettings) -> dict[str, Any]:
    schema = {"name": "feature_label", "strict": True, "schema": ANSWER_SCHEMA}
    return {
        "temperature": settings.temperature, "seed": settings.seed, "max_tokens": MAX_TOKENS,
        "response_format": {"type": "json_schema", "json_schema": schema},
    }  # fmt: skip


def _remote(settings: LabelSettings, key: str) -> Callable[[], AsyncOpenAI]:
    if "@" in settings.base_url or "?" in settings.base_url:  # it is written down in many places
        raise LabelError("labels.base_url holds a name, a password or a query: leave them out, and set OPENAI_API_KEY")
    if not settings.base_url.startswith(("http://", "https://")):
        raise LabelError(f"labels.base_url = {settings.base_url!r} is no URL: begin it with http:// or https://")
    return lambda: AsyncOpenAI(base_url=settings.base_url, api_key=key, timeout=settings.timeout, max_retries=0)


def _local(settings: LabelSettings, stack: ExitStack, report: Report) -> Callable[[], AsyncOpenAI]:
    def serve() -> AsyncOpenAI:
        with _advice(settings):
            found = find_model(ModelSettings(source=settings.model), report)
        if found.kind != "gguf":
            raise LabelError(
                f"labels.model = {settings.model!r} is no GGUF model: name a catalog model or a .gguf file"
            )
        url = stack.enter_context(local_server(Path(found.path)))
        direct = DefaultAsyncHttpxClient(trust_env=False)  # no proxy stands between this machine and itself
        return AsyncOpenAI(base_url=url, api_key="local", timeout=_LOCAL_TIMEOUT, max_retries=0, http_client=direct)

    return serve


def _identity(settings: LabelSettings) -> str:
    """What tells the local model's answers from another's of the same name: its content."""
    with _advice(settings):
        return identify_model(ModelSettings(source=settings.model))


@contextmanager
def _advice(settings: LabelSettings) -> Iterator[None]:
    """Say what to set when there is no local model."""
    try:
        yield
    except CatalogError as error:
        raise LabelError(
            f"no label writer: labels.model = {settings.model!r} cannot be served here ({error}). Set labels.base_url "
            "(and OPENAI_API_KEY) to use an endpoint, or labels.features = 0 for lexical labels only"
        ) from None
