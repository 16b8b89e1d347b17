"""Measures runs beside their plans: `python -m tests.plan.measure [SETTING ...]`, a line each.

A run trains random points through Ray, as `renee-ray train` does. Its own records have the peak
resident memory of the first worker, and the CPU seconds of the thread that makes the steps, which
other programs on the machine hardly change. The plan is that of `renee-ray plan --calibrate`, whose
network is left out of its step, since it is a wait. `empty` has next to no model.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from renee_ray.benchmarks.sample import write_sample
from renee_ray.data import dataset as layout
from renee_ray.data.tokenizer import load

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
STEPS, EVERY = 48, 2
SETTINGS: dict[str, tuple[int, int, int, int, int, dict[str, Any]]] = {
    # labels, batch, workers; D and layers of a random BERT, or 0: MiniLM or none; the other keys
    "empty": (64, 8, 1, 16, 1, {}),
    "fp32": (150_000, 64, 1, 256, 4, {"classifier.precision": "fp32"}),
    "bf16": (600_000, 64, 1, 256, 2, {
        "classifier.precision": "bf16_sr", "classifier.momentum": 0}),
    "fp8": (300_000, 96, 2, 384, 3, {"classifier.precision": "fp8_sr"}),
    "minilm": (50_000, 96, 2, 0, 0, {
        "encoder.name": MINILM, "encoder.max_length": 48, "classifier.precision": "bf16_split"}),
    "bag": (150_000, 256, 1, 0, 0, {
        "encoder.name": "none", "encoder.bag.dim": 256, "classifier.precision": "bf16_sr"}),
    "frozen": (60_000, 128, 2, 0, 0, {
        "encoder.name": MINILM, "encoder.frozen": True, "encoder.bag.dim": 128,
        "classifier.precision": "fp32"}),
    "softmax": (60_000, 256, 1, 128, 2, {
        "classifier.objective": "softmax", "classifier.precision": "bf16_sr"}),
}  # fmt: skip


def main() -> None:
    names = sys.argv[1:] or list(SETTINGS)
    heading = "setting", "planned MiB", "measured", "ratio", "planned CPU s", "measured", "ratio"
    print(" | ".join(f"{each:>13}" for each in heading))
    for name in names:
        with tempfile.TemporaryDirectory(prefix="renee-ray-measure-") as directory:
            plan, peak, step = _measured(directory, *SETTINGS[name])
        planned = plan["total_bytes"] / 2**20
        work = sum(plan["step"][piece] for piece in ("encoder", "classifier", "AdamW", "host"))
        print(
            f"{name:>13} | {planned:13.0f} | {peak:13.0f} | {planned / peak:13.3f} | "
            f"{work:13.3f} | {step:13.3f} | {work / step:13.3f}", flush=True,
        )  # fmt: skip


def _measured(
    directory: str, labels: int, batch: int, workers: int, dim: int, layers: int,
    own: dict[str, Any],
) -> tuple[dict[str, Any], float, float]:  # fmt: skip
    """Returns the plan, the peak of the run in MiB, and the CPU seconds of its median step."""
    longest = own.get("encoder.max_length", 18)
    write_sample(directory, labels, STEPS * batch, dim or 16, layers or 1, longest)
    data, encoder = f"{directory}/data", own.get("encoder.name", f"{directory}/encoder")
    if encoder == MINILM:
        manifest = layout.Dataset.open(data).manifest
        told = replace(manifest, tokenizer=MINILM, vocabulary_hash=load(MINILM).hash)
        layout.write_manifest(data, told)
    settings = {
        "data": data, "output": f"{directory}/run", "num_workers": workers, "threads": 1,
        "batch_size": batch, "epochs": 1, "loss_every": EVERY, "encoder.name": encoder,
        "checkpoint.every_steps": STEPS // 4,
        "classifier.init": "normal", "feed.augment": 0, "use_gpu": "no",
    } | own  # fmt: skip
    config = Path(directory, "config.yaml")
    config.write_text("{}")
    overrides = [
        str(config),
        *(f"{key}={json.dumps(v).strip(chr(34))}" for key, v in settings.items()),
    ]
    command = [sys.executable, "-m", "renee_ray"]
    planning = [*command, "plan", *overrides, "--device", "cpu", "--calibrate", "--json"]
    plan = json.loads(subprocess.run(planning, check=True, capture_output=True).stdout)
    subprocess.run([*command, "train", *overrides], check=True, capture_output=True)
    steps = json.loads(Path(directory, "run/history.json").read_text())["steps"]
    taken = [(b["thread_s"] - a["thread_s"]) / EVERY for a, b in pairwise(steps[1:])]
    return plan, max(each["peak_rss_gib"] for each in steps) * 2**10, median(taken)


if __name__ == "__main__":
    main()
