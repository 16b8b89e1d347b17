"""Benchmarks at tiny sizes: their keys, and that what they time computes the right thing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from renee_ray.benchmarks import problem as problem_module
from renee_ray.benchmarks.problem import fastest, interleaved, make_problem, peak_extra_bytes
from renee_ray.benchmarks.step import (
    LR,
    autograd,
    bare_matmuls,
    compiled,
    errors_of_step,
    published,
)
from renee_ray.cli import main as cli
from renee_ray.xfc import shard as shard_module
from renee_ray.xfc.weights.storages import SGD

CPU = torch.device("cpu")
TIMES = {"step_s", "gemm_s", "published_s", "autograd_s"}


def bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert cli.main(["bench", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    found: dict[str, object] = json.loads(lines[0])
    return found


SMALL = ("--labels", "700", "--dim", "16", "--batch", "8", "--repeats", "1")


@pytest.mark.parametrize(
    ("precision", "momentum", "bytes_per_weight"),
    [("fp32", "0.9", 8), ("bf16_sr", "0", 2), ("fp8_sr", "0.9", 3), ("bf16_split", "0", 4)],
)
def test_bench_step(
    capsys: pytest.CaptureFixture[str], precision: str, momentum: str, bytes_per_weight: int
) -> None:
    found = bench(capsys, "step", *SMALL, "--precision", precision, "--momentum", momentum)
    assert {*TIMES, "ratio_to_gemm", "speedup_vs_published", "peak_extra_bytes"} <= set(found)
    assert all(isinstance(found[key], float) and found[key] > 0 for key in TIMES)
    assert found["bytes_per_weight"] == bytes_per_weight
    assert {"expansion", "residual", "gradient", "update"} == set(dict(found["parts"]))
    assert found["gpu_peak_gib"] is None and "fp16_s" not in found
    assert found["ratio_to_gemm"] == pytest.approx(found["step_s"] / found["gemm_s"])
    assert (found["precision"], found["labels"], found["dim"]) == (precision, 700, 16)
    assert (found["momentum"], found["reference_momentum"]) == (float(momentum), 0.9)


@pytest.mark.parametrize("k", [5, 900])
def test_bench_topk(capsys: pytest.CaptureFixture[str], k: int) -> None:
    found = bench(capsys, "topk", *SMALL, "--k", str(k))
    assert {"topk_s", "gemm_s", "ratio_to_gemm", "torch_topk_s"} <= set(found)
    assert found["same_but_ties"] is True
    assert 0 < float(found["greatest_difference"]) <= float(found["rounding"]) < 1e-4
    assert found["ratio_to_gemm"] == pytest.approx(found["topk_s"] / found["gemm_s"])


def test_bench_topk_of_more_than_references_fit(capsys: pytest.CaptureFixture[str]) -> None:
    found = bench(capsys, "topk", *SMALL, "--precision", "fp8_sr", "--references", "none")
    assert found["same_but_ties"] is True and found["weight_bytes"] == 700 * 16
    assert found["ratio_to_product"] == pytest.approx(found["topk_s"] / found["product_s"])
    assert found["peak_extra_bytes"] >= 0 and "gemm_s" not in found


def test_wrong_flags_are_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "step", "--labels", "0"]) == 2
    assert cli.main(["bench", "step", "--precision", "fp7"]) == 2
    assert cli.main(["bench", "step", "--momentum", "1"]) == 2
    assert "fp7" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["step", "topk"])
def test_what_memory_cannot_hold_is_refused(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(problem_module, "free_memory", lambda device: 1 << 40)
    assert cli.main(["bench", name, "--labels", "1000000000000"]) == 1
    message = capsys.readouterr().err
    assert "--labels 1000000000000" in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_what_is_compared_takes_the_same_steps(momentum: float) -> None:
    problem = make_problem(300, 12, 6, CPU)
    shard, positives = problem.shard("fp32", momentum), problem.positives()
    others = [published(problem, momentum), autograd(problem, momentum)]
    if not momentum:
        others.append(compiled(problem, 128, torch.float32))
    halves, close = published(problem, momentum, torch.float16), {"rtol": 1e-4, "atol": 1e-5}
    for _ in range(3):
        seen: list[torch.Tensor] = []
        shard.step(problem.embeddings, positives, SGD(LR, momentum), on_gradient=seen.append)
        with torch.compiler.set_stance("force_eager"):  # compiling takes longer than all the rest
            for other in others:
                torch.testing.assert_close(seen[0], other(), **close)
        rounded = halves()
        assert not torch.allclose(seen[0], rounded, **close)
        torch.testing.assert_close(seen[0], rounded, rtol=0.05, atol=0.02)


@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-5), ("bf16_sr", 0.01)])
def test_errors_of_a_step_are_small_and_a_wrong_step_is_noticed(
    precision: str, most: float
) -> None:
    problem = make_problem(300, 12, 16, CPU)
    shard = problem.shard(precision, 0.9)
    for _ in range(2):  # the second from velocities that are not zero
        assert max(errors_of_step(shard, problem, 0.9).values()) < most
    right = shard.operations

    def forgets_positives(*arguments: Any, values: torch.Tensor) -> torch.Tensor:
        operand, inputs, columns, rows, out, loss = arguments
        return right.residual(operand, inputs, columns[:0], rows[:0], out, loss)

    shard.operations = replace(right, residual=forgets_positives)
    wrong = errors_of_step(shard, problem, 0.9)
    assert min(wrong["gradient_error"], wrong["weight_error"]) > 2 * most


def test_a_list_of_sizes_gives_a_line_each_though_one_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(problem_module, "free_memory", lambda device: 700 * 16 * 20)
    given = ("--dim", "16", "--batch", "8", "--momentum", "0", "--repeats", "1", "--check")
    sizes = ("--labels", "700,70000", "--precision", "fp32,fp8_sr", "--references", "none")
    assert cli.main(["bench", "step", *given, *sizes]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(each["labels"], each["precision"]) for each in lines] == [
        (700, "fp32"), (700, "fp8_sr"), (70000, "fp32"), (70000, "fp8_sr"),
    ]  # fmt: skip
    assert ["error" in each for each in lines] == [False, False, True, True]
    assert lines[0]["gradient_error"] < 1e-5 < lines[1]["gradient_error"]


def test_references_are_those_asked_for_and_memory_is_counted_for_these_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(problem_module, "free_memory", lambda device: 700 * 16 * 30)
    given = (*SMALL, "--precision", "fp32", "--momentum", "0", "--chunk", "256", "--references")
    found = bench(capsys, "step", *given, "none")
    assert found["chunk"] == 256
    assert not {"published_s", "fp16_s", "compiled_s", "autograd_s"} & set(found)
    found = bench(capsys, "step", *given, "fp16")
    assert found["speedup_vs_fp16"] == pytest.approx(found["fp16_s"] / found["step_s"])
    assert cli.main(["bench", "step", *given, "fp16,autograd"]) == 1
    assert "fewer --labels or --references" in capsys.readouterr().err
    assert cli.main(["bench", "step", *given, "fp16,torch"]) == 2
    assert "'torch' is not one of 'none', 'published'" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16_sr", "fp8_sr"])
def test_weights_are_drawn_chunk_by_chunk_in_the_storages_dtype(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_module, "NUMBERS", 128 * 64)
    weights = make_problem(300, 64, 2, CPU).shard(precision, 0).weights
    drawn = weights.read(0, 300)
    assert float(drawn.std()) == pytest.approx(0.02, rel=0.02) and abs(float(drawn.mean())) < 1e-3
    assert not torch.equal(drawn[:128], drawn[128:256]), "each block has draws of its own"
    assert float(drawn[299].abs().max()) > 0


@pytest.mark.parametrize("chunk", [64, 128, 300])
def test_bare_matmuls_are_three_products_of_every_label(chunk: int) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    problem = make_problem(300, 12, 6, CPU)
    run = bare_matmuls(problem, torch.zeros(300, 12), chunk)
    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == 3 * 2 * 300 * 12 * 6


def test_a_problem_has_distinct_positives_in_range() -> None:
    problem = make_problem(3, 4, 20, CPU)
    pairs = torch.stack([problem.rows, problem.labels], 1)
    assert len(pairs.unique(dim=0)) == len(pairs) <= 20 * 3
    assert int(problem.labels.max()) < 3 and int(problem.rows.max()) < 20


def test_interleaved_calls_in_turns_and_warms_up() -> None:
    calls: list[str] = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    taken = interleaved(functions, 2, CPU)
    assert calls == ["a", "b"] * 3
    assert set(taken) == {"a", "b"}


def test_the_fastest_is_the_one_that_does_less() -> None:
    def matmuls(size: int) -> Callable[[], object]:
        square = torch.ones(size, size)
        return lambda: (square @ square).shape

    found = fastest(matmuls, 900, 2, CPU)
    assert found() == torch.Size([2, 2])


def test_the_peak_of_memory_is_noticed_though_it_is_freed() -> None:
    size = 64 << 20
    grown = peak_extra_bytes(lambda: bool(torch.ones(size // 4).sum()), CPU)
    assert size * 0.9 < grown < size * 1.5
    assert peak_extra_bytes(lambda: math.sqrt(2), CPU) < size // 8
