"""Shards made several at once: by processes of this machine, or by the workers of a Ray cluster.

Shards are independent but for the first, whose median norm marks the sinks in all, and which is there before these
begin. Each worker loads the model once. The files are those that one process alone would write.
"""

import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any

import torch

from sae_core.activations.encoding import ActivationError
from sae_core.activations.harvest import Plan, Pool, Worker


def devices(device: str, workers: int) -> list[str]:
    """Where so many workers run, in turn over all GPUs when `device` is `cuda`; 0 is one for each, or one on a CPU."""
    places = [f"cuda:{n}" for n in range(torch.cuda.device_count())] if device == "cuda" else [device]
    return [places[n % len(places)] for n in range(workers or len(places))]


def processes(devices: Sequence[str]) -> Pool:
    """A process for each of the devices; several on a CPU share its cores."""

    def run(plan: Plan, numbers: Sequence[int], /) -> Iterator[int]:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        free = context.SimpleQueue()
        for device in devices[: len(numbers)]:
            free.put(device)
        n = min(len(devices), len(numbers))
        threads = max(1, torch.get_num_threads() // n)
        with ProcessPoolExecutor(n, context, _start, (plan, free, threads)) as pool:
            made = [pool.submit(_make, number) for number in numbers]
            try:
                for shard in as_completed(made):
                    yield shard.result()
            except BrokenProcessPool:
                raise ActivationError(
                    "a process that read activations was ended from outside, often for want of memory: "
                    "give fewer workers; what is finished stays"
                ) from None
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    return run


_here: list[Worker] = []
"""The worker of this process."""


def _start(plan: Plan, free: Any, threads: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _here.append(Worker(plan, free.get()))


def _end_with_parent() -> None:
    """A killed parent tells its workers nothing, and they would write beside the run that goes on after it."""
    if parent := multiprocessing.parent_process():
        wait([parent.sentinel])
        os._exit(1)


def _make(number: int) -> int:
    tokens = _here[0].make(number)
    _here[0].finish()
    return tokens


class _Actor:
    """A worker on some machine of the cluster."""

    def __init__(self, plan: Plan, device: str) -> None:
        _here.append(Worker(plan, device))

    def make(self, number: int) -> int:
        return _make(number)


def on_ray(workers: int, device: str) -> Pool:
    """Workers on the Ray cluster that this process is connected to; on `cuda` each has a GPU of its own.

    `workers` is how many at most; 0 takes all of the cluster's GPUs, or cores.

    Every machine of the cluster must see the artifact's folder, the corpus and the model at the same paths.
    """
    import ray

    def run(plan: Plan, numbers: Sequence[int], /) -> Iterator[int]:
        cuda = device.startswith("cuda")
        n = workers or int(ray.cluster_resources().get("GPU" if cuda else "CPU", 1))
        remote = ray.remote(num_cpus=1, num_gpus=int(cuda))(_Actor)
        actors: list[Any] = [remote.remote(plan, "cuda" if cuda else device) for _ in numbers[:n]]
        pool = ray.util.ActorPool(actors)
        try:
            yield from pool.map_unordered(lambda actor, number: actor.make.remote(number), list(numbers))
        finally:
            for actor in actors:
                ray.kill(actor)

    return run
