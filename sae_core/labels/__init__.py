"""Names for features: written by a language model from examples, and a lexical one without any.

    prompts       what the label writer is asked, and how its answer is read
    client        completions from any OpenAI-compatible server, paid for once
    pace          when to ask a server again, and when to leave it alone
    prices        what tokens cost
    budget        what may be spent
    endpoint      the study's label writer: an endpoint, or a local server
    local_server  such a server on this machine, when no other is named
    labeler       one feature after another: asked, read, asked again once, recorded
    lexical       the tokens a feature fires on and those it promotes
    estimate      what labels would cost, before the first request
    carry         labels that a retrained dictionary takes over from the one before
    build         the stage: labels.parquet and attempts.jsonl
    labelers      several of the same features: which is current, and two of them side by side
    reader        `Labels`, the one reader of the table

Reading needs no client, so `build_labels` is loaded when it is first asked for.
"""

from typing import TYPE_CHECKING, Any

from sae_core.labels.reader import LabelRow as LabelRow
from sae_core.labels.reader import Labels as Labels

if TYPE_CHECKING:
    from sae_core.labels.build import build_labels as build_labels


def __getattr__(name: str) -> Any:
    if name == "build_labels":
        from sae_core.labels.build import build_labels

        return build_labels
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
