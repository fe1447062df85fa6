"""Which features fire on a text that a person gives."""

import torch

from sae_core.artifacts import ArtifactStore
from sae_core.dictionary import Dictionary
from sae_core.features.reader import FeatureError
from sae_core.language_model import LanguageModel
from sae_core.names import DictionarySpec
from sae_core.pretrained import expected_bos

TokenFeatures = tuple[str, list[tuple[int, float]]]


def features_on_text(
    store: ArtifactStore, dictionary: str, lm: LanguageModel, text: str, per_token: int, sink_norm: float
) -> list[TokenFeatures]:
    """For each token, its display string and the strongest features as (feature, value), strongest first.

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
    found: list[TokenFeatures] = []
    bos = expected_bos(lm.tokenizer)
    start = torch.tensor([] if bos is None else [bos], dtype=torch.long)
    for block in torch.tensor(ids).split(block_tokens - len(start)):
        context = torch.cat([start, block])
        acts = lm.capture(site.hook, site.layer, context[None])[0, len(start) :].float().cpu()
        values, features = trained.encode(acts).topk(min(per_token, trained.d_sae))
        values[acts.norm(dim=1) > sink_norm] = 0
        for token, row, which in zip(lm.token_strings(block.tolist()), values.tolist(), features.tolist(), strict=True):
            found.append((token, [(i, value) for i, value in zip(which, row, strict=True) if value > 0]))
    return found
