"""How fast a dictionary trains, beside the other libraries and the limit that the encoder product sets.

    python benchmarks/training.py                                  both sizes of RESULTS.md
    python benchmarks/training.py --size 576x4096 --steps 20       another size
    python benchmarks/training.py --architecture top_k --only ours --device cuda --batch 8192

Every library takes the same steps of Adam on the same planted activations (sparse sums of random directions), at the
same learning rate, each in a process of its own. They take turns, round after round, so that a machine whose speed
wanders is the same to all: a ratio is the median over the rounds of what each round's median steps say, with the least
and the largest. FVU is that of activations that none has seen, after all steps; memory is the peak above what was in
use before the first step. The other libraries are the extra `peers`; one that is not installed is named. All run as
they come, and `pipelines` asks torch for huge pages: `--huge-pages all` gives them to the others too, `none` to nobody.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `pipelines` has it, here for all libraries
os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1" if "cuda" not in sys.argv else "0")

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, linear, normalize

WARM_UP, HELD_OUT = 5, 4
"""Steps that are not timed, and batches on which FVU is measured."""
ROUNDS = 5


class Planted:
    """A source of activations with structure, E|x|^2 = d_model: sums of some of many directions, and an offset."""

    def __init__(self, d_model: int, n: int, device: str = "cpu", active: int = 32, directions: int = 4096) -> None:
        generator = torch.Generator().manual_seed(
            20240521
        )  # no seed of a library's: weights may not start as the truth
        table = normalize(torch.randn(directions, d_model, generator=generator), dim=1)
        chosen = torch.randint(directions, (n, active), generator=generator)
        sums = embedding_bag(chosen, table, per_sample_weights=torch.rand(n, active, generator=generator), mode="sum")
        x = (
            sums
            + 0.02 * torch.randn(n, d_model, generator=generator)
            + 0.05 * torch.randn(d_model, generator=generator)
        )
        self.x = (x * (d_model / x.square().sum(1).mean()).sqrt()).to(device)
        self.n_kept, self.d_model = self.x.shape

    def statistics(self) -> tuple[Tensor, Tensor]:
        return self.x.mean(0).cpu(), self.x.square().sum(1).mean()[None].cpu()

    def batches(self, batch_tokens: int, n_steps: int, seed: int, start_step: int = 0) -> Iterator[Tensor]:
        parts = self.x.split(batch_tokens)
        return (parts[step] for step in range(start_step, n_steps))


Step = Callable[[Tensor], object]
Reconstruct = Callable[[Tensor], Tensor]


def ours(given: argparse.Namespace, source: Planted, lr: float) -> tuple[Step, Reconstruct]:
    """This project's step, whole: selection, gradients, clipping, Adam, unit rows, counts of what is dead."""
    from sae_core.dictionary.trainer import Training
    from sae_core.study import DictionarySettings

    settings = DictionarySettings(
        architecture=given.architecture, d_sae=given.d_sae, k=given.k, batch_tokens=given.batch, lr=lr, lr_warmup=0,
        lr_decay=0, tokens=given.steps * given.batch,
    )  # fmt: skip
    training = Training(settings, source, given.device)

    def reconstruct(x: Tensor) -> Tensor:
        weights = training.learner.weights
        z = ((x * training.scaling.scale - weights.b_dec) @ weights.W_enc.T + weights.b_enc).relu()
        return (keep(z, given) @ weights.W_dec + weights.b_dec) / training.scaling.scale

    return training.learn, reconstruct


def saelens(given: argparse.Namespace, source: Planted, lr: float) -> tuple[Step, Reconstruct]:
    """`SAETrainer._train_step` of SAELens: forward pass, counts of what fired, clipping, Adam."""
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    classes = {
        "top_k": (TopKTrainingSAE, TopKTrainingSAEConfig),
        "batch_top_k": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    }
    sae_class, config_class = classes[given.architecture]
    torch.manual_seed(0)
    sae = sae_class(config_class(d_in=given.d_model, d_sae=given.d_sae, k=given.k, device=given.device))
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr)
    silent = torch.zeros(given.d_sae, device=given.device)
    fired = torch.zeros(given.d_sae, device=given.device)

    def step(x: Tensor) -> None:
        nonlocal silent, fired
        said = TrainStepInput(
            sae_in=x, dead_neuron_mask=silent > 1000, coefficients={}, n_training_steps=0, is_logging_step=False
        )
        out = sae.training_forward_pass(step_input=said)
        with torch.no_grad():
            firing = out.feature_acts.bool().float()
            silent += 1
            silent[firing.sum(-2).bool()] = 0
            fired += firing.sum(0)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, lambda x: sae.decode(sae.encode(x))


