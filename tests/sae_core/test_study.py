from sae_core.study import DictionarySettings


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
