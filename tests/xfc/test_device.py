"""The dtype and the storage that suit a device."""

from __future__ import annotations

import logging

import pytest
import torch

from renee_ray.xfc import device as module
from renee_ray.xfc.device import choose_compute, choose_precision, chunk_bytes
from renee_ray.xfc.storage import STORAGES, Weights

CPU = torch.device("cpu")


@pytest.fixture(params=[True, False])
def has_bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(module, "native_bf16", lambda device: request.param)
    module._log_expansion.cache_clear()
    return bool(request.param)


def test_auto_is_bf16_where_the_device_multiplies_it(has_bf16: bool) -> None:
    assert choose_precision("auto", CPU) == ("bf16_sr" if has_bf16 else "fp32")
    assert choose_precision("fp8_sr", CPU) == "fp8_sr"
    assert Weights("auto", 3, 4, True, CPU).nbytes() == 3 * 4 * (4 if has_bf16 else 8)


@pytest.mark.parametrize("precision", STORAGES)
def test_matmuls_are_narrow_only_where_that_is_native(precision: str, has_bf16: bool) -> None:
    own = STORAGES[precision].compute
    found = Weights(precision, 3, 4, False, CPU).compute_dtype
    assert found == (own if own == torch.bfloat16 and has_bf16 else torch.float32)
    assert Weights(precision, 3, 4, False, CPU, own).compute_dtype == own


def test_the_expansion_is_logged_once(has_bf16: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "renee_ray.xfc.device"):
        for _ in range(3):
            choose_compute(torch.bfloat16, "fp8_sr", CPU)
            choose_compute(torch.float32, "fp32", CPU)
    assert len(caplog.records) == (0 if has_bf16 else 1)


def test_a_chunk_has_room() -> None:
    assert 128 << 10 <= chunk_bytes("cpu") <= 16 << 20
    assert chunk_bytes("cuda") > chunk_bytes("cpu") // 4
