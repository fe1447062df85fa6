"""Tokens a second of the harvest against a bare forward pass, measured in turns in one run.

    python benchmarks/harvest.py                      random weights in the shape of SmolLM2-135M, layer 15
    python benchmarks/harvest.py --model smollm2-135m-instruct --precision float32

(a) bare     the decoder's own forward, cut after the layer, on the same blocks, batches, masks and precision
(b) harvest  `sae_core.activations.harvest`, from blocks on disk to finished shards (the model is loaded before)
(c) full     the whole model with `output_hidden_states=True`, as one would do without this library
(d) saelens  `ActivationsStore.get_raw_llm_batch` on a HookedTransformer of the same shape, random weights, which stops
             after the layer; without the mixing buffer, and in blocks that attention runs through
(e) sparsify what its trainer does for a batch: the whole decoder with a hook that flattens and copies the output

Peers that are not installed are named and left out (`make peers` installs them). They keep nothing on disk.
Other work on the machine moves all of them; the ratios of neighbors in time, of which the median is shown, hold.
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
from sae_core.activations.passes import BATCH_TOKENS
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
        for peer, begin in PEERS.items():
            try:
                turns[peer] = begin(lm, options, token_ids)
            except (ImportError, PeerError) as error:
                print(f"{peer:8} not measured: {error}")
        for run in turns.values():
            run()  # warm up
        times = [{turn: timed(run) for turn, run in turns.items()} for _ in range(options.repeats)]
    n = token_ids.numel()
    for turn in turns:
        rates = [n / t[turn] for t in times]
        ratio = statistics.median(t["bare"] / t[turn] for t in times)
        print(f"{turn:8} {statistics.median(rates):9.0f} tokens/s  (best {max(rates):.0f})   {ratio:6.1%} of bare")
    for turn in turns.keys() - {"bare", "harvest"}:
        print(f"harvest / {turn}: {statistics.median(t[turn] / t['harvest'] for t in times):.2f}x")


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


class PeerError(Exception):
    """A peer that cannot be measured on this model."""


def saelens(lm: LanguageModel, options: argparse.Namespace, token_ids: torch.Tensor) -> Callable[[], None]:
    """SAELens's store, with the kind of model that it loads where one names no other."""
    from datasets import Dataset
    from sae_lens.training.activations_store import ActivationsStore
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    if not isinstance(lm.model, LlamaForCausalLM):
        raise PeerError("its model is built here in the shape of a Llama only")
    c = lm.model.config
    shape = HookedTransformerConfig(
        n_layers=c.num_hidden_layers, d_model=c.hidden_size, n_ctx=BLOCK, d_head=c.hidden_size // c.num_attention_heads,
        n_heads=c.num_attention_heads, n_key_value_heads=c.num_key_value_heads, d_mlp=c.intermediate_size,
        d_vocab=c.vocab_size, act_fn="silu", gated_mlp=True, normalization_type="RMS", final_rms=True,
        positional_embedding_type="rotary", rotary_dim=c.hidden_size // c.num_attention_heads,
        dtype=getattr(torch, options.precision), device=options.device, default_prepend_bos=False, init_weights=True,
    )  # fmt: skip
    rows = BATCH_TOKENS[lm.device.type] // BLOCK
    store = ActivationsStore(
        HookedTransformer(shape), Dataset.from_dict({"input_ids": token_ids.tolist()}), streaming=False,
        hook_name=f"blocks.{options.layer}.hook_resid_post", hook_head_index=None, context_size=BLOCK,
        d_in=c.hidden_size, n_batches_in_buffer=2, total_training_tokens=1, store_batch_size_prompts=rows,
        train_batch_size_tokens=2048, prepend_bos=False, normalize_activations="none", device=lm.device,
        dtype=options.precision, sequence_separator_token=None,
    )  # fmt: skip

    @torch.no_grad()
    def run() -> None:
        for _ in range(-(-len(token_ids) // rows)):
            store.get_raw_llm_batch()
        synchronize(lm)

    return run


def sparsify(lm: LanguageModel, options: argparse.Namespace, token_ids: torch.Tensor) -> Callable[[], None]:
    """The forward pass of sparsify's trainer, hook by hook as it is there; its own code begins to train in the hook."""
    import sparsify  # noqa: F401  (measured where it could be used)

    decoder, found = lm.model.model, []

    def hook(module: torch.nn.Module, inputs: object, output: object) -> None:
        acts = (output[0] if isinstance(output, tuple) else output).flatten(0, 1)
        found[:] = [acts.detach().clone()[torch.ones(len(acts), dtype=torch.bool)]]

    @torch.no_grad()
    def run() -> None:
        handle = decoder.layers[options.layer].register_forward_hook(hook)
        for ids in token_ids.split(BATCH_TOKENS[lm.device.type] // BLOCK):
            decoder(ids.to(lm.device))
        handle.remove()
        synchronize(lm)

    return run


PEERS = {"saelens": saelens, "sparsify": sparsify}


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
