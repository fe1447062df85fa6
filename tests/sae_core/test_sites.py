"""Every architecture that `docs/models.md` names, tiny and random: what is read is what the plain model computes."""

import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as hf
from torch import Tensor

from sae_core.language_model import LanguageModel, ModelError
from sae_core.study import ModelSettings

WINDOW = 5
SHAPE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "sliding_window": WINDOW,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
"""All special tokens have the id 0, as Pythia's have."""
GLOBAL = {key: value for key, value in SHAPE.items() if key not in ("head_dim", "sliding_window")}
EXPERTS = SHAPE | {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1,
}  # fmt: skip
GPT = {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": 0,
       "eos_token_id": 0}  # fmt: skip
PICTURES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
            "image_size": 14, "patch_size": 7}  # fmt: skip
QWEN_PICTURES = {"depth": 3, "embed_dim": 16, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2,
                 "patch_size": 7, "intermediate_size": 16, "deepstack_visual_indexes": [0]}  # fmt: skip
QWEN_MARKS = {"image_token_id": 94, "video_token_id": 93, "vision_start_token_id": 92, "vision_end_token_id": 91}
THREE_AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
ONE_AXIS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}


class Parts(NamedTuple):
    """A model and where, by name, a person would place hooks: the layers, and in a layer the sublayers."""

    build: Callable[[], Any]
    layers: str = "model.layers"
    attn_out: str = "self_attn"
    mlp_in: str = "mlp"
    mlp_out: str = "mlp"


def _named(name: str, shape: dict[str, Any], **parts: str) -> Parts:
    return Parts(lambda: getattr(hf, f"{name}ForCausalLM")(getattr(hf, f"{name}Config")(**shape)), **parts)


def _tower(name: str, vision: dict[str, Any], text: dict[str, Any], **options: Any) -> Callable[[], Any]:
    def build() -> Any:
        config = getattr(hf, f"{name}Config")(text_config=text, vision_config=vision, **options)
        return getattr(hf, f"{name}ForConditionalGeneration")(config)

    return build


