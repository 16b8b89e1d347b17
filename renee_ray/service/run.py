"""A run's directory: Ray Train's checkpoints, and the two files beside them that are ours."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pyarrow.fs as pafs
import ray.train

from renee_ray.config import ReneeError, RunConfig, make_config
from renee_ray.data.dataset import absolute, filesystem_of
from renee_ray.training.checkpoint import Checkpoint

RUN_FILE, HISTORY_FILE = "run.json", "history.json"


@dataclass(frozen=True)
class RunDirectory:
    """A run's directory, local or remote, and the two files in it that are not Ray Train's."""

    path: str

    def _located(self) -> tuple[pafs.FileSystem, str]:
        return filesystem_of(self.path)

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the run; None where it is not there."""
        filesystem, root = self._located()
        if filesystem.get_file_info(f"{root}/{name}").type != pafs.FileType.File:
            return None
        with filesystem.open_input_file(f"{root}/{name}") as file:
            return json.loads(file.read())

    def write(self, name: str, content: dict[str, Any]) -> None:
        filesystem, root = self._located()
        filesystem.create_dir(root, recursive=True)
        with filesystem.open_output_stream(f"{root}/{name}.tmp") as sink:
            sink.write(json.dumps(content, indent=1).encode())
        filesystem.move(f"{root}/{name}.tmp", f"{root}/{name}")

    def config(self) -> RunConfig:
        """The configuration that the run was started with.

        Raises:
            ReneeError: there is no run here.
        """
        saved = self.read(RUN_FILE)
        if saved is None:
            raise ReneeError(
                f"{self.path} is not a run of renee_ray: no {RUN_FILE}; "
                f"run `renee-ray train CONFIG data=DATASET output={self.path}` first"
            )
        return make_config(RunConfig, saved["config"], where=f"{self.path}/{RUN_FILE}")

    def checkpoint(self, which: str, metric: str) -> tuple[Checkpoint, dict[str, Any]]:
        """(the `best` or `last` committed checkpoint, the metrics reported with it)."""
        try:
            result = ray.train.Result.from_path(*self._for_ray())
        except (RuntimeError, ValueError, FileNotFoundError) as error:
            raise ReneeError(
                f"{self.path} holds no committed checkpoint yet; wait for the first evaluation, "
                f"or run `renee-ray train` on it again"
            ) from error
        found = list(result.best_checkpoints or [])
        scored = [pair for pair in found if pair[1].get(metric) is not None]
        if which == "best" and scored:
            committed, metrics = max(scored, key=lambda pair: pair[1][metric])
        elif result.checkpoint is not None:
            committed, metrics = result.checkpoint, result.metrics or {}
        else:
            raise ReneeError(f"{self.path} holds no committed checkpoint yet")
        return Checkpoint(committed.filesystem, committed.path), metrics

    def _for_ray(self) -> tuple[str, pafs.FileSystem | None]:
        if "://" not in self.path:
            return absolute(self.path), None
        filesystem, root = self._located()
        return root, filesystem