def dictionary_learning(given: argparse.Namespace, source: Planted, lr: float) -> tuple[Step, Reconstruct]:
    """`update` of dictionary_learning's trainer."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = {"top_k": TopKTrainer, "batch_top_k": BatchTopKTrainer}[given.architecture](
        steps=given.steps, activation_dim=given.d_model, dict_size=given.d_sae, k=given.k, layer=0, lm_name="", lr=lr,
        warmup_steps=0, seed=0, device=given.device,
    )  # fmt: skip
    steps = iter(range(given.steps))

    def reconstruct(x: Tensor) -> Tensor:
        z = trainer.ae.encoder(x - trainer.ae.b_dec).relu()
        return trainer.ae.decode(keep(z, given))

    return lambda x: trainer.update(next(steps), x), reconstruct


def sparsify(given: argparse.Namespace, source: Planted, lr: float) -> tuple[Step, Reconstruct]:
    """The step of sparsify's trainer, with Adam: unit rows, forward pass, gradients orthogonal to the rows."""
    from sparsify import SparseCoder, SparseCoderConfig

    if given.architecture != "top_k":
        raise ImportError("sparsify knows only top_k")
    torch.manual_seed(0)
    coder = SparseCoder(given.d_model, SparseCoderConfig(num_latents=given.d_sae, k=given.k), device=given.device)
    coder.b_dec.data = source.x[: given.batch].mean(0)  # as its trainer does with the first batch
    optimizer = torch.optim.Adam(coder.parameters(), lr=lr)
    silent = torch.zeros(given.d_sae, dtype=torch.long, device=given.device)

    def step(x: Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x)
        silent.add_(len(x))
        silent[out.latent_indices.flatten()] = 0
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    return step, lambda x: coder(x).sae_out


LIBRARIES = {"ours": ours, "saelens": saelens, "dictionary_learning": dictionary_learning, "sparsify": sparsify}


def keep(z: Tensor, given: argparse.Namespace) -> Tensor:
    """The largest activations of each row, or of the batch."""
    if given.architecture == "top_k":
        top = z.topk(given.k, dim=1)
        return torch.zeros_like(z).scatter(1, top.indices, top.values)
    return z * (z >= z.flatten().kthvalue(z.numel() - given.k * len(z) + 1).values)


def work(given: argparse.Namespace) -> None:
    """One library, in this process: takes as many steps as each line of input says, until there are no more lines.

    Prints the seconds of each step, and at the end FVU and memory.
    """
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print what they like
    lr = 1e-3 / (given.d_sae / 2**14) ** 0.5
    source = Planted(given.d_model, (given.steps + HELD_OUT) * given.batch, given.device)
    step, reconstruct = LIBRARIES[given.worker](given, source, lr)
    before, batches = forget_peak(given.device), iter(source.x.split(given.batch))
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            x, start = next(batches), time.perf_counter()
            step(x)
            synchronize(given.device)
            seconds.append(time.perf_counter() - start)
        print(json.dumps(seconds), file=answers, flush=True)
    peak = peak_memory(given.device) - before
    errors, x = [], source.x[given.steps * given.batch :]
    with torch.no_grad():
        for part in x.split(given.batch):
            errors.append(float((reconstruct(part) - part).square().sum()))
    fvu = sum(errors) / float((x - x.mean(0)).square().sum())
    print(json.dumps({"fvu": fvu, "memory": peak}), file=answers)


def forget_peak(device: str) -> float:
    """Memory in use now, in GB; the peak counts from here."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**30
    Path("/proc/self/clear_refs").write_text("5", "ascii")
    return peak_memory(device)


def peak_memory(device: str) -> float:
    """Largest memory in use so far, in GB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**20


def synchronize(device: str) -> None:
    """Wait for what was started."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], object], device: str, repeats: int = 15) -> float:
    """Median time of a call, after warm-up."""
    times = []
    for _ in range(WARM_UP + repeats):
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[WARM_UP:])


class Limits:
    """The encoder product alone, and the machine's best product of squares."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.device, low = given.device, torch.bfloat16
        self.x = torch.randn(given.batch, given.d_model).to(self.device, low)
        self.weight = torch.randn(given.d_sae, given.d_model).to(self.device, low)
        self.square = torch.randn(side := 2048 if self.device == "cpu" else 8192, side).to(self.device, low)

    def seconds(self) -> tuple[float, float]:
        """Seconds of the encoder product, and what it would take at the peak."""
        product = seconds_of(lambda: linear(self.x, self.weight), self.device)
        peak = 2 * len(self.square) ** 3 / seconds_of(lambda: self.square @ self.square, self.device)
        return product, 2 * len(self.x) * self.weight.numel() / peak


