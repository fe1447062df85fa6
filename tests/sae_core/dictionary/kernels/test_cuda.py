"""The kernels in Triton, where there is no GPU: run in Triton's interpreter, and compiled for GPUs that are elsewhere.

Both happen in processes of their own: whether a kernel is interpreted is settled when Triton is imported. What runs on
a GPU is in `test_kernels`, marked `gpu`. As a script, this file compiles all kernels for one compute capability.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_core.dictionary.kernels import cpu, kernels, plain

NNZ, ROWS, D_SAE = 100, 8, 64


def child(*command: str, **environment: str) -> str:
    """What a Python process of its own prints."""
    pytest.importorskip("triton", reason="NOT RUN, NOT COMPILED: the kernels of `cuda`; triton is not installed")
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, *command], env=inherited | environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def test_the_kernels_are_right_in_tritons_interpreter() -> None:
    tests = str(Path(__file__).with_name("test_kernels.py"))
    printed = child(
        "-m", "pytest", "-m", "gpu", "-p", "no:xdist", "-p", "no:cacheprovider", tests, TRITON_INTERPRET="1"
    )
    assert "skipped" not in printed


@pytest.mark.parametrize("capability", ["80", "90"])
def test_the_kernels_compile_for_gpus_that_are_not_here(capability: str, tmp_path: Path) -> None:
    compiled = child(__file__, capability, TRITON_CACHE_DIR=str(tmp_path)).split()
    assert set(compiled) == {"_dots", "_weighted_sums", "_reconstruct", "_remove_parallel", "_adam"}


def test_a_device_gets_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels(torch.device("cpu")) is cpu
    assert kernels(torch.device("meta")) is plain
    monkeypatch.setattr("sae_core.dictionary.kernels.TRITON", False)
    assert kernels(torch.device("cuda")) is plain


def test_a_cuda_device_gets_triton_where_it_is_installed() -> None:
    pytest.importorskip("triton", reason="NOT CHOSEN: the kernels of `cuda`; triton is not installed")
    assert kernels(torch.device("cuda")).__name__ == "sae_core.dictionary.kernels.cuda"


def compile_all(capability: int) -> None:
    """Compile what the kernels would launch, for narrow rows and wide; print the names."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sae_core.dictionary.kernels import cuda

    types = {torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64", int: "i32", float: "fp32"}

    def launch(kernel: Any, programs: Any, *arguments: Any, num_warps: int = 4, **constants: Any) -> None:
        kinds = [types[getattr(argument, "dtype", type(argument))] for argument in arguments]
        signature = dict(zip(kernel.arg_names, kinds + ["constexpr"] * len(constants), strict=True))
        target, options = GPUTarget("cuda", capability, 32), {"num_warps": num_warps, "enable_fp_fusion": True}
        binary = triton.compile(ASTSource(kernel, signature, constants), target, options)
        assert binary.asm["cubin"]
        print(kernel.__name__)

    cuda._launch = launch
    for index, d_model in ((torch.int32, 576), (torch.int64, 16384)):
        feature, row, value = torch.zeros(NNZ, dtype=index), torch.zeros(NNZ, dtype=index), torch.zeros(NNZ)
        starts = torch.zeros(ROWS + 1, dtype=torch.int64)
        weight, target = torch.zeros(D_SAE, d_model), torch.zeros(ROWS, d_model)
        cuda.dots(weight, feature, target, row)
        cuda.weighted_sums(weight, feature, value, starts, target)
        cuda.reconstruct(weight, feature.int(), value, starts, target)
        cuda.remove_parallel(weight, weight)
        for unit_rows in (False, True):
            cuda.adam(weight, weight, weight, weight, 0, 1e-3, 1.0, unit_rows)


if __name__ == "__main__":
    compile_all(int(sys.argv[1]))
