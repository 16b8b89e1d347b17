"""Worker functions as jobs of a real cluster: errors, threads, the CPU that reads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from renee_ray.config.overrides import make_config
from renee_ray.config.schema import RunConfig
from renee_ray.errors import ReneeError
from renee_ray.rank.collectives import Ranks, all_sum
from renee_ray.service.cluster.connect import ensure_ray
from renee_ray.service.cluster.feed import READ_CPUS, scoring_feed
from renee_ray.service.cluster.launch import launch, threads_of
from renee_ray.service.train.train import train

from ..data.tiny import write_tiny
from .conftest import started

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(environment: None) -> Iterator[Cluster]:
    """A node of two CPUs and one of one, which this process has joined."""
    made = started(lambda: Cluster(initialize_head=True, head_node_args={"num_cpus": 2}))
    started(lambda: made.add_node(num_cpus=1), lambda: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", made.address)
        ensure_ray(3)
        yield made
    ray.shutdown()
    made.shutdown()


def configured(**settings: Any) -> RunConfig:
    return make_config(RunConfig, {"data": "unused", "output": "unused", **settings})


def test_a_users_error_in_one_elastic_worker_ends_the_job_at_once(
    cluster: Cluster, tmp_path: Path
) -> None:
    """The other one waits for it in a collective, for ten minutes if it is let.

    There are as many workers as leave a CPU to what reads for them.
    """
    started = tmp_path / "started"

    def work(arguments: dict[str, Any]) -> None:
        ranks = Ranks.of_process_group(600)
        with started.open("a") as file:
            file.write(f"{ranks.rank} of {ranks.num_ranks}\n")
        reading = ray.remote(num_cpus=READ_CPUS)(lambda: 1)  # type: ignore[call-overload]
        ray.get(reading.remote(), timeout=300)
        all_sum(ranks, torch.zeros(1))  # both have read
        if ranks.rank == 1:
            raise ReneeError("part-3.parquet is damaged; convert it again")
        all_sum(ranks, torch.zeros(1))

    config = configured(num_workers=[1, 8], checkpoint={"max_failures": -1})
    with pytest.raises(ReneeError) as found:
        launch(work, {}, config, use_gpu=False)
    assert str(found.value).startswith("part-3.parquet is damaged; convert it again (on node ")
    assert sorted(started.read_text().splitlines()) == ["0 of 2", "1 of 2"]


@pytest.fixture(scope="module")
def damaged(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, str, list[str]]:
    """A job of one worker that reads a damaged part: (the part's name, the error, notes).

    A worker notes its threads, what OpenMP is told, and its cores. The driver may use one core.
    """
    folder = tmp_path_factory.mktemp("damaged")
    dataset, notes = write_tiny(folder / "set"), folder / "notes"
    part = Path(dataset.path, dataset.manifest.splits["test"][0].path)
    content = bytearray(part.read_bytes())
    content[len(content) // 4] ^= 0xFF
    part.write_bytes(content)

    def work(arguments: dict[str, Any]) -> None:
        own = torch.get_num_threads(), os.environ["OMP_NUM_THREADS"], len(os.sched_getaffinity(0))
        with notes.open("a") as file:
            print(*own, file=file)
        list(scoring_feed(dataset, "test", 4, 9, Ranks()))

    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        with pytest.raises(ReneeError) as found:
            launch(work, {}, configured(num_workers=1), use_gpu=False)
    finally:
        os.sched_setaffinity(0, before)
    return part.name, str(found.value), notes.read_text().splitlines()


def test_a_damaged_part_that_a_task_reads_for_a_worker_ends_the_job_at_once(
    damaged: tuple[str, str, list[str]],
) -> None:
    part, said, notes = damaged
    assert part in said and "\n" not in said
    assert len(notes) == 1


def test_threads_are_those_of_the_workers_node(damaged: tuple[str, str, list[str]]) -> None:
    """The worker has its node to itself."""
    threads, variable, cores = map(int, damaged[2][0].split())
    assert threads == variable == cores == len(os.sched_getaffinity(0))
    assert threads_of(configured(threads=3), use_gpu=False, sharing=2) == 3


def test_a_run_that_exceeds_the_memory_of_all_nodes_is_refused(
    cluster: Cluster, tmp_path: Path
) -> None:
    dataset, told = write_tiny(tmp_path / "set"), list[str]()
    bag = {"dim": 512, "buckets": 2**31}
    layer = {"data": dataset.path, "output": str(tmp_path / "run"), "encoder": {"name": "none"}}
    config = make_config(RunConfig, layer, {"use_gpu": "no", "encoder": {"bag": bag}})
    with pytest.raises(ReneeError, match=r"encoder alone take .* and the whole cluster has"):
        train(config, told.append)
    assert any(line.startswith("bag ") for line in told) and not (tmp_path / "run").exists()