class Worker:
    """A library in a process of its own, which works only when it is asked to."""

    def __init__(self, given: argparse.Namespace, name: str) -> None:
        options = ["--worker", name, "--size", f"{given.d_model}x{given.d_sae}", "--architecture", given.architecture]
        for key in ("k", "batch", "steps", "device"):
            options += [f"--{key}", str(getattr(given, key))]
        self.name, self.log = name, tempfile.TemporaryFile("w+")  # noqa: SIM115  (it goes with the worker)
        huge = given.huge_pages in ("all", name)
        self.process = subprocess.Popen(
            [sys.executable, __file__, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
            text=True, env=os.environ | {"THP_MEM_ALLOC_ENABLE": str(int(huge))},
        )  # fmt: skip
        self.seconds: list[list[float]] = []
        self.works = self.answer() == "ready"

    def answer(self) -> Any:
        """The next line it prints; None when it has ended."""
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def take(self, steps: int) -> None:
        """Let it take a round of steps."""
        if self.works:
            print(steps, file=self.process.stdin, flush=True)
            self.seconds.append(self.answer())

    def finish(self) -> dict[str, float] | str:
        """What it found, or why it found nothing."""
        self.process.stdin.close()
        found = self.answer()
        if self.process.wait() == 0:
            return found
        self.log.seek(0)
        return f"not measured: {self.log.read().strip().splitlines()[-1]}"


def compare(given: argparse.Namespace) -> None:
    """Print one size's table."""
    workers = [Worker(given, name) for name in given.only or LIBRARIES]
    limits, bounds = Limits(given), []
    first, later = given.steps - (ROUNDS - 1) * (given.steps // ROUNDS), given.steps // ROUNDS
    for steps in [first] + (ROUNDS - 1) * [later]:
        for worker in workers:
            worker.take(steps)
        bounds.append(limits.seconds())
    product, at_peak = (statistics.median(seconds) for seconds in zip(*bounds, strict=True))
    flops = 2 * given.d_model * given.d_sae * given.batch / at_peak / 1e9
    print(f"\nd_model {given.d_model}, d_sae {given.d_sae}, k {given.k}, batch {given.batch}, {given.architecture}")
    print(f"the encoder product alone: {given.batch / product:,.0f} tokens/s; at the peak of squares ({flops:,.0f}")
    print(f"GFLOP/s) it would be {given.batch / at_peak:,.0f}")
    print("library              tokens/s  ours is (rounds)          FVU  memory GB")
    own = [statistics.median(seconds) for seconds in timed(workers[0])]
    for worker in workers:
        found = worker.finish()
        if isinstance(found, str):
            print(f"{worker.name:<20} {found}")
            continue
        times = [statistics.median(seconds) for seconds in timed(worker)]
        ratios = sorted(time / ours for time, ours in zip(times, own, strict=True))
        spread = f"{statistics.median(ratios):5.1f}x ({ratios[0]:.1f} to {ratios[-1]:.1f})"
        speed = given.batch / statistics.median(times)
        print(f"{worker.name:<20} {speed:8,.0f} {spread:<22} {found['fvu']:7.4f} {found['memory']:10.2f}")
    if own:
        shares = (seconds / statistics.median(own) for seconds in (product, at_peak))
        print("the product is {:.0%} of our step; at the peak it would be {:.0%}".format(*shares))


def timed(worker: Worker) -> list[list[float]]:
    """The seconds of the steps that count, round by round."""
    return [worker.seconds[0][WARM_UP:], *worker.seconds[1:]] if worker.seconds else []


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", metavar="D_MODELxD_SAE")
    parser.add_argument("--architecture", default="top_k", choices=["top_k", "batch_top_k"])
    parser.add_argument("--only", action="append", choices=list(LIBRARIES), help="only these libraries")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--huge-pages", default="ours", choices=["ours", "all", "none"], help="who has them")
    parser.add_argument("--worker", choices=list(LIBRARIES), help=argparse.SUPPRESS)
    for name, default in (("k", 32), ("batch", 2048), ("steps", 40)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    if not given.worker:
        print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {given.device}, {given.steps} steps")
    for size in given.size or ["576x8192", "768x24576"]:
        given.d_model, given.d_sae = map(int, size.split("x"))
        if given.worker:
            work(given)
        else:
            compare(given)


if __name__ == "__main__":
    main()
