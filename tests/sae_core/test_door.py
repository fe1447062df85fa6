from pathlib import Path

import pytest

from sae_core.corpus.documents import CorpusError
from sae_core.door import require_batch, require_site
from sae_core.language_model import ModelError
from sae_core.study import Study
from sae_core.study_files import load_study


@pytest.fixture
def study(tiny_study: Path) -> Study:
    return load_study(tiny_study)


def changed(study: Study, section: str, **settings: object) -> Study:
    changed = getattr(study, section).model_copy(update=settings)
    return study.model_copy(update={"sites": [changed]} if section == "activations" else {section: changed})


def test_a_study_that_its_model_can_carry_out_is_let_in(study: Study) -> None:
    for hook in ("resid_pre", "resid_post", "mlp_in", "mlp_out", "attn_out"):
        require_site(changed(study, "activations", hook=hook, layer=3))
    require_site(changed(study, "corpus", block_tokens=512))


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("activations", "layer", 4, "activations.layer = 4: the model has layers 0 to 3: give one of these"),
        ("corpus", "block_tokens", 513, "corpus.block_tokens = 513: the model's context is 512 tokens: give no more"),
        ("model", "source", "no-such-owner/no-such-model", "no-such-owner/no-such-model"),
    ],
)
def test_what_the_model_lacks_is_refused_in_one_line(
    study: Study, section: str, key: str, value: object, message: str
) -> None:
    with pytest.raises(ModelError, match=message) as refused:
        require_site(changed(study, section, **{key: value}))
    assert "\n" not in str(refused.value)


def test_the_largest_batch_of_a_sweep_must_fit_into_the_text_that_is_not_held_out(study: Study) -> None:
    sweep = study.model_copy(
        update={"dictionaries": [study.dictionaries[0].model_copy(update={"batch_tokens": n}) for n in (64, 900)]}
    )
    require_batch(sweep, {"tokens": 1000, "tokens_held_out": 100})
    with pytest.raises(CorpusError, match="batch_tokens = 900: the corpus has 899 tokens to train on: give"):
        require_batch(sweep, {"tokens": 1000, "tokens_held_out": 101})
