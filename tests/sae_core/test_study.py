from sae_core.study import ActivationSettings, DictionarySettings


def test_the_one_setting_of_sparsity_has_a_default_and_the_other_is_in_no_fingerprint():
    by_k, by_penalty = DictionarySettings(), DictionarySettings(architecture="relu")
    assert (by_k.k, by_penalty.l1_coefficient) == (32, 5)
    assert DictionarySettings(architecture="gated").l1_coefficient == 1
    assert "l1_coefficient" not in by_k.model_dump()
    assert "k" not in by_penalty.model_dump()
    assert DictionarySettings.model_validate(by_penalty.model_dump()) == by_penalty


def test_a_dictionary_that_is_trained_has_no_source_in_its_fingerprint():
    assert "source" not in DictionarySettings().model_dump()
    imported = DictionarySettings(source="/sae")
    assert DictionarySettings.model_validate(imported.model_dump()) == imported


def test_activations_as_they_always_were_keep_their_fingerprint_and_others_get_their_own():
    plain = ActivationSettings(layer=15)
    assert plain.fingerprint() == "550762e0112f4f30"  # before one could choose the packing
    changes = ({"packing": "concat"}, {"special_tokens": "keep"}, {"sink_positions": 1}, {"stored": False})
    others = [ActivationSettings(layer=15, **change) for change in changes]
    assert len({plain.fingerprint(), *(other.fingerprint() for other in others)}) == 5
    assert all(ActivationSettings.model_validate(other.model_dump()) == other for other in others)
