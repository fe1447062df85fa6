import numpy as np
import pytest
import torch

from sae_core.dictionary import Dictionary
from sae_core.language_model import LanguageModel
from sae_core.prompt_reader import PromptError, PromptReader

D_SAE = 24
TEXTS = ["The old bridge rose over the river.", "a", "def add(a, b):\n    return a + b\n" * 4, "Мост пересекает реку."]


@pytest.fixture(scope="module")
def dictionary() -> Dictionary:
    rng = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, 32, generator=rng), dim=1)
    config = {"architecture": "batch_top_k", "k": 4}
    return Dictionary(W_dec.T.clone(), torch.zeros(D_SAE), W_dec, torch.zeros(32), torch.full((D_SAE,), 0.1), config)


def read_alone(lm: LanguageModel, dictionary: Dictionary, text: str, window: int, sink_norm: float) -> torch.Tensor:
    """Features of a text's tokens, sinks left out: window by window, the straight way."""
    ids = torch.tensor(lm.tokenizer(text, add_special_tokens=False).input_ids)
    acts = torch.cat([lm.capture("resid_post", 2, part[None])[0] for part in ids.split(window)])
    return dictionary.encode(acts[acts.norm(dim=1) <= sink_norm])


@pytest.mark.parametrize("sink_norm", [1e9, 12.0])
def test_pooled_features_are_those_of_each_text_read_alone(
    lm: LanguageModel, dictionary: Dictionary, sink_norm: float
) -> None:
    reader = PromptReader(lm, dictionary, "resid_post", 2, 16, sink_norm)
    pooled = reader.pool(TEXTS)
    for i, text in enumerate(TEXTS):
        acts = read_alone(lm, dictionary, text, 16, sink_norm)
        most = acts.max(0).values if len(acts) else torch.zeros(D_SAE)
        np.testing.assert_allclose(pooled.max[[i]].toarray()[0], most.numpy(), atol=1e-4)
        mean = acts.mean(0) if len(acts) else torch.zeros(D_SAE)
        np.testing.assert_allclose(pooled.mean[[i]].toarray()[0], mean.numpy(), atol=1e-4)


def test_a_text_longer_than_the_context_is_read_in_windows_and_counted(
    lm: LanguageModel, dictionary: Dictionary
) -> None:
    reader = PromptReader(lm, dictionary, "resid_post", 2, 16, 1e9)
    assert reader.pool(TEXTS).n_windowed == 1
    windows = reader.windows(TEXTS)
    assert max(len(w.ids) for w in windows) == 16
    joined = [token for w in windows if w.text == 2 for token in w.ids]
    assert joined == lm.tokenizer(TEXTS[2], add_special_tokens=False).input_ids


def test_a_text_without_a_token_is_refused_by_number(lm: LanguageModel, dictionary: Dictionary) -> None:
    with pytest.raises(PromptError, match="text 2 holds no token"):
        PromptReader(lm, dictionary, "resid_post", 2, 16, 1e9).pool(["some", ""])


def test_half_a_surrogate_pair_is_read_as_a_question_mark(lm: LanguageModel, dictionary: Dictionary) -> None:
    assert PromptReader(lm, dictionary, "resid_post", 2, 16, 1e9).pool(["bad \ud800 half"]).tokens[0] > 0
