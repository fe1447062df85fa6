import itertools
import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from sae_core.display import display_strings
from sae_core.errors import MindAtlasError
from sae_core.language_model import LanguageModel, ModelError, load_tokenizer, places
from sae_core.pretrained import _compact, _dequantized
from sae_core.progress import silent
from sae_core.study import ModelSettings

TURNS = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 512, (3, 24), generator=torch.Generator().manual_seed(1))


def test_a_model_tells_its_shape(lm: LanguageModel) -> None:
    assert (lm.n_layers, lm.d_model, lm.vocab_size, lm.context) == (4, 32, 512, 512)


@pytest.mark.parametrize("layer", range(4))
def test_residual_stream_equals_the_hidden_states_of_transformers(
    lm: LanguageModel, ids: torch.Tensor, layer: int
) -> None:
    states: list[torch.Tensor] = []
    handle = lm.model.model.norm.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    with torch.no_grad():
        hidden = [*lm.model(ids, output_hidden_states=True).hidden_states[:-1], states[0]]
    handle.remove()
    assert torch.equal(lm.capture("resid_pre", layer, ids), hidden[layer])
    assert torch.equal(lm.capture("resid_post", layer, ids), hidden[layer + 1])


def test_sublayer_sites_add_up_to_the_residual_stream(lm: LanguageModel, ids: torch.Tensor) -> None:
    block = lm.model.model.layers[2]
    attended = lm.capture("resid_pre", 2, ids) + lm.capture("attn_out", 2, ids)
    with torch.no_grad():
        torch.testing.assert_close(lm.capture("mlp_in", 2, ids), block.post_attention_layernorm(attended))
        torch.testing.assert_close(lm.capture("mlp_out", 2, ids), block.mlp(lm.capture("mlp_in", 2, ids)))
    torch.testing.assert_close(attended + lm.capture("mlp_out", 2, ids), lm.capture("resid_post", 2, ids))


def test_capture_runs_no_layer_beyond_the_one_wanted(lm: LanguageModel, ids: torch.Tensor) -> None:
    ran: list[int] = []
    handles = [m.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, m in enumerate(lm.model.model.layers)]
    lm.capture("resid_post", 1, ids)
    lm.capture("mlp_in", 1, ids)
    for handle in handles:
        handle.remove()
    assert ran == [0, 1, 0]


def test_capture_leaves_no_hook_behind(lm: LanguageModel, ids: torch.Tensor) -> None:
    before = lm.logits(ids)
    lm.capture("resid_post", 1, ids)
    assert torch.equal(lm.logits(ids), before)


def test_a_segment_gets_the_activations_it_would_get_alone(lm: LanguageModel, ids: torch.Tensor) -> None:
    segments = torch.tensor([[5] * 24, [3] * 7 + [9] * 17, [0] + [1] * 2 + [4] * 20 + [-1]], dtype=torch.int32)
    together = lm.capture("resid_post", 3, ids, segments)
    logits = lm.logits(ids, segments)
    for row in range(3):
        for segment in segments[row].unique():
            here = segments[row] == segment
            torch.testing.assert_close(together[row, here], lm.capture("resid_post", 3, ids[row, here][None])[0])
            torch.testing.assert_close(logits[row, here], lm.logits(ids[row, here][None])[0])


@given(st.lists(st.integers(0, 2), min_size=1, max_size=12))
def test_positions_count_from_zero_in_each_segment(segments: list[int]) -> None:
    expected = [0]
    for before, after in itertools.pairwise(segments):
        expected.append(expected[-1] + 1 if before == after else 0)
    assert places(torch.tensor([segments]))[0].tolist() == expected


@pytest.mark.parametrize("hook", ["resid_pre", "resid_post", "mlp_in", "mlp_out", "attn_out"])
def test_an_edit_replaces_the_activation_inside_its_with_only(lm: LanguageModel, ids: torch.Tensor, hook: str) -> None:
    plain = lm.logits(ids)
    with lm.edit(hook, 1, lambda x: x):
        assert torch.equal(lm.logits(ids), plain)
    with lm.edit(hook, 1, torch.zeros_like):
        assert torch.equal(lm.capture(hook, 1, ids), torch.zeros(3, 24, 32))
        assert not torch.equal(lm.logits(ids), plain)
    assert torch.equal(lm.logits(ids), plain)


