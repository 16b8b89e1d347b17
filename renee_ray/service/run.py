"""A run's directory: Ray Train's checkpoints, the best one, and the files that are ours.

Ray Train keeps the newest checkpoints. It could keep those of the highest score instead, but not
both, so the best is a copy: each worker writes its files to best-STEP/, then best.json names that
directory, then the best before it is deleted. A run killed in between still has the one before.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import pyarrow.fs as pafs
import ray.train

from renee_ray.config import ReneeError, RunConfig, make_config
from renee_ray.data.dataset import absolute, filesystem_of
from renee_ray.training.checkpoint import Checkpoint

RUN_FILE, HISTORY_FILE, BEST_FILE = "run.json", "history.json", "best.json"
BEST_NAME = re.compile(r"best-\d{9,}")


@dataclass(frozen=True)
class RunDirectory:
    """A run's directory, local or remote, and what in it is not Ray Train's."""

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

    def checkpoint(self, which: str) -> tuple[Checkpoint, dict[str, Any]]:
        """(the `best` or `last` committed checkpoint, the metrics reported with it).

        Without a validation split there is no best one: then it is the last.
        """
        best = self.best()
        if which == "best" and best is not None:
            filesystem, root = self._located()
            return Checkpoint(filesystem, f"{root}/{best['directory']}"), best["metrics"]
        try:
            result = ray.train.Result.from_path(*self._for_ray())
        except (RuntimeError, ValueError, FileNotFoundError) as error:
            raise ReneeError(
                f"{self.path} holds no committed checkpoint yet; wait for the first evaluation, "
                f"or run `renee-ray train` on it again"
            ) from error
        if result.checkpoint is None:
            raise ReneeError(f"{self.path} holds no committed checkpoint yet")
        committed = result.checkpoint
        return Checkpoint(committed.filesystem, committed.path), result.metrics or {}

    def best(self) -> dict[str, Any] | None:
        """The best checkpoint so far: `directory`, `step`, `metric`, `metrics`.

        Raises:
            ReneeError: the file that names it is damaged.
        """
        found = self.read(BEST_FILE)
        keys = {"directory": str, "step": int, "metric": str, "metrics": dict}
        whole = found is not None and all(isinstance(found.get(k), t) for k, t in keys.items())
        if found is not None and not (whole and BEST_NAME.fullmatch(found["directory"])):
            raise ReneeError(f"{self.path}/{BEST_FILE} is damaged; use checkpoint=last")
        return found

    def would_be_best(self, metric: str, metrics: dict[str, float]) -> bool:
        """Whether a checkpoint with these metrics beats the best so far."""
        best = self.best()
        if not metrics or best is None or best["metric"] != metric:
            return bool(metrics)
        return metrics[metric] > best["metrics"][metric]

    def copy_to_best(self, local: str, step: int) -> None:
        """Uploads one rank's files of a checkpoint that is going to be the best."""
        filesystem, root = self._located()
        filesystem.create_dir(f"{root}/best-{step:09d}", recursive=True)
        pafs.copy_files(
            local, f"{root}/best-{step:09d}", pafs.LocalFileSystem(), filesystem, use_threads=False
        )

    def publish_best(self, step: int, metric: str, metrics: dict[str, float]) -> None:
        """Makes best-STEP, which all ranks have written, the best; deletes the one before."""
        before = self.best()
        name = f"best-{step:09d}"
        self.write(
            BEST_FILE, {"directory": name, "step": step, "metric": metric, "metrics": metrics}
        )
        if before is not None and before["directory"] != name:
            filesystem, root = self._located()
            filesystem.delete_dir(f"{root}/{before['directory']}")

    def _for_ray(self) -> tuple[str, pafs.FileSystem | None]:
        if "://" not in self.path:
            return absolute(self.path), None
        filesystem, root = self._located()
        return root, filesystem
