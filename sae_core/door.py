"""The door: a study that its model or its text cannot carry out is turned away before anything is made of it."""

from typing import Any

from sae_core.corpus.documents import CorpusError
from sae_core.language_model import LanguageModel, ModelError
from sae_core.progress import Report, silent
from sae_core.study import Study


def require_site(study: Study, report: Report = silent) -> None:
    """Refuse a layer or a hook that the model lacks, and blocks that are longer than its context.

    The model's configuration is enough to tell; no weight is read. A catalog model is fetched, as its tokenizer needs
    it next.

    Raises:
        ModelError: with the value and what the model has; or it cannot be read.
        CatalogError: the model cannot be found or fetched.
    """
    model = LanguageModel.outline(study.model, report)
    for site in study.all_sites:
        model.site(site.hook, site.layer)
    if model.context is not None and study.corpus.block_tokens > model.context:
        raise ModelError(
            f"corpus.block_tokens = {study.corpus.block_tokens}: the model's context is {model.context} tokens: "
            "give no more than these"
        )


def require_batch(study: Study, corpus: dict[str, Any]) -> None:
    """Refuse a batch of activations for which the corpus, by its summary, has too few tokens outside the held-out part.

    Raises CorpusError.
    """
    train = corpus["tokens"] - corpus["tokens_held_out"]
    largest = max(dictionary.batch_tokens for dictionary in study.dictionaries)
    if largest > train:
        raise CorpusError(
            f"dictionary.batch_tokens = {largest}: the corpus has {train} tokens to train on: "
            "give it more text, or a smaller batch_tokens or corpus.held_out"
        )
