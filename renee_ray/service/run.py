"""A run's directory: Ray Train's checkpoints, the best one, and the files that are ours.

Ray Train keeps the newest checkpoints. It could keep those of the highest score instead, but not
both, so the best is a copy: each worker writes its files to best-STEP/, then Ray Train commits the
checkpoint, then best.json names the copy, then the best before it is deleted. A run killed in
between has the one before, and `settle_best` names the copy of a committed checkpoint later.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pyarrow.fs as pafs
import ray.train

from renee_ray.config import ReneeError, RunConfig, make_config
from renee_ray.data.dataset import Dataset, has_manifest
from renee_ray.data.storage import (
    absolute,
    filesystem_of,
    make_directory,
    patiently,
    read_file,
    replace_file,
)
from renee_ray.training.checkpoint import STATE, Checkpoint

RUN_FILE, HISTORY_FILE, BEST_FILE = "run.json", "history.json", "best.json"


@dataclass(frozen=True)
class RunDirectory:
    """A run's directory, local or remote, and what in it is not Ray Train's."""

    path: str

    def _located(self) -> tuple[pafs.FileSystem, str]:
        return filesystem_of(self.path)

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the run; None where it is not there."""
        found = read_file(f"{self.path.rstrip('/')}/{name}")
        return None if found is None else json.loads(found)

    def write(self, name: str, content: dict[str, Any]) -> None:
        make_directory(self.path)
        replace_file(f"{self.path.rstrip('/')}/{name}", json.dumps(content, indent=1).encode())

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

    def dataset(self) -> Dataset:
        """The dataset that the run was trained on, for its label counts, texts and points.

        Raises:
            ReneeError: it is not where it was any more.
        """
        path = str((self.read(RUN_FILE) or {})["dataset"]["path"])
        if not has_manifest(path):
            raise ReneeError(
                f"this needs the dataset that {self.path} was trained on, and it is not at {path} "
                f"any more; put it back there"
            )
        return Dataset.open(path)

    def checkpoint(self, which: str) -> Checkpoint:
        """The `best` or the `last` committed checkpoint.

        Without a validation split there is no best one: then it is the last.

        Raises:
            ReneeError: there is none, or the file that names the best is damaged.
        """
        best = self.best() if which == "best" else None
        if best is not None:
            return self.checkpoint_at(best["directory"])
        try:
            committed = ray.train.Result.from_path(*self._for_ray()).checkpoint
        except (RuntimeError, ValueError, FileNotFoundError) as error:
            raise ReneeError(
                f"{self.path} holds no committed checkpoint yet; wait for the first evaluation, "
                f"or run `renee-ray train` on it again"
            ) from error
        if committed is None:
            raise ReneeError(f"{self.path} holds no committed checkpoint yet")
        return Checkpoint(committed.filesystem, committed.path)

    def checkpoint_at(self, name: str) -> Checkpoint:
        """The checkpoint in the directory `name` of the run."""
        filesystem, root = self._located()
        return Checkpoint(filesystem, f"{root}/{name}")

    def best(self) -> dict[str, Any] | None:
        """The best checkpoint so far: `directory`, `step`, `metrics`.

        Raises:
            ReneeError: the file that names it is damaged.
        """
        try:
            found = self.read(BEST_FILE)
            if found is not None:
                name, step, metrics = found["directory"], found["step"], found["metrics"]
                if name != best_name(step) or not all(
                    isinstance(value, int | float) for value in metrics.values()
                ):
                    raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ReneeError(
                f"{self.path}/{BEST_FILE} is damaged; delete it, or use checkpoint=last"
            ) from None
        return found

    def copy_to_best(self, local: str, step: int) -> None:
        """Uploads one rank's files of a checkpoint that is going to be the best."""
        filesystem, root = self._located()
        target = f"{root}/{best_name(step)}"

        def copy() -> None:
            filesystem.create_dir(target, recursive=True)
            pafs.copy_files(local, target, pafs.LocalFileSystem(), filesystem, use_threads=False)

        patiently(copy, f"writing {self.path}/{best_name(step)}")

    def publish_best(self, step: int, metrics: dict[str, float]) -> None:
        """Makes best-STEP, which all ranks have written, the best; deletes all others."""
        name = best_name(step)
        self.write(BEST_FILE, {"directory": name, "step": step, "metrics": metrics})
        filesystem, root = self._located()

        def delete_others() -> None:
            for info in filesystem.get_file_info(pafs.FileSelector(root)):
                if info.base_name.startswith("best-") and info.base_name != name:
                    filesystem.delete_dir(info.path)

        patiently(delete_others, f"deleting earlier checkpoints of {self.path}")

    def settle_best(self, metric: str, evals: list[dict[str, Any]], step: int) -> None:
        """Names the best where a run was killed after the commit of `step`, before naming it.

        Args:
            evals: of the committed checkpoint's history.
        """
        if not evals or evals[-1]["step"] != step:
            return
        filesystem, root = self._located()
        copied = patiently(
            lambda: filesystem.get_file_info(f"{root}/{best_name(step)}/{STATE}"),
            f"reading {self.path}",
        )
        metrics = evals[-1]["metrics"]
        if copied.type == pafs.FileType.File and beats(self.best(), step, metric, metrics):
            self.publish_best(step, metrics)

    def _for_ray(self) -> tuple[str, pafs.FileSystem | None]:
        if "://" not in self.path:
            return absolute(self.path), None
        filesystem, root = filesystem_of(self.path, for_ray=True)
        return root, filesystem


def best_name(step: int) -> str:
    return f"best-{step:09d}"


def beats(best: dict[str, Any] | None, step: int, metric: str, metrics: dict[str, float]) -> bool:
    """Whether a checkpoint of `step` with `metrics` is to replace the best so far.

    One of the same step is not: its directory is what best.json names, so a rewrite that is
    killed half-way would leave no best at all.
    """
    if not metrics or best is None:
        return bool(metrics)
    return step != best["step"] and metrics[metric] > best["metrics"].get(metric, float("-inf"))