NORMED = {"attn_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"}
"""Where the sublayer's output goes through a norm before it is added."""
TOWER = "model.language_model.layers"
MODELS = {
    "gpt2": Parts(lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT)), "transformer.h", "attn"),
    "gptj": Parts(lambda: hf.GPTJForCausalLM(hf.GPTJConfig(**GPT, rotary_dim=4)), "transformer.h", "attn"),
    "gpt_neo": Parts(
        lambda: hf.GPTNeoForCausalLM(
            hf.GPTNeoConfig(
                vocab_size=96, hidden_size=32, num_layers=3, num_heads=4, max_position_embeddings=64,
                attention_types=[[["global", "local", "global"], 1]], window_size=WINDOW,
                bos_token_id=0, eos_token_id=0,
            )
        ),
        "transformer.h", "attn",
    ),
    "gpt_neox": _named("GPTNeoX", SHAPE, layers="gpt_neox.layers", attn_out="attention"),
    "opt": _named(
        "OPT", SHAPE | {"ffn_dim": 48, "word_embed_proj_dim": 32},
        layers="model.decoder.layers", mlp_in="fc1", mlp_out="fc2",
    ),
    "llama": _named("Llama", SHAPE),
    "mistral": _named("Mistral", SHAPE),
    "phi": _named("Phi", SHAPE, mlp_in="mlp"),
    "phi3": _named("Phi3", SHAPE),
    "gemma": _named("Gemma", SHAPE),
    "gemma2": _named("Gemma2", SHAPE, **NORMED),
    "gemma3_text": Parts(lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**SHAPE)), **NORMED),
    "qwen2": _named("Qwen2", SHAPE | {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": _named("Qwen3", SHAPE),
    "olmo2": _named("Olmo2", SHAPE, **NORMED),
    "mixtral": _named("Mixtral", EXPERTS),
    "qwen2_moe": _named("Qwen2Moe", EXPERTS),
    "qwen3_moe": _named("Qwen3Moe", EXPERTS),
    "gpt_oss": _named("GptOss", EXPERTS | ONE_AXIS),
    "falcon": _named("Falcon", GLOBAL, layers="transformer.h", attn_out="self_attention"),
    "gemma3": Parts(_tower("Gemma3", PICTURES, SHAPE, mm_tokens_per_image=4), TOWER, **NORMED),
    "smolvlm": Parts(
        _tower("SmolVLM", PICTURES, SHAPE | {"model_type": "llama"}, scale_factor=2, image_token_id=95),
        "model.text_model.layers",
    ),
    "qwen2_vl": Parts(_tower("Qwen2VL", QWEN_PICTURES, SHAPE | THREE_AXES, **QWEN_MARKS), TOWER),
    "qwen2_5_vl": Parts(
        _tower("Qwen2_5_VL", QWEN_PICTURES | {"hidden_size": 16}, SHAPE | THREE_AXES, **QWEN_MARKS), TOWER
    ),
    "qwen3_vl": Parts(
        _tower("Qwen3VL", QWEN_PICTURES | {"hidden_size": 16}, SHAPE | THREE_AXES, **QWEN_MARKS), TOWER
    ),
}  # fmt: skip
HOOKS = ("resid_pre", "attn_out", "mlp_in", "mlp_out", "resid_post")
EVERYWHERE = [(hook, layer) for layer in range(3) for hook in HOOKS]
IDS = torch.randint(0, 90, (2, 24), generator=torch.Generator().manual_seed(1))
DOCUMENTS = torch.tensor([[0] * 7 + [1] + [2] * 16, [3] * 12 + [4] * 9 + [-1] * 3])
"""One of a single token, some longer than the attention window, and padding."""
architectures = pytest.mark.parametrize("name", MODELS)


@cache
def model_of(name: str) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(MODELS[name].build(), tokenizer=None)


def by_hand(name: str, ids: Tensor) -> dict[tuple[str, int], Tensor]:
    """All sites from one pass of the whole model, by hooks on modules called by name and by `output_hidden_states`."""
    model, parts, found = model_of(name).model, MODELS[name], {}
    handles = []
    for layer in range(3):
        for hook in ("attn_out", "mlp_out"):
            module = model.get_submodule(f"{parts.layers}.{layer}.{getattr(parts, hook)}")

            def gave(_: Any, __: Any, output: Any, at: Any = (hook, layer)) -> None:
                found[at] = (output[0] if isinstance(output, tuple) else output).clone()

            handles.append(module.register_forward_hook(gave))

        def given(_: Any, args: Any, kwargs: Any, at: Any = ("mlp_in", layer)) -> None:
            found[at] = args[0] if args else kwargs["hidden_states"]

        module = model.get_submodule(f"{parts.layers}.{layer}.{parts.mlp_in}")
        handles.append(module.register_forward_pre_hook(given, with_kwargs=True))
    last: list[Tensor] = []
    layer_2 = model.get_submodule(f"{parts.layers}.2")
    handles.append(layer_2.register_forward_hook(lambda _, __, out: last.append(out[0] if type(out) is tuple else out)))
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    for layer in range(3):
        found["resid_pre", layer] = states[layer]
        found["resid_post", layer] = states[layer + 1] if layer < 2 else last[0]  # the last state is normed
    return found


@architectures
def test_all_sites_come_from_one_pass_and_equal_hidden_states_and_hooks_placed_by_hand(name: str) -> None:
    lm, expected = model_of(name), by_hand(name, IDS)
    together = lm.capture_many(EVERYWHERE, IDS)
    for site, acts in zip(EVERYWHERE, together, strict=True):
        assert acts.shape == (2, 24, 32)
        assert torch.equal(acts, expected[site].view_as(acts)), site


@architectures
def test_sublayers_put_out_what_they_add_to_the_residual_stream(name: str) -> None:
    for layer in range(3):
        sites = [(hook, layer) for hook in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
        before, attention, mlp, after = model_of(name).capture_many(sites, IDS)
        torch.testing.assert_close(before + attention + mlp, after)


@architectures
def test_packed_documents_get_the_activations_and_logits_they_get_alone(name: str) -> None:
    lm = model_of(name)
    packed = lm.capture_many(EVERYWHERE, IDS, DOCUMENTS)
    logits = lm.logits(IDS, DOCUMENTS)
    for document in (1, 2, 4):
        row = int(document > 2)
        here = DOCUMENTS[row] == document
        alone = lm.capture_many(EVERYWHERE, IDS[row, here][None])
        for site, together, apart in zip(EVERYWHERE, packed, alone, strict=True):
            torch.testing.assert_close(together[row, here], apart[0], msg=lambda m, at=site: f"{at}: {m}")
        torch.testing.assert_close(logits[row, here], lm.logits(IDS[row, here][None])[0])
    run_on = lm.capture("resid_post", 2, IDS)
    assert not torch.isclose(run_on[0, 8:12], packed[-1][0, 8:12], rtol=1e-2, atol=1e-4).all(dim=-1).any()


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "qwen2_moe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_documents_are_alone_to_the_precision_of_half_floats(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    lm = LanguageModel(MODELS[name].build().to(dtype), None)
    packed = lm.capture("resid_post", 2, IDS, DOCUMENTS)
    alone = lm.capture("resid_post", 2, IDS[:1, 8:])
    assert packed.dtype == dtype
    torch.testing.assert_close(packed[0, 8:], alone[0], rtol=8 * torch.finfo(dtype).eps, atol=2e-3)


@pytest.mark.parametrize("name", ["opt", "falcon"])
@pytest.mark.parametrize("hook", HOOKS)
def test_an_edit_sees_packed_tokens_also_where_documents_are_run_apart(name: str, hook: str) -> None:
    lm = model_of(name)
    chosen = (torch.arange(24) % 3 == 0).expand(2, -1)

    def push(x: Tensor) -> Tensor:
        assert x.shape == (2, 24, 32)
        return x + chosen[..., None]

    with lm.edit(hook, 1, push):
        packed = lm.logits(IDS, DOCUMENTS)
    with lm.edit(hook, 1, lambda x: x + chosen[:1, 8:, None]):
        alone = lm.logits(IDS[:1, 8:])
    torch.testing.assert_close(packed[0, 8:], alone[0])
    assert not torch.isclose(alone, lm.logits(IDS[:1, 8:])).all()


def test_one_pass_for_many_sites_ends_after_the_last_of_them() -> None:
    lm, ran = model_of("gpt2"), []
    handles = [m.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, m in enumerate(lm.model.transformer.h)]
    mlp, stream = lm.capture_many([("mlp_out", 1), ("resid_post", 0)], IDS)
    for handle in handles:
        handle.remove()
    assert ran == [0]  # layer 1 was left at its MLP
    assert torch.equal(mlp, lm.capture("mlp_out", 1, IDS))
    assert torch.equal(stream, lm.capture("resid_post", 0, IDS))


def test_a_model_that_attends_to_later_tokens_is_refused() -> None:
    config = hf.BertConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                           num_attention_heads=4, initializer_range=0.2)  # fmt: skip
    with pytest.raises(ModelError, match="BertLMHeadModel attends to later tokens: give a causal language model"):
        LanguageModel(hf.BertLMHeadModel(config), None)


@pytest.mark.parametrize("hook", ["attn_out", "mlp_out"])
def test_a_sublayer_that_adds_the_residual_stream_itself_is_refused(hook: str) -> None:
    bloom = LanguageModel(hf.BloomForCausalLM(hf.BloomConfig(vocab_size=96, hidden_size=32, n_layer=3, n_head=4)), None)
    with pytest.raises(ModelError, match=rf"{hook}: BloomBlock has none \(Bloom\w+ adds the residual stream"):
        bloom.site(hook, 1)
    assert bloom.capture("mlp_in", 1, IDS).shape == (2, 24, 32)
    packed = bloom.capture("resid_post", 2, IDS, DOCUMENTS)
    torch.testing.assert_close(packed[0, 8:], bloom.capture("resid_post", 2, IDS[:1, 8:])[0])


def test_a_model_without_attention_is_read_at_its_residual_stream_document_by_document() -> None:
    config = hf.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=3, state_size=4, initializer_range=0.5)
    lm = LanguageModel(hf.MambaForCausalLM(config), None)
    packed = lm.capture("resid_post", 2, IDS, DOCUMENTS)
    torch.testing.assert_close(packed[0, 8:], lm.capture("resid_post", 2, IDS[:1, 8:])[0])
    with pytest.raises(ModelError, match=r"attn_out: MambaBlock has none \(no class named attention was found\)"):
        lm.site("attn_out", 1)


