"""How fast a dictionary trains, against the limit that the encoder product sets on the same machine.

    python benchmarks/training.py                       both sizes of the table in RESULTS.md
    python benchmarks/training.py --d-model 768 --d-sae 24576

Activations are planted (sparse sums of random directions), so that selection and AuxK see what they see in earnest.
Times are medians over the steps after warm-up.
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sae_core.dictionary.sparse import encoder_dtype
from sae_core.dictionary.trainer import Training
from sae_core.study import DictionarySettings

WARM_UP, STEPS = 5, 20


class Planted:
    """A source of activations with structure: each the sum of some of many directions, and a common offset."""

    def __init__(self, d_model: int, n: int, active: int = 32, directions: int = 4096) -> None:
        generator = torch.Generator().manual_seed(0)
        table = torch.nn.functional.normalize(torch.randn(directions, d_model, generator=generator), dim=1)
        chosen = torch.randint(directions, (n, active), generator=generator)
        weights = torch.rand(n, active, generator=generator)
        sums = torch.nn.functional.embedding_bag(chosen, table, per_sample_weights=weights, mode="sum")
        self.x = (sums + 0.02 * torch.randn(n, d_model, generator=generator)).bfloat16()
        self.n_kept, self.d_model = self.x.shape

    def statistics(self) -> tuple[Tensor, Tensor]:
        return self.x.float().mean(0), self.x.float().square().sum(1).mean()[None]

    def batches(self, batch_tokens: int, n_steps: int, seed: int, start_step: int = 0) -> Iterator[Tensor]:
        parts = self.x.split(batch_tokens)
        return (parts[step % len(parts)] for step in range(start_step, n_steps))


def median_seconds(run: Callable[[], object]) -> float:
    """Median time of a call, after warm-up."""
    for _ in range(WARM_UP):
        run()
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def compare(d_model: int, d_sae: int, k: int, batch: int) -> None:
    """Print one size's line: our step, the encoder product alone, and the share of the step that it is."""
    source = Planted(d_model, 8 * batch)
    settings = DictionarySettings(d_sae=d_sae, k=k, batch_tokens=batch, tokens=(WARM_UP + STEPS) * batch)
    steps = Training(settings, source).run(source)
    ours = median_seconds(lambda: next(steps))
    dtype = encoder_dtype(torch.device("cpu"))
    x, weight = source.x[:batch].to(dtype), torch.randn(d_sae, d_model).to(dtype)
    limit = median_seconds(lambda: torch.nn.functional.linear(x, weight))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{d_model:7} {d_sae:7} {k:4} {batch:6} {batch / ours:12,.0f} {batch / limit:14,.0f} "
        f"{limit / ours:10.0%} {2 * batch * d_model * d_sae / limit / 1e9:10,.0f} {peak:8.2f}"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("d-model", 0), ("d-sae", 8192), ("k", 32), ("batch", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    sizes = [(given.d_model, given.d_sae)] if given.d_model else [(576, 4096), (576, 8192), (768, 24576)]
    dtype = encoder_dtype(torch.device("cpu"))
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, encoder product in {dtype}")
    print("d_model   d_sae    k  batch   tokens/s  product alone  its share   GFLOP/s  peak GB")
    for d_model, d_sae in sizes:
        compare(d_model, d_sae, given.k, given.batch)


if __name__ == "__main__":
    main()
