from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer


def test_the_tiny_model_loads_and_its_tokenizer_round_trips_any_text(tiny_model: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    text = "Мост naïve \U0001f600 def f(x):\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert model.config.num_hidden_layers == 4
    assert len(tokenizer) == model.config.vocab_size
