"""Tokens a second of the monitor against the model's own forward pass at its layer, in turns in one run.

    python benchmarks/monitor.py                      random weights in the shape of SmolLM2-135M, layer 15
    python benchmarks/monitor.py --detectors 100

(a) bare     the decoder's forward, cut after the layer, on the same texts in the same batches
(b) monitor  `Monitor.scan`: the same pass, the detectors' features on every token, and alerts; texts come as tokens

Other work on the machine moves both; the ratios of neighbors in time, of which the median is shown, hold.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sae_core.dictionary import Dictionary
from sae_core.language_model import LanguageModel
from sae_core.prompt_reader import PromptReader
from sae_core.safety.monitor import Detector, Monitor

D_MODEL, LENGTH = 576, 256


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--detectors", type=int, default=24)
    parser.add_argument("--texts", type=int, default=32, help=f"of {LENGTH} tokens each, a repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    measure(options)


class Numbers:
    """A tokenizer of texts that are numbers: what is measured is the monitor, not the tokenizer."""

    bos_token_id = None

    def __call__(self, text: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[int(part) for part in text.split()])


def measure(options: argparse.Namespace) -> None:
    """Bare and monitored, in turns."""
    config = LlamaConfig(
        vocab_size=49_152, hidden_size=D_MODEL, intermediate_size=1536, num_hidden_layers=options.layer + 1,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    lm = LanguageModel(LlamaForCausalLM(config).to(getattr(torch, options.precision)), Numbers(), options.device)
    reader = PromptReader(lm, dictionary(options), "resid_post", options.layer, LENGTH, 1e9)
    detectors = [Detector(f"c{i}", i, "", [4.0] * 99, 1.0, 0.0) for i in range(options.detectors)]
    monitor = Monitor(reader, detectors)
    ids = torch.randint(0, 49_152, (options.texts, LENGTH))
    texts = [" ".join(map(str, row)) for row in ids.tolist()]
    batches = ids.split(4096 // LENGTH)

    def bare() -> None:
        for batch in batches:
            lm.capture("resid_post", options.layer, batch).float()

    timed(bare), timed(lambda: monitor.scan(texts))  # warm up
    pairs = [(timed(bare), timed(lambda: monitor.scan(texts))) for _ in range(options.repeats)]
    report(pairs, ids.numel(), options)


def dictionary(options: argparse.Namespace) -> Dictionary:
    """One with random directions."""
    W_dec = torch.nn.functional.normalize(torch.randn(options.d_sae, D_MODEL), dim=1).to(options.device)
    zeros = torch.zeros(options.d_sae, device=options.device)
    config = {"architecture": "batch_top_k", "k": 32}
    return Dictionary(W_dec.T.clone(), zeros, W_dec, torch.zeros(D_MODEL, device=options.device), zeros + 0.1, config)


def timed(work: Callable[[], Any]) -> float:
    """Seconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def report(pairs: Sequence[tuple[float, float]], tokens: int, options: argparse.Namespace) -> None:
    """Medians."""
    bare, watched = (tokens / statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"{options.detectors} detectors, {options.precision}, {options.device}, {options.threads} threads")
    print(f"bare     {bare:10,.0f} tokens/s\nmonitor  {watched:10,.0f} tokens/s\nratio    {ratio:.3f}")


if __name__ == "__main__":
    main()
