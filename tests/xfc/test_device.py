"""The dtype and the storage that suit a device."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from renee_ray.xfc import device as module
from renee_ray.xfc.device import choose_precision, chunk_bytes, native_narrow
from renee_ray.xfc.weights.gpu_trial import has_kernels
from renee_ray.xfc.weights.storages import STORAGES, Weights
from tests.xfc.interpreter import DEVICE, load_kernels

CPU = torch.device("cpu")


@pytest.fixture(params=[True, False])
def has_bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(module, "native_bf16", lambda device: request.param)
    return bool(request.param)


def test_auto_is_bf16_where_the_device_multiplies_it(has_bf16: bool) -> None:
    assert choose_precision("auto", *native_narrow(CPU)) == ("bf16_sr" if has_bf16 else "fp32")
    assert choose_precision("fp8_sr", *native_narrow(CPU)) == "fp8_sr"
    assert Weights("auto", 3, 4, True, CPU).nbytes() == 3 * 4 * (4 if has_bf16 else 8)


@pytest.mark.parametrize("precision", STORAGES)
def test_matmuls_are_narrow_only_where_that_is_native(precision: str, has_bf16: bool) -> None:
    own = STORAGES[precision].compute
    found = Weights(precision, 3, 4, False, CPU).compute_dtype
    assert found == (own if own == torch.bfloat16 and has_bf16 else torch.float32)
    assert Weights(precision, 3, 4, False, CPU, own).compute_dtype == own


def test_a_chunk_has_room() -> None:
    assert 128 << 10 <= chunk_bytes("cpu") <= 1 << 30
    assert chunk_bytes("cuda") > chunk_bytes("cpu") // 4


def test_a_cache_that_a_cloud_host_reports_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_cache_bytes", lambda: 480 << 20)
    assert chunk_bytes("cpu") <= 32 << 20
    monkeypatch.setattr(module, "_cache_bytes", lambda: 2 << 20)
    assert chunk_bytes("cpu") == 1 << 20


def kernels_on_cuda(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> bool:
    """What `has_kernels` says of a GPU each time that it is asked."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    has_kernels.cache_clear()
    try:
        return all([has_kernels(torch.device("cuda", 0)) for _ in range(3)])
    finally:
        has_kernels.cache_clear()


def test_no_kernels_on_a_gpu_that_triton_does_not_support(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert not has_kernels(CPU)
    assert not caplog.records
    assert not kernels_on_cuda(monkeypatch, (7, 5))
    assert [record.message.count("slower path") for record in caplog.records] == [1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a torch that cannot reach a GPU")
def test_no_kernels_where_none_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What fails is the trial itself, for what this machine lacks: triton, or a GPU."""
    assert not kernels_on_cuda(monkeypatch, (9, 0))
    assert [record.message.count("slower path") for record in caplog.records] == [1]
    assert re.search(r"Error: .{10,}", caplog.records[0].message), "the reason is told"


@pytest.mark.parametrize("reason", [None, "Failed to find C compiler"])
def test_kernels_are_tried_before_they_are_chosen(
    reason: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load_kernels()
    from renee_ray.xfc.weights import gpu_rows

    gpu_rows.try_out(DEVICE)

    def try_out(device: torch.device) -> None:
        if reason is not None:
            raise RuntimeError(reason)

    monkeypatch.setattr(gpu_rows, "try_out", try_out)
    assert kernels_on_cuda(monkeypatch, (9, 0)) == (reason is None)
    assert [reason in record.message for record in caplog.records] == [True] * (reason is not None)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_a_gpu_machine_without_a_c_compiler_takes_the_slower_path(tmp_path: Path) -> None:
    code = (
        "import torch; from renee_ray.xfc.weights.gpu_trial import has_kernels;"
        "print(has_kernels(torch.device('cuda', 0)))"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("CC", "PATH")}
    environment |= {"PATH": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )  # fmt: skip
    assert done.stdout == "False\n", done.stderr[-2000:]
    assert done.stderr.count("slower path") == 1
