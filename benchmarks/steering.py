"""What steering costs: tokens a second of a steered stream against an unsteered one, in turns in one run.

    python benchmarks/steering.py                                  random weights in the shape of SmolLM2-135M
    python benchmarks/steering.py --model smollm2-135m-instruct --features 5

Both streams run token by token in turns, so that other work on the machine moves both. What holds are the
ratios of each steered token to the plain one beside it: their median, with a 95% bootstrap interval. First tokens read
the prompt; there is one a repeat, so ask for twenty or more. Wanted: at most 1.05 a token, at most 1.3 for the first.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import numpy as np
import torch
from harvest import load

from sae_core.dictionary import Dictionary
from sae_core.generation import Prompt, Sampling, stream
from sae_core.names import Site
from sae_core.steering import Steer, Steering

D_SAE = 4096


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="catalog name, Hugging Face id, folder or .gguf; default: random weights")
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--features", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=40, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each text")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lm = load(options)
    if lm.tokenizer is None:
        lm.tokenizer = _Nothing()
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, lm.d_model), dim=1).to(lm.device)
    zeros = torch.zeros(D_SAE, device=lm.device)
    config = {"architecture": "batch_top_k"}
    dictionary = Dictionary(
        W_dec.T.contiguous(), zeros, W_dec, torch.zeros(lm.d_model, device=lm.device), zeros, config
    )
    steers = [Steer(i, 1.0) for i in range(options.features)]
    steering = Steering(Site("model", "resid_post", options.layer, "none"), dictionary, steers, torch.ones(D_SAE))
    first: dict[str, list[float]] = {"plain": [], "steered": []}
    later: dict[str, list[float]] = {"plain": [], "steered": []}
    prompt = Prompt(list(range(5, 5 + options.prompt)))
    for repeat in range(options.repeats + 1):
        streams = {
            name: stream(lm, prompt, Sampling(options.tokens), steering if name == "steered" else None)
            for name in first
        }
        for token in range(options.tokens):
            order = list(streams) if (repeat + token) % 2 else list(streams)[::-1]
            took = {}
            for name in order:
                start = time.perf_counter()
                if next(streams[name], None) is not None:
                    took[name] = time.perf_counter() - start
            if len(took) < len(streams):  # a text has ended
                break
            for name, seconds in took.items() if repeat else ():  # the first turn warms up
                (later if token else first)[name].append(seconds)
    for name in first:
        rate, begins = 1 / statistics.median(later[name]), 1e3 * statistics.median(first[name])
        print(f"{name:8} {rate:7.1f} tokens/s, first token {begins:.0f} ms")
    for what, times, wanted in (("a token", later, 1.05), ("the first token", first, 1.3)):
        ratio, low, high = _ratio(times["steered"], times["plain"])
        verdict = "holds" if high <= wanted else "does not hold" if low > wanted else "is open"
        print(f"{what:15} takes {ratio:.3f} times as long [{low:.3f}, {high:.3f}]: at most {wanted} {verdict}")


def _ratio(steered: Sequence[float], plain: Sequence[float]) -> tuple[float, float, float]:
    """Median of the pairs' ratios, and the ends of its 95% bootstrap interval."""
    ratios = np.array(steered) / np.array(plain)
    drawn = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    return float(np.median(ratios)), *np.quantile(np.median(drawn, 1), [0.025, 0.975]).tolist()


class _Nothing:
    """Stands in for the tokenizer that random weights do not have."""

    eos_token_id = None
    all_special_ids: tuple[int, ...] = ()

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "x" * len(ids)


if __name__ == "__main__":
    main()
