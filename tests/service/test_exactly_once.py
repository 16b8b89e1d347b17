"""Rows of an epoch over killed workers and other numbers of them."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from renee_ray.config.overrides import make_config
from renee_ray.config.schema import RunConfig
from renee_ray.data.dataset import Dataset
from renee_ray.rank.batch import Position
from renee_ray.service.cluster.feed import training_orders
from renee_ray.service.cluster.launch import launch

COMMIT_EVERY = 3
EPOCHS = 2


def reader(folder: str) -> Callable[[dict[str, Any]], int]:
    """A worker that notes its rows of each batch, commits its position, and may die once."""

    def read(arguments: dict[str, Any]) -> int:
        from renee_ray.rank.collectives import Ranks, all_sum
        from renee_ray.service.cluster.feed import feed, training_orders

        config = RunConfig.model_validate(arguments["config"])
        dataset: Dataset = arguments["dataset"]
        ranks = Ranks() if config.num_workers == 1 else Ranks.of_process_group()
        committed = Path(folder, "committed")
        done = int(committed.read_text()) if committed.exists() else 0
        epochs = training_orders(config, dataset)
        batches = epochs[0].num_batches
        start = Position(done // batches, done % batches)
        for batch in feed(
            dataset, epochs, ranks.rank, ranks.num_ranks, start=start, max_length=8, prefetch=1
        ):
            if done == arguments["stop"]:
                break
            note = Path(folder, f"{done:04d}-run{arguments['run']}-rank{ranks.rank}.json")
            note.write_text(json.dumps(batch.points.tolist()))
            done += 1
            marker = Path(folder, f"killed-{arguments['run']}")
            if done == arguments["kill"] and ranks.rank == 0 and not marker.exists():
                marker.write_text("")
                os.kill(os.getpid(), signal.SIGKILL)
            if done % COMMIT_EVERY == 0:
                all_sum(ranks, torch.zeros(1))  # every rank is here
                if ranks.rank == 0:
                    Path(folder, "committing").write_text(str(done))
                    Path(folder, "committing").replace(committed)
        return done

    return read


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_each_row_once_after_a_kill_and_with_other_numbers_of_workers(
    dataset: str, tmp_path: Path
) -> None:
    opened = Dataset.open(dataset)
    notes = tmp_path / "notes"
    notes.mkdir()
    made: dict[str, Any] = {"data": dataset, "output": str(tmp_path / "run"), "epochs": EPOCHS}
    made |= {"batch_size": 24, "timeout_s": 60, "feed": {"streams": 4, "window": 4}}
    total = 0
    # The kill is between two commits, so that what follows the last one is read again.
    for run, (workers, kill, share) in enumerate([(1, 10**6, 0.4), (2, 14, 1)]):
        config = make_config(RunConfig, {**made, "num_workers": workers}, where="test")
        epochs = training_orders(config, opened)
        total = sum(order.num_batches for order in epochs)
        arguments = {
            "config": config.model_dump(), "dataset": opened, "run": run, "kill": kill,
            "stop": total if share == 1 else int(total * share),
        }  # fmt: skip
        read = reader(str(notes))
        done = read(arguments) if workers == 1 else launch(read, arguments, config, use_gpu=False)
        assert done == arguments["stop"]
    assert {path.name for path in notes.glob("killed-*")} == {"killed-1"}

    seen: list[Counter[int]] = [Counter() for _ in range(EPOCHS)]
    for number in range(total):
        found = [path.name.split("-") for path in notes.glob(f"{number:04d}-*.json")]
        last = max(run for _, run, _ in found)  # earlier ones were taken back by a resumption
        for _, _, rank in (name for name in found if name[1] == last):
            rows = json.loads((notes / f"{number:04d}-{last}-{rank}").read_text())
            seen[number * EPOCHS // total].update(rows)
    rows = opened.read_rows("train", 0, opened.manifest.num_points("train"))["point_id"].to_pylist()
    for epoch in seen:
        assert epoch == Counter(rows)
