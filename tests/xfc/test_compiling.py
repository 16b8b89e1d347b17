"""What Triton's kernels ask of the compiler, and that it compiles them; neither needs a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton, which CPU builds of torch lack")

LAUNCH = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from renee_ray.xfc.kernels import gpu
from renee_ray.xfc.kernels.choose import Operations
from renee_ray.xfc.labels import LabelRange
from renee_ray.xfc.shard import (Pairs, Shard)
from renee_ray.xfc.weights.storages import (SGD, Weights)

torch.set_num_threads(1)
backend = make_backend(GPUTarget("cuda", 90, 32))
names = ("_residual", "_positives", "_update")
compiled, grids = {name: set() for name in names}, []

def watch(name):
    kernel = getattr(gpu, name)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)

    def run(*args, grid, warmup, **options):
        compiled[name].add(str(bind(*args, **options)[1]))
        grids.append(grid)

    kernel.run = run

for name in names:
    watch(name)
operations = Operations(gpu.residual, gpu.FusedUpdate, gpu.PADDING)
shard = Shard(
    LabelRange(0, 300, 300),
    Weights("bf16_sr", 300, 48, True, torch.device("cpu"), torch.bfloat16), 64, operations,
)
for batch in (1, 63, 65, 992, 1000, 1024):
    rows = torch.arange(batch)
    pairs = Pairs(rows, (rows * 37 + 5) % 300, shard.owned)
    shard.step(torch.zeros(batch, 48), pairs, SGD(0.1))
assert {name: len(found) for name, found in compiled.items()} == dict.fromkeys(names, 1), compiled
bare = torch.zeros(0, dtype=torch.int64)
many = torch.zeros(1, 64, dtype=torch.bfloat16).expand(9_000_000, 64)
gpu.residual(many, torch.zeros(64, 64, dtype=torch.bfloat16), bare, bare, many, None)
assert all(axis <= 65535 for grid in grids for axis in grid[1:]), grids
"""


def run_without_interpreter(code: str, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_batch_size_compiles_anew_and_no_chunk_is_too_long(tmp_path: Path) -> None:
    """What a launch asks of the compiler, and its grid; without a GPU nothing is launched."""
    run_without_interpreter(LAUNCH, tmp_path)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from renee_ray.xfc.kernels import gpu

INTEGER = {"fp32": "*fp32", "split": "*i16", "bf16": "*i16", "e4m3": "*u8"}

def compile(kernel, capability, pointer, k, **constants):
    constants |= {"DIM": 80, "TILE": 32, "K": k, "LOSS": True}
    constants["SCALED"] = pointer == "*fp8e4nv"
    types = {name: pointer for name in ("weight", "inputs", "residual")}
    types["out"] = "*bf16" if pointer == "*fp8e4nv" else pointer
    for name, kind in zip(("weight", "velocity"), constants.get("KINDS", ())):
        types[name] = (INTEGER[kind], INTEGER[kind], "*i32")
    types |= {name: "*fp32" for name in ("sums", "logits", "scales")}
    types |= {name: "*i64" for name in ("labels", "rows")}
    types |= {name: "i64" for name in ("weight_key", "velocity_key", "first")}
    types["rates"] = ("fp32", "fp32", "fp32")
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    source = ASTSource(kernel, signature, {n: c for n, c in constants.items() if n in names})
    assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]

for capability in (89, 90):
    compile(gpu._residual, capability, "*fp8e4nv", 128)
    compile(gpu._positives, capability, "*fp8e4nv", 128)
for capability in (80, 90):
    for pointer, k in (("*bf16", 64), ("*fp32", 32)):
        compile(gpu._residual, capability, pointer, k)
        compile(gpu._positives, capability, pointer, k)
    for kinds in (("fp32", "fp32"), ("split", "split"), ("bf16", "bf16"), ("e4m3", "bf16")):
        pointer, k = ("*fp32", 32) if kinds[0] == "fp32" else ("*bf16", 64)
        compile(gpu._update, capability, pointer, k, KINDS=kinds)
"""


@pytest.mark.slow
def test_kernels_compile_for_two_generations_of_gpus(tmp_path: Path) -> None:
    """The interpreter accepts what the compiler may not; compiling needs no GPU."""
    run_without_interpreter(COMPILE, tmp_path)
