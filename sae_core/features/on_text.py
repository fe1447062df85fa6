"""Which features fire on a text that a person gives."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from sae_core.artifacts import ArtifactStore
from sae_core.dictionary import Dictionary
from sae_core.features.reader import FeatureError
from sae_core.language_model import LanguageModel
from sae_core.names import DictionarySpec
from sae_core.pretrained import expected_bos


def values_on_text(
    store: ArtifactStore, dictionary: str, lm: LanguageModel, text: str, sink_norm: float
) -> Iterator[tuple[list[str], Float[Tensor, "tokens d_sae"]]]:
    """Display strings and feature values of a text's tokens, block by block; a block is read when it is asked for.

    The text is read as the corpus was: in blocks of the same length, each a context of its own. Tokens with norms as
    large as an attention sink's get no features.

    Raises:
        FeatureError: the text holds no token.
        ArtifactError: the dictionary or one of its parents is not made yet.
    """
    site = DictionarySpec.parse(dictionary).site
    trained = Dictionary.load(store.get("dictionary", dictionary).folder)
    block_tokens = store.get("corpus", site.corpus).manifest.settings["block_tokens"]
    readable = text.encode("utf-8", "replace").decode()  # lone surrogates are no text
    ids = lm.tokenizer(readable, add_special_tokens=False).input_ids
    if not ids:
        raise FeatureError(f"{text!r} holds no token: give some text")
    bos = expected_bos(lm.tokenizer)
    start = torch.tensor([] if bos is None else [bos], dtype=torch.long)
    for block in torch.tensor(ids).split(block_tokens - len(start)):
        context = torch.cat([start, block])
        acts = lm.capture(site.hook, site.layer, context[None])[0, len(start) :].float().cpu()
        values = trained.encode(acts)
        values[acts.norm(dim=1) > sink_norm] = 0
        yield lm.token_strings(block.tolist()), values


def strongest(values: Float[Tensor, "tokens d_sae"], per_token: int) -> list[list[tuple[int, float]]]:
    """For each token, the (at most) `per_token` largest values above 0 as (feature, value), largest first."""
    top, features = values.topk(min(per_token, values.shape[1]))
    rows = zip(top.tolist(), features.tolist(), strict=True)
    return [[(i, value) for i, value in zip(which, row, strict=True) if value > 0] for row, which in rows]