def test_an_edit_holds_in_generation_with_a_cache(lm: LanguageModel) -> None:
    def push(x: torch.Tensor) -> torch.Tensor:
        return x + 3 * torch.arange(32).cos()

    with lm.edit("resid_post", 1, push):
        cached = "".join(lm.generate("The river", 12))
        ids = lm.tokenizer("The river")["input_ids"]
        for _ in range(12):
            ids.append(int(lm.logits(torch.tensor([ids]))[0, -1].argmax()))
    written = ids[len(lm.tokenizer("The river")["input_ids"]) :]
    stop = written.index(2) if 2 in written else len(written)
    assert cached == lm.tokenizer.decode(written[:stop], skip_special_tokens=True)
    assert cached != "".join(lm.generate("The river", 12))


def test_generation_equals_that_of_transformers(lm: LanguageModel) -> None:
    ids = torch.tensor([lm.tokenizer("Rain fell on")["input_ids"]])
    theirs = lm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False)[
        0, ids.shape[1] :
    ]
    assert "".join(lm.generate("Rain fell on", 30)) == lm.tokenizer.decode(theirs, skip_special_tokens=True)


def test_the_same_seed_gives_the_same_text_and_another_seed_another(lm: LanguageModel) -> None:
    texts = ["".join(lm.generate(TURNS, 30, temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_messages_go_through_the_chat_template_and_text_does_not(lm: LanguageModel) -> None:
    prompt = "<|start|>user\nHello<|end|>\n<|start|>assistant\n"
    assert lm.prompt_ids(TURNS) == lm.prompt_ids(prompt) != lm.prompt_ids("Hello")


def test_without_a_chat_template_messages_are_plain_text(tiny_model: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(tiny_model, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    bare_lm = LanguageModel.load(ModelSettings(source=str(bare)))
    assert bare_lm.prompt_ids(TURNS) == bare_lm.prompt_ids("Hello")


def test_generation_stops_at_the_end_of_the_answer(lm: LanguageModel) -> None:
    end = lm.tokenizer.eos_token_id

    def end_now(x: torch.Tensor) -> torch.Tensor:
        return lm.model.model.embed_tokens.weight[end].expand_as(x) * 100

    with lm.edit("resid_post", 3, end_now):
        assert list(lm.generate("Rain", 5)) == []


@pytest.mark.parametrize(
    ("prompt", "options", "why"),
    [
        ("", {}, "empty"),
        ("Rain " * 600, {}, "context of 512"),
        ("Rain", {"temperature": -1.0}, "temperature = -1"),
        ("Rain", {"temperature": float("nan")}, "temperature = nan"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_refused(lm: LanguageModel, prompt: str, options: dict, why: str) -> None:
    with pytest.raises(ModelError, match=why):
        list(lm.generate(prompt, **options))


def test_token_strings_keep_spaces_and_show_byte_fragments(lm: LanguageModel) -> None:
    ids = lm.tokenizer(" the river", add_special_tokens=False)["input_ids"]
    assert "".join(lm.token_strings(ids)) == " the river"
    assert lm.token_strings(torch.tensor([2])) == ["<|end|>"]
    byte = lm.tokenizer.convert_tokens_to_ids("â")  # byte 0xe2 in the byte-level alphabet
    assert lm.token_strings([byte]) == ["\\xe2"]


def test_whole_character_tokens_are_shown_as_the_tokenizer_decodes_them(lm: LanguageModel) -> None:
    for i, shown in enumerate(display_strings(lm.tokenizer, len(lm.tokenizer))):
        decoded = lm.tokenizer.decode([i])
        assert shown == decoded or "\N{REPLACEMENT CHARACTER}" in decoded


def test_ids_beyond_the_tokenizer_have_no_text(lm: LanguageModel) -> None:
    assert display_strings(lm.tokenizer, len(lm.tokenizer) + 2)[-2:] == ["", ""]


def test_logits_of_the_next_token_are_the_last_of_all_and_follow_what_an_edit_puts_in(
    lm: LanguageModel, ids: torch.Tensor
) -> None:
    torch.testing.assert_close(lm.last_logits(ids, 3), lm.logits(ids)[:, -3:], atol=1e-4, rtol=1e-4)
    x = lm.capture("resid_post", 3, ids).requires_grad_()
    with lm.edit("resid_post", 3, lambda _: x.clone()):
        (g,) = torch.autograd.grad(lm.last_logits(ids)[:, -1, 7].sum(), x)
    assert not g[:, :-1].any()  # after the last layer, only the last token is read
    assert g[:, -1].abs().min() > 0


def test_the_unembedding_is_the_derivative_of_the_logits_up_to_the_norm(lm: LanguageModel, tiny_model: Path) -> None:
    with torch.no_grad():
        lm.model.model.norm.weight.copy_(torch.linspace(0.5, 2, 32))
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    expected = lm.model.lm_head(lm.model.model.norm(x)) * x.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(x @ lm.unembedding(), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        lm.model.model.norm.weight.fill_(1)


@pytest.mark.parametrize(
    "model",
    [
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=32, n_layer=3, n_head=2, n_positions=64)),
        lambda: GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=512,
                hidden_size=32,
                num_hidden_layers=3,
                num_attention_heads=2,
                intermediate_size=64,
                max_position_embeddings=64,
            )
        ),
    ],
    ids=["gpt2", "gpt_neox"],
)
def test_other_decoders_are_read_by_structure(model, ids: torch.Tensor) -> None:
    torch.manual_seed(0)
    other = LanguageModel(model(), tokenizer=None)
    with torch.no_grad():
        hidden = other.model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(other.capture("resid_post", 1, ids), hidden[2])
    for hook in ("mlp_in", "mlp_out", "attn_out"):
        assert other.capture(hook, 1, ids).shape == (3, 24, 32)
    segments = torch.tensor([[0] * 10 + [1] * 14]).expand(3, -1)
    alone = other.capture("resid_post", 2, ids[:, 10:])
    torch.testing.assert_close(other.capture("resid_post", 2, ids, segments)[:, 10:], alone)
    assert other.unembedding().shape == (32, 512)


@pytest.mark.parametrize("layer", [-1, 4])
def test_a_layer_out_of_range_is_refused_with_the_range(lm: LanguageModel, ids: torch.Tensor, layer: int) -> None:
    with pytest.raises(ModelError, match=f"layer = {layer}: the model has layers 0 to 3"):
        lm.capture("resid_post", layer, ids)


def test_rows_longer_than_the_context_are_refused(lm: LanguageModel) -> None:
    with pytest.raises(ModelError, match="513 tokens exceed the model's context of 512"):
        lm.capture("resid_post", 0, torch.zeros(1, 513, dtype=torch.int32))


def test_a_model_without_decoder_layers_is_refused(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    with pytest.raises(ModelError, match=r"no nn.ModuleList of 4 layers"):
        LanguageModel(model, None)


@pytest.mark.parametrize("damage", ["missing", "no_tokenizer", "no_weights", "cut_weights", "no_config", "bad_config"])
def test_a_model_that_cannot_be_loaded_is_refused_in_one_line(tiny_model: Path, tmp_path: Path, damage: str) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    if damage == "missing":
        shutil.rmtree(folder)
    elif damage == "no_tokenizer":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    elif damage == "no_weights":
        (folder / "model.safetensors").unlink()
    elif damage == "cut_weights":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "no_config":
        (folder / "config.json").unlink()
    else:
        (folder / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))
    with pytest.raises(MindAtlasError) as refused:
        LanguageModel.load(ModelSettings(source=str(folder)))
    assert "\n" not in str(refused.value)
    assert str(folder) in str(refused.value)


def test_a_hub_id_that_is_not_cached_is_refused_offline() -> None:
    with pytest.raises(ModelError, match="no-such-owner/no-such-model"):
        load_tokenizer(ModelSettings(source="no-such-owner/no-such-model"))


def _write_gguf(path: Path, folder: Path, kind: Kind = Kind.F32) -> None:
    """A GGUF of the tiny Llama, as llama.cpp lays it out (rows of Q and K interleaved for its RoPE).

    `kind` is that of its matrices.
    """
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    special = {token["id"] for token in tokenizer["added_tokens"]}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(4)
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(512)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([piece for piece, _ in vocab])
    writer.add_token_types([3 if i in special else 1 for _, i in vocab])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(2)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 4)
    for name, weight in load_file(folder / "model.safetensors").items():
        array = weight.float().numpy()
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            if part in name:
                array = array.reshape(heads, 2, -1, 32).swapaxes(1, 2).reshape(array.shape)
        stored = kind if array.ndim == 2 else Kind.F32
        writer.add_tensor(names.get_name(name, (".weight",)), gguf.quantize(array, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf_file(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    _write_gguf(path, tiny_model)
    return path


def test_a_gguf_is_dequantized_once_and_is_the_same_model(
    gguf_file: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ids: torch.Tensor
) -> None:
    monkeypatch.setenv("MIND_ATLAS_CACHE", str(tmp_path))
    reports: list[str] = []
    settings = ModelSettings(source=str(gguf_file))
    first = LanguageModel.load(settings, precision="float32", report=lambda _, __, unit, **___: reports.append(unit))
    assert "models" in reports
    made = next((tmp_path / "models").glob("tiny-*/model.safetensors"))
    changed = made.stat().st_mtime_ns
    LanguageModel.load(settings)
    assert made.stat().st_mtime_ns == changed
    plain = LanguageModel.load(ModelSettings(source=str(tiny_model)), precision="float32")
    torch.testing.assert_close(first.logits(ids), plain.logits(ids))
    assert first.prompt_ids(TURNS) == plain.prompt_ids(TURNS)
    assert len(load_file(made)) == len(load_file(tiny_model / "model.safetensors"))  # the tied weight is stored once


@pytest.mark.parametrize(
    ("values", "quantized", "dtype"),
    [
        ([[1.0, -1.5]], False, torch.bfloat16),
        ([[1.0, 1 + 2**-10]], False, torch.float16),
        ([[1.0, 1 + 2**-20]], False, torch.float32),
        ([[1e5, 1 + 2**-10]], False, torch.float32),
        ([[1.0, 1 + 2**-20]], True, torch.bfloat16),
        ([1.0, 1 + 2**-20], True, torch.float32),
    ],
)
def test_weights_are_kept_in_the_type_that_holds_them_and_quantized_matrices_in_bfloat16(
    values: list, quantized: bool, dtype: torch.dtype
) -> None:
    weight = torch.tensor(values)
    kept = _compact(weight, quantized)
    assert kept.dtype == dtype
    assert torch.equal(kept.bfloat16(), weight.bfloat16())
    assert torch.equal(kept.float(), weight) or (quantized and weight.ndim == 2)


def test_a_plain_gguf_loses_nothing_and_a_quantized_one_is_what_bfloat16_makes_of_it(
    gguf_file: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIND_ATLAS_CACHE", str(tmp_path))
    original = load_file(tiny_model / "model.safetensors")
    plain = load_file(_dequantized(gguf_file, silent) / "model.safetensors")
    for name in plain.keys() & original.keys():  # all but the tied weight, which has two names
        assert torch.equal(plain[name].float(), original[name])
    _write_gguf(tmp_path / "small.gguf", tiny_model, Kind.Q8_0)
    quantized = load_file(_dequantized(tmp_path / "small.gguf", silent) / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    exact = torch.from_numpy(gguf.dequantize(gguf.quantize(original[name].numpy(), Kind.Q8_0), Kind.Q8_0))
    assert quantized[name].dtype == torch.bfloat16
    assert torch.equal(quantized[name], exact.bfloat16())
    assert not torch.equal(exact, exact.bfloat16().float())


def test_a_killed_dequantization_leaves_nothing_that_counts(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIND_ATLAS_CACHE", str(tmp_path))
    monkeypatch.setattr("sae_core.pretrained.save_model", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        _dequantized(gguf_file, silent)
    assert not list((tmp_path / "models").glob("*/model.safetensors"))
    monkeypatch.undo()
    monkeypatch.setenv("MIND_ATLAS_CACHE", str(tmp_path))
    folder = _dequantized(gguf_file, silent)
    assert {file.name for file in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert [path.name for path in (tmp_path / "models").iterdir() if path.is_dir()] == [folder.name]


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIND_ATLAS_CACHE", str(tmp_path))
    (tmp_path / "bad.gguf").write_bytes(b"not a model at all" * 9)
    with pytest.raises(ModelError, match="cannot be read as a model"):
        load_tokenizer(ModelSettings(source=str(tmp_path / "bad.gguf")))


def test_an_outline_has_the_sites_and_the_context_of_the_model_and_no_weight(
    tiny_model: Path, gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIND_ATLAS_CACHE", str(tmp_path / "cache"))
    bare = shutil.copytree(tiny_model, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    for source in (bare, gguf_file):
        outline = LanguageModel.outline(ModelSettings(source=str(source)))
        assert (outline.n_layers, outline.d_model, outline.context) == (4, 32, 512)
        assert all(weight.is_meta for weight in outline.model.parameters())
        assert type(outline.site("attn_out", 3).module).__name__ == "LlamaAttention"
        with pytest.raises(ModelError, match="layer = 4: the model has layers 0 to 3"):
            outline.site("resid_post", 4)
    assert not (tmp_path / "cache").exists()  # nothing was de-quantized


def test_a_hook_that_the_model_lacks_is_refused() -> None:
    layers = MambaForCausalLM(MambaConfig(vocab_size=512, hidden_size=32, num_hidden_layers=2, state_size=4))
    with pytest.raises(ModelError, match=r"activations.hook = attn_out: MambaBlock has none .*: choose resid_post"):
        LanguageModel(layers, None).site("attn_out", 1)