@pytest.mark.parametrize("name", ["gemma3", "smolvlm", "qwen2_vl", "qwen2_5_vl"])
def test_the_language_tower_of_a_model_on_disk_is_loaded(name: str, tiny_model: Path, tmp_path: Path) -> None:
    model_of(name).model.save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / file, tmp_path)
    loaded = LanguageModel.load(ModelSettings(source=str(tmp_path)), precision="float32")
    assert torch.equal(loaded.capture("mlp_out", 1, IDS), model_of(name).capture("mlp_out", 1, IDS))
    outline = LanguageModel.outline(ModelSettings(source=str(tmp_path)))
    assert (outline.n_layers, outline.d_model, outline.context) == (3, 32, 64)
    assert outline.site("mlp_in", 2).side == "input"


def test_an_encoder_and_decoder_is_refused_in_one_line(tmp_path: Path) -> None:
    hf.T5Config(vocab_size=96, d_model=32, num_layers=3).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"T5Config") as refused:
        LanguageModel.outline(ModelSettings(source=str(tmp_path)))
    assert "\n" not in str(refused.value)


def test_the_table_in_the_documents_names_every_architecture_that_is_tested_and_no_other() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text("utf-8")
    rows = re.findall(r"^\| [^|]+ \| `(\w+)` \| (?:positions|rows)", text, re.M)
    assert rows == list(dict.fromkeys(rows))
    assert set(rows) == set(MODELS)
    assert {name for name in MODELS if not model_of(name)._restarts} == set(re.findall(r"`(\w+)` \| rows", text))
