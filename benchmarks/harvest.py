"""Tokens a second of the harvest against a bare forward pass, measured in turns in one run.

    python benchmarks/harvest.py                      random weights in the shape of SmolLM2-135M, layer 15
    python benchmarks/harvest.py --model smollm2-135m-instruct --precision float32

(a) bare     the decoder's own forward, cut after the layer, on the same blocks, batches, masks and precision
(b) harvest  `sae_core.activations.harvest`, from blocks on disk to finished shards (the model is loaded before)
(c) full     the whole model with `output_hidden_states=True`, as one would do without this library

Other work on the machine moves all three; the ratios of neighbors in time, of which the median is shown, hold.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from sae_core.activations import harvest
from sae_core.activations.harvest import BATCH_TOKENS
from sae_core.language_model import LanguageModel
from sae_core.study import ActivationSettings, ModelSettings

BLOCK = 256


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="catalog name, Hugging Face id, folder or .gguf; default: random weights")
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens a repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    measure(load(options), options)


def load(options: argparse.Namespace) -> LanguageModel:
    """The model, or one with random weights in SmolLM2-135M's shape."""
    if options.model:
        return LanguageModel.load(ModelSettings(source=options.model), options.device, options.precision)
    config = LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(getattr(torch, options.precision))
    return LanguageModel(model, None, options.device)


def measure(lm: LanguageModel, options: argparse.Namespace) -> None:
    """Take turns, then print tokens a second and the median ratios."""
    with tempfile.TemporaryDirectory() as name:
        token_ids, documents = write_corpus(Path(name), options.tokens, lm.vocab_size)
        turns = {
            "bare": lambda: bare(lm, options.layer, token_ids, documents),
            "harvest": lambda: run_harvest(lm, options, Path(name)),
            "full": lambda: full(lm, token_ids, documents),
        }
        for run in turns.values():
            run()  # warm up
        times = [{turn: timed(run) for turn, run in turns.items()} for _ in range(options.repeats)]
    n = token_ids.numel()
    for turn in turns:
        rates = [n / t[turn] for t in times]
        ratio = statistics.median(t["bare"] / t[turn] for t in times)
        print(f"{turn:8} {statistics.median(rates):9.0f} tokens/s  (best {max(rates):.0f})   {ratio:6.1%} of bare")
    print(f"harvest / full: {statistics.median(t['full'] / t['harvest'] for t in times):.2f}x")


def write_corpus(folder: Path, n_tokens: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens in documents of 50 to 600 tokens, all for training."""
    rng = np.random.default_rng(0)
    shape = (n_tokens // BLOCK, BLOCK)
    documents = np.repeat(np.arange(n_tokens // 50), rng.integers(50, 600, n_tokens // 50))[: shape[0] * BLOCK]
    train = {"token_ids": rng.integers(3, vocab, shape).astype(np.int32), "documents": documents.reshape(shape)}
    train = {name: array.astype(np.int32) for name, array in train.items()}
    train["positions"] = np.zeros(shape, np.int32)
    save_file(train, folder / "train.safetensors")
    save_file({name: array[:0] for name, array in train.items()}, folder / "held_out.safetensors")
    return torch.from_numpy(train["token_ids"]), torch.from_numpy(train["documents"])


def batches(lm: LanguageModel, token_ids: torch.Tensor, documents: torch.Tensor) -> list[dict]:
    """Arguments of the forward passes over all blocks."""
    rows = BATCH_TOKENS[lm.device.type] // BLOCK
    return [lm._inputs(*pair) for pair in zip(token_ids.split(rows), documents.split(rows), strict=True)]


@torch.inference_mode()
def bare(lm: LanguageModel, layer: int, token_ids: torch.Tensor, documents: torch.Tensor) -> None:
    """The decoder cut after `layer`, by its own configuration (the final norm runs too: a few parts in a thousand)."""
    config = lm.model.config
    with mock.patch.object(config, "num_hidden_layers", layer + 1):
        for inputs in batches(lm, token_ids, documents):
            lm.model.model(**inputs)
    synchronize(lm)


@torch.inference_mode()
def full(lm: LanguageModel, token_ids: torch.Tensor, documents: torch.Tensor) -> None:
    """The whole model, all hidden states, logits too."""
    for inputs in batches(lm, token_ids, documents):
        lm.model(**inputs, output_hidden_states=True)
    synchronize(lm)


def run_harvest(lm: LanguageModel, options: argparse.Namespace, corpus: Path) -> None:
    """The stage as it is, with the model at hand."""
    site = ActivationSettings(layer=options.layer, precision=options.precision)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(LanguageModel, "load", return_value=lm):
        harvest(site, ModelSettings(source="at-hand"), corpus, Path(folder), options.device)


def synchronize(lm: LanguageModel) -> None:
    """Wait for the device."""
    if lm.device.type == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], None]) -> float:
    """Seconds that `run` takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
