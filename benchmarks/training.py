"""How fast a dictionary trains, beside the other libraries and the limit that the encoder product sets.

    python benchmarks/training.py                                  both sizes of RESULTS.md
    python benchmarks/training.py --size 576x4096 --steps 20       another size
    python benchmarks/training.py --architecture top_k --only ours --device cuda --batch 8192

Every library takes the same steps of Adam on the same planted activations (sparse sums of random directions), at the
same learning rate, each in a process of its own. Times are medians over the steps after warm-up; FVU is that of
activations that none has seen, after all steps; memory is the peak above what was in use before the first step. The
other libraries are the extra `peers`; one that is not installed is named.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line has it
os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1" if "cuda" not in sys.argv else "0")

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, linear, normalize

WARM_UP, HELD_OUT = 5, 4
"""Steps that are not timed, and batches on which FVU is measured."""


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


def measure(given: argparse.Namespace) -> dict[str, float]:
    """One library, in this process: seconds a step, FVU, memory."""
    lr = 1e-3 / (given.d_sae / 2**14) ** 0.5
    source = Planted(given.d_model, (given.steps + HELD_OUT) * given.batch, given.device)
    step, reconstruct = LIBRARIES[given.only](given, source, lr)
    before, seconds = forget_peak(given.device), []
    *batches, _, _, _, _ = source.x.split(given.batch)
    for x in batches:
        start = time.perf_counter()
        step(x)
        synchronize(given.device)
        seconds.append(time.perf_counter() - start)
    peak = peak_memory(given.device) - before
    errors, x = [], source.x[given.steps * given.batch :]
    with torch.no_grad():
        for part in x.split(given.batch):
            errors.append(float((reconstruct(part) - part).square().sum()))
    fvu = sum(errors) / float((x - x.mean(0)).square().sum())
    return {"seconds": statistics.median(seconds[WARM_UP:]), "fvu": fvu, "memory": peak}


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


def limits(given: argparse.Namespace) -> tuple[float, float]:
    """Seconds of the encoder product alone, and what it would take at the machine's best product of squares."""
    device, low = given.device, torch.bfloat16
    x, weight = torch.randn(given.batch, given.d_model), torch.randn(given.d_sae, given.d_model)
    x, weight = x.to(device, low), weight.to(device, low)
    product = seconds_of(lambda: linear(x, weight), device)
    side = 2048 if device == "cpu" else 8192
    square = torch.randn(side, side).to(device, low)
    flops = 2 * side**3 / seconds_of(lambda: square @ square, device)
    return product, 2 * given.batch * given.d_model * given.d_sae / flops


def compare(given: argparse.Namespace) -> None:
    """Print one size's table."""
    product, at_peak = limits(given)
    print(f"\nd_model {given.d_model}, d_sae {given.d_sae}, k {given.k}, batch {given.batch}, {given.architecture}")
    print(f"the encoder product alone: {given.batch / product:,.0f} tokens/s; at the peak of squares it would be")
    print(
        f"{given.batch / at_peak:,.0f} ({2 * given.d_model * given.d_sae * given.batch / at_peak / 1e9:,.0f} GFLOP/s)"
    )
    print("library              tokens/s  ours is     FVU  memory GB")
    first = None
    for name in LIBRARIES:
        found = in_its_own_process(given, name)
        if isinstance(found, str):
            print(f"{name:<20} {found}")
            continue
        first = first or found
        speed, ratio = given.batch / found["seconds"], found["seconds"] / first["seconds"]
        print(f"{name:<20} {speed:8,.0f} {ratio:7.1f}x {found['fvu']:7.4f} {found['memory']:10.2f}")
    if first:
        shares = (seconds / first["seconds"] for seconds in (product, at_peak))
        print("the product is {:.0%} of our step; at the peak it would be {:.0%}".format(*shares))


def in_its_own_process(given: argparse.Namespace, name: str) -> dict[str, float] | str:
    """What `measure` finds, or why it finds nothing."""
    options = ["--only", name, "--size", f"{given.d_model}x{given.d_sae}", "--architecture", given.architecture]
    for key in ("k", "batch", "steps", "device"):
        options += [f"--{key}", str(getattr(given, key))]
    run = subprocess.run([sys.executable, __file__, *options, "--json"], capture_output=True, text=True, check=False)
    lines = (run.stdout if run.returncode == 0 else run.stderr).strip().splitlines()
    return json.loads(lines[-1]) if run.returncode == 0 else f"not measured: {lines[-1]}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", metavar="D_MODELxD_SAE")
    parser.add_argument("--architecture", default="top_k", choices=["top_k", "batch_top_k"])
    parser.add_argument("--only", choices=list(LIBRARIES), help="one library, in this process")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", action="store_true", help="with --only: numbers for machines")
    for name, default in (("k", 32), ("batch", 2048), ("steps", 40)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    if not given.json:
        print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {given.device}, {given.steps} steps")
    for size in given.size or ["576x8192", "768x24576"]:
        given.d_model, given.d_sae = map(int, size.split("x"))
        if given.only:
            print(json.dumps(measure(given)))
        else:
            compare(given)


if __name__ == "__main__":
    main()
