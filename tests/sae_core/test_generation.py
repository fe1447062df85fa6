"""Generation in batches, steered and not, against one row alone and against the library's own."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sae_core.dictionary import Dictionary
from sae_core.generation import Prompt, Sampling, Token, WholeCharacters, generate, read_prompt, side_by_side, stream
from sae_core.language_model import LanguageModel, ModelError
from sae_core.names import Site
from sae_core.steering import Scope, Steer, Steering

D_SAE = 16
SITE = Site("tiny-llama", "resid_post", 1, "mini")
TURNS = [
    {"role": "user", "content": "The river"},
    {"role": "assistant", "content": "rose."},
    {"role": "user", "content": "The bridge"},
]


def steering(steers: list[Steer], scope: Scope = "all") -> Steering:
    rng = torch.Generator().manual_seed(3)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, 32, generator=rng), dim=1)
    zeros = torch.zeros(D_SAE)
    dictionary = Dictionary(W_dec.T.clone(), zeros, W_dec, torch.zeros(32), zeros, {"architecture": "batch_top_k"})
    return Steering(SITE, dictionary, steers, torch.ones(D_SAE), scope=scope)


def text(tokens: list[Token]) -> str:
    return "".join(token.text for token in tokens)


def alone(lm: LanguageModel, ids: list[int], n: int, edit: Steering | None = None) -> list[int]:
    """The likeliest continuation without a cache: the whole text is read again for each token."""
    ids = list(ids)
    for _ in range(n):
        if edit is None:
            logits = lm.logits(torch.tensor([ids]))
        else:
            with edit.applied(lm):
                logits = lm.logits(torch.tensor([ids]))
        ids.append(int(logits[0, -1].argmax()))
    return ids[-n:]


def test_a_steered_cache_says_what_reading_everything_again_says(lm: LanguageModel) -> None:
    prompt, edit = read_prompt(lm, TURNS), steering([Steer(3, 8.0), Steer(4, -2.0, "add")])
    steered = [token.id for token in stream(lm, prompt, Sampling(12), edit)]
    assert steered == alone(lm, prompt.ids, len(steered), edit) != alone(lm, prompt.ids, len(steered))


def test_rows_of_unequal_length_say_what_each_says_alone(lm: LanguageModel) -> None:
    prompts = [read_prompt(lm, p) for p in ("Rain", "The quick brown fox jumps over", TURNS)]
    samplings = [Sampling(10), Sampling(6, 0.9, seed=4), Sampling(10, 1.0, 0.7, seed=5)]
    for edit in (None, steering([Steer(3, 8.0)]), steering([Steer(3, 8.0)], "last_turn")):
        rows: list[list[Token]] = [[], [], []]
        for step in generate(lm, prompts, samplings, edit):
            for row, token in step.items():
                rows[row].append(token)
        for row, tokens in enumerate(rows):
            single = list(stream(lm, prompts[row], samplings[row], edit))
            assert [t._replace(logprob=0.0) for t in tokens] == [t._replace(logprob=0.0) for t in single]
            assert [t.logprob for t in tokens] == pytest.approx([t.logprob for t in single], abs=1e-3)


def test_log_probabilities_are_those_of_the_steered_model(lm: LanguageModel) -> None:
    prompt, edit = read_prompt(lm, "The river"), steering([Steer(3, 8.0)])
    tokens = list(stream(lm, prompt, Sampling(8, temperature=1.5, seed=1), edit))
    with edit.applied(lm):
        logits = lm.logits(torch.tensor([prompt.ids + [token.id for token in tokens]]))[0].log_softmax(-1)
    expected = [float(logits[len(prompt.ids) - 1 + i, token.id]) for i, token in enumerate(tokens)]
    assert [token.logprob for token in tokens] == pytest.approx(expected, abs=1e-3)


def test_two_streams_that_take_turns_do_not_touch_each_other(lm: LanguageModel) -> None:
    prompt, edit, sampling = read_prompt(lm, TURNS), steering([Steer(3, 8.0)]), Sampling(12, 0.8, seed=2)
    both: dict[str, list[Token]] = {"default": [], "steered": []}
    for name, token in side_by_side(lm, prompt, sampling, edit):
        both[name].append(token)
    assert both["default"] == list(stream(lm, prompt, sampling))
    assert both["steered"] == list(stream(lm, prompt, sampling, edit))
    assert text(both["default"]) != text(both["steered"])


def test_an_abandoned_steered_stream_leaves_the_model_as_it_was(lm: LanguageModel) -> None:
    ids = torch.tensor([[5, 6, 7]])
    plain = lm.logits(ids)
    abandoned = stream(lm, Prompt([5, 6, 7]), Sampling(50), steering([Steer(3, 8.0)]))
    next(abandoned)
    assert torch.equal(lm.logits(ids), plain)
    del abandoned


@pytest.mark.parametrize("scope", ["all", "generated", "last_turn", "no_special"])
def test_a_scope_steers_its_positions_and_no_others(lm: LanguageModel, scope: Scope) -> None:
    prompt, edit, seen = read_prompt(lm, TURNS), steering([Steer(3, 8.0)], scope), []
    ids = [token.id for token in stream(lm, prompt, Sampling(4), edit)]

    def changed(x: Tensor) -> None:
        seen.append(x)

    original = Steering.__call__

    def spy(self: Steering, x: Tensor, where: Tensor | None = None, read: Tensor | None = None) -> Tensor:
        edited = original(self, x, where, read)
        changed((edited != x).any(-1)[0])
        return edited

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Steering, "__call__", spy)
        list(stream(lm, prompt, Sampling(4), edit))
    steered = torch.cat(seen)
    read = prompt.ids + ids[:-1]
    special = [token in lm.tokenizer.all_special_ids for token in read]
    last_turn = lm.tokenizer.decode(read[prompt.last_turn : len(prompt.ids)])
    assert last_turn.startswith("The bridge<|end|>")
    expected = {
        "all": [True] * len(read),
        "generated": [i >= len(prompt.ids) for i in range(len(read))],
        "last_turn": [i >= prompt.last_turn for i in range(len(read))],
        "no_special": [not is_special for is_special in special],
    }[scope]
    assert any(special)
    assert steered.tolist() == expected


def test_stop_texts_end_the_answer_and_are_no_part_of_it(lm: LanguageModel) -> None:
    prompt = read_prompt(lm, "Rain fell on")
    whole = text(list(stream(lm, prompt, Sampling(40, 1.0, seed=3))))
    assert len(whole) > 12
    stop = whole[7:10]
    tokens = list(stream(lm, prompt, Sampling(40, 1.0, seed=3, stop=("never to be seen", stop))))
    assert text(tokens) == whole[: whole.index(stop)]
    assert tokens[-1].finish == "stop"
    assert text(list(stream(lm, prompt, Sampling(40, 1.0, seed=3, stop=(whole[-1] + "and more",))))) == whole


def test_a_text_that_is_cut_off_says_so(lm: LanguageModel) -> None:
    tokens = list(stream(lm, read_prompt(lm, "Rain fell on"), Sampling(3)))
    assert [token.finish for token in tokens] == ["", "", "length"]
    near = Prompt([5] * 509)
    assert len(list(stream(lm, near, Sampling(50)))) <= 3  # 512 is the context


def test_top_p_draws_from_the_likeliest_alone(lm: LanguageModel) -> None:
    prompt = read_prompt(lm, "Rain fell on")
    likeliest = [token.id for token in stream(lm, prompt, Sampling(10))]
    assert [token.id for token in stream(lm, prompt, Sampling(10, 1.0, 1e-6, seed=9))] == likeliest
    probabilities = lm.logits(torch.tensor([prompt.ids]))[0, -1].softmax(-1)
    for seed in range(20):
        (token,) = stream(lm, prompt, Sampling(1, 1.0, 0.5, seed=seed))
        above = probabilities[probabilities > probabilities[token.id]].sum()
        assert above < 0.5


def test_drawing_follows_the_distribution(lm: LanguageModel) -> None:
    prompt, n = read_prompt(lm, "Rain fell on"), 400
    probabilities = (lm.logits(torch.tensor([prompt.ids]))[0, -1] / 0.5).softmax(-1)
    step = next(generate(lm, [prompt] * n, [Sampling(1, 0.5, seed=seed) for seed in range(n)]))
    likeliest = int(probabilities.argmax())
    share = sum(token.id == likeliest for token in step.values()) / n
    p = float(probabilities[likeliest])
    assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize(
    ("sampling", "why"),
    [
        (Sampling(temperature=-1.0), "temperature = -1"),
        (Sampling(temperature=float("nan")), "temperature = nan"),
        (Sampling(top_p=0.0), "top_p = 0"),
        (Sampling(top_p=float("nan")), "top_p = nan"),
    ],
)
def test_sampling_that_makes_no_sense_is_refused(lm: LanguageModel, sampling: Sampling, why: str) -> None:
    with pytest.raises(ModelError, match=why):
        next(stream(lm, Prompt([5]), sampling))


def test_a_last_turn_is_found_where_turns_repeat_and_where_there_is_none(lm: LanguageModel) -> None:
    same = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Hi"},
    ]
    prompt = read_prompt(lm, same)
    assert lm.tokenizer.decode(prompt.ids[prompt.last_turn :]).startswith("Hi<|end|>\n<|start|>assistant")
    assert read_prompt(lm, [{"role": "system", "content": "Hi"}]).last_turn == 0
    snow = read_prompt(lm, [{"role": "user", "content": "\N{SNOWMAN}"}])
    assert lm.tokenizer.decode(snow.ids[snow.last_turn :]).startswith("\N{SNOWMAN}")
    assert read_prompt(lm, "Hi").last_turn == 0


class Bytes:
    """One token a byte: the worst case."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


@given(st.text(alphabet="aé€😀 \n", max_size=12))
def test_streamed_pieces_are_whole_characters_and_join_to_the_text(whole: str) -> None:
    characters = WholeCharacters(Bytes())
    pieces = [piece for byte in whole.encode() if (piece := characters.add(byte))]
    assert pieces == list(whole)
    assert characters.rest() == ""


def test_half_a_character_is_shown_at_the_end_only() -> None:
    characters = WholeCharacters(Bytes())
    assert characters.add("é".encode()[0]) == ""
    assert characters.rest() == "\N{REPLACEMENT CHARACTER}"


def test_a_model_on_disk_without_a_pad_token_is_batched_too(lm: LanguageModel, tiny_model: Path) -> None:
    lm.tokenizer.pad_token, before = None, lm.tokenizer.pad_token
    try:
        step = next(generate(lm, [Prompt([5]), Prompt([5, 6])], [Sampling(1), Sampling(1)]))
    finally:
        lm.tokenizer.pad_token = before
    assert step.keys() == {0, 1}
