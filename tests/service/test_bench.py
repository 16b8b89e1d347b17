"""`bench scale`: its figures at a tiny size, and the memory of processes together."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest
import torch

from renee_ray.cli import main as cli
from renee_ray.rank.collectives import Ranks
from renee_ray.service.bench.scale import ResidentPeak, time_steps
from tests.training.gloo import on_ranks

SIZES: dict[str, Any] = {"labels": 3001, "dim": 8, "batch": 10, "steps": 2}


def measured(ranks: Ranks, precision: str) -> dict[str, Any]:
    return time_steps(ranks, torch.device("cpu"), precision=precision, **SIZES)


@pytest.mark.parametrize(("precision", "bytes_per_weight"), [("bf16_sr", 2), ("fp8_sr", 1)])
def test_the_loss_falls_alike_on_any_number_of_ranks(precision: str, bytes_per_weight: int) -> None:
    """Noise and first weights are those of the label, so only the order of sums differs."""
    one, *two = [*on_ranks(1, measured, precision), *on_ranks(2, measured, precision)]
    for found in (one, *two):
        assert found["bytes_per_weight"] == bytes_per_weight
        assert found["precision"] == precision
        assert found["loss_last"] < 0.95 * found["loss_first"]
        assert found["loss_first"] == pytest.approx(3001 * 0.693, rel=0.02)
        assert found["loss_last"] == pytest.approx(one["loss_last"], rel=1e-4)
        assert found["seconds_per_million_labels"] == pytest.approx(found["step_s"] / 3001e-6)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_speedup_is_of_the_same_steps_by_one_rank(num_ranks: int) -> None:
    first, *others = on_ranks(num_ranks, compared)
    assert first["speedup"] == pytest.approx(first["one_worker_step_s"] / first["step_s"])
    assert all("speedup" not in found for found in others)
    assert {found["threads"] for found in (first, *others)} == {1}


def compared(ranks: Ranks) -> dict[str, Any]:
    return time_steps(ranks, torch.device("cpu"), precision="fp32", speedup=True, **SIZES)


def test_a_speedup_of_one_worker_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "scale", "--workers", "1", "--speedup"]) == 1
    assert "--workers" in capsys.readouterr().err


def test_memory_of_processes_below_is_counted() -> None:
    size = 80 << 20
    before = psutil.Process().memory_info().rss
    code = f"import time; held = b'x' * {size}; print('ready', flush=True); time.sleep(60)"
    with ResidentPeak() as peak:
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        try:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(2)  # new processes are looked for once a second
        finally:
            child.kill()
            child.wait()
    assert peak.bytes >= before + 0.9 * size
    assert psutil.Process().memory_info().rss < peak.bytes - 0.5 * size


@pytest.mark.slow
def test_a_speedup_is_measured_with_ray_and_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    sizes = ("--labels", "3001", "--dim", "8", "--batch", "10", "--workers", "2", "--steps", "2",
             "--precision", "bf16_sr")  # fmt: skip
    assert cli.main(["bench", "scale", *sizes, "--speedup"]) == 0
    size = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (size["workers"], size["threads"], size["bytes_per_weight"]) == (2, 1, 2)
    assert size["loss_last"] < size["loss_first"]
    assert size["peak_rss_gib"] > 0.1 and size["initialise_s"] > 0
    for by in ("", "bare_"):
        quotient = size[f"{by}one_worker_step_s"] / size[f"{by}step_s"]
        assert size[f"{by}speedup"] == pytest.approx(quotient)
