"""What a plan counts of several workers: where they run, what they send and hold of each other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from renee_ray.benchmarks import calibrate
from renee_ray.cli.main import main
from renee_ray.config.schema import BagConfig
from renee_ray.model import bag as bag_module
from renee_ray.model import initialise
from renee_ray.model.bag import Bag, BagOptimizer
from renee_ray.model.encoder import build_encoder
from renee_ray.model.token_gradient import TokenGradient
from renee_ray.plan import devices
from renee_ray.plan.devices import GPUS, Device
from renee_ray.plan.encoder import Transformer
from renee_ray.plan.time import Rates, network_bytes, step_seconds
from renee_ray.rank import collectives
from renee_ray.rank.collectives import Ranks
from tests.xfc.memory import peak_bytes

from .conftest import DIM
from .test_plan import configured, worker

CPU = torch.device("cpu")
BAG = {"dim": 64, "buckets": 1 << 16}


@pytest.fixture
def one_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with one GPU."""
    cpu = devices.local_device(False)

    def local(on_gpu: bool) -> Device:
        return GPUS["h100"] if on_gpu else cpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(devices, "local_device", local)


def planned(sample: str, capsys: pytest.CaptureFixture[str], *more: str) -> Any:
    yaml = Path(sample, "several.yaml")
    yaml.write_text(f"encoder: {{name: {sample}/encoder}}\n")
    assert main(["plan", str(yaml), f"data={sample}/data", "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.usefixtures("one_h100")
@pytest.mark.parametrize(
    ("given", "device"),
    [
        (["num_workers=1"], "h100"),
        (["num_workers=2"], "cpu"),
        (["num_workers=1", "use_gpu=no"], "cpu"),
        (["--devices", "16"], "h100"),
        (["--devices", "16", "use_gpu=no"], "cpu"),
        (["num_workers=2", "--device", "v100"], "v100"),
    ],
)
def test_a_plan_is_for_the_device_that_train_takes(
    sample: str, capsys: pytest.CaptureFixture[str], given: list[str], device: str
) -> None:
    assert planned(sample, capsys, *given)["device"] == device


@pytest.mark.usefixtures("one_h100")
def test_measured_rates_are_of_the_same_device(
    sample: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "measure", lambda worker: Rates(1e-9, 1e-6, 1e-3))
    own = "num_workers=1", "--calibrate"
    assert planned(sample, capsys, *own)["calibrated"]
    assert planned(sample, capsys, *own, "--device", "h100")["calibrated"]
    command = ["plan", str(Path(sample, "several.yaml")), f"data={sample}/data", *own]
    for more in (["--device", "v100"], ["use_gpu=no"]):
        assert main([*command, *more]) == 1
        assert "--calibrate measures this machine's h100" in capsys.readouterr().err


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_network_and_time(sample: str, num_workers: int) -> None:
    own = worker(sample, num_workers, batch_size=24)
    sent = network_bytes(own)
    share = (num_workers - 1) / num_workers
    assert sent["embeddings"] == pytest.approx(4 * 24 * DIM * share)
    encoder = build_encoder(own.config.encoder, CPU, 0)
    table = TokenGradient(encoder, Ranks()).weight
    dense = sum(p.numel() for p in encoder.parameters()) - table.numel()
    assert sent["gradient of the encoder"] == pytest.approx(8 * dense * share)
    tokens = own.rows * round(own.workload.tokens)
    gathered = 4 * DIM * tokens * (num_workers - 1)
    assert sent["gradient of token vectors"] == gathered < 8 * table.numel()
    seconds = step_seconds(own)
    assert (seconds["network"] > 0) == (num_workers > 1)
    again = replace(own, config=configured(sample, batch_size=24, encoder={
        "name": f"{sample}/encoder", "gradient_checkpointing": True}))  # fmt: skip
    assert step_seconds(again)["encoder"] == pytest.approx(4 / 3 * seconds["encoder"])


def test_the_token_vectors_of_a_large_batch_or_a_compiled_encoder_are_summed(sample: str) -> None:
    large = worker(sample, 2, batch_size=1 << 14)
    vocabulary, width = large.transformer.table
    assert vocabulary < 2 * large.rows * large.workload.tokens
    assert network_bytes(large)["gradient of token vectors"] == 4 * vocabulary * width
    compiled = worker(sample, 2, encoder={"name": f"{sample}/encoder", "compile": True})
    sent = network_bytes(compiled)
    assert sent["gradient of token vectors"] == 0
    assert sent["gradient of the encoder"] == 4 * compiled.parameters
    frozen = worker(sample, 2, encoder={"name": f"{sample}/encoder", "frozen": True})
    assert network_bytes(frozen)["gradient of token vectors"] == 0


@pytest.mark.parametrize("num_workers", [1, 2, 4, 8])
def test_the_rows_of_a_bag_are_those_that_a_gather_holds(
    sample: str, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And sends to each of the others. All ranks have the same rows here."""
    sent = []

    def gather(everyone: Tensor, own: Tensor, group: object) -> None:
        sent.append(own.nbytes * (num_workers - 1))
        everyone.copy_(own.repeat(num_workers, 1))

    monkeypatch.setattr(collectives, "all_gather_single", gather)
    monkeypatch.setattr(bag_module, "row_counts", lambda ranks, n: [n] * ranks.num_ranks)
    own = worker(sample, num_workers, encoder={"name": "none", "bag": BAG})
    bag = Bag(BagConfig(**BAG))
    bag.idf.fill_(1.0)
    buckets = torch.arange(own.ngrams)
    bag.ngrams = lambda ids, mask: (  # type: ignore[method-assign]  # as many as are planned
        buckets * len(ids) // len(buckets), buckets, torch.ones_like(buckets)
    )  # fmt: skip
    ids = torch.zeros(own.rows, 1, dtype=torch.int64)
    optimizer = BagOptimizer(bag, Ranks(0, num_workers))
    peaks = []
    for _ in range(3):  # the profiler misses some of it at times
        bag.zero_grad()
        bag(ids, ids).sum().backward()
        peaks.append(peak_bytes(optimizer.reduce, CPU))
    memory = own.memory()["rows of the bag"]
    assert max(peaks) < 1.05 * memory
    if num_workers > 2:
        assert 0.95 * memory < max(peaks)
        assert network_bytes(own)["gradient of the bag"] == max(sent)
    assert (network_bytes(own)["gradient of the bag"] > 0) == (num_workers > 1)


@pytest.mark.parametrize(("num_workers", "batch"), [(1, 256), (1, 1000), (3, 256), (3, 1000)])
def test_a_frozen_transformer_embeds_own_rows_of_a_batch(
    sample: str, num_workers: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def activations(self: Transformer, rows: int, *given: Any) -> int:
        asked.append(rows)
        return 0

    monkeypatch.setattr(Transformer, "activations", activations)
    encoder = {"name": f"{sample}/encoder", "frozen": True}
    worker(sample, num_workers, encoder=encoder, evaluation={"batch_size": batch}).memory()
    assert asked == [max(initialise.TEXT_BATCH, -(-batch // num_workers))]
