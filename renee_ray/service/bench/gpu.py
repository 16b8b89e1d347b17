"""`renee-ray bench gpu`: measures one GPU, by other commands in processes of their own.

docs/performance.md lists its parts. The lines of JSON that a command prints are kept however it
ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from renee_ray.benchmarks.sample import write_sample
from renee_ray.checkpoint.registry import Checkpoints
from renee_ray.errors import reason
from renee_ray.service.observe.versions import environment
from renee_ray.xfc.device import free_memory
from renee_ray.xfc.weights.storages import STORAGES

Records = list[dict[str, Any]]
LIMITS = {"oracle": 70, "step": 130, "train": 90, "topk": 50, "memory": 50, "resume": 90}
"""Seconds of each part, eight minutes in all."""
ORACLES_BYTES = 48 << 30
"""Memory of a GPU from which on the oracles, of some 8 GB each, run side by side."""
LEAST_S, LAST_S = 10, 15
"""Seconds that a part needs to begin, and that a command has to end when asked to."""
SMALL = {
    "oracle": "--labels 3000 --dim 96 --batch 64",
    "step": "--labels 4096,16384 --dim 64 --batch 32,128 --repeats 2",
    "compiled": "--labels 4096 --dim 64 --batch 32",
    "topk": "--labels 20000 --dim 64 --batch 64",
    "memory": "--labels 20000 --dim 64 --batch 64",
    "train": "batch_size=64 feed.window=4 --steps 8",
    "resume": "batch_size=64 epochs=4 loss_every=1 checkpoint.every_steps=20",
    "samples": {"train": (5000, 2500, 64, 2), "resume": (2000, 2000, 64, 1)},
}
PUBLISHED = {
    "oracle": "--labels 60077 --dim 384,768 --batch 1000,4096",
    "step": "--labels 131072,1305265,2812281 --dim 384,768 --batch 256,1024,4096",
    "compiled": "--labels 1305265 --dim 768 --batch 1024",
    "topk": "--labels 1305265 --dim 768 --batch 512",
    "memory": "--labels 2812281 --dim 768 --batch 1024",
    "train": "batch_size=1024 feed.window=32 --steps 64",
    "resume": "batch_size=512 epochs=20 loss_every=1 checkpoint.every_steps=200",
    "samples": {"train": (1305265, 130000, 768, 6), "resume": (131072, 60000, 384, 6)},
}
"""Arguments of the commands; samples: of `write_sample`."""
RECIPE = {
    "num_workers": 1, "epochs": 2, "evaluation": {"every": 0},
    "classifier": {"init": "normal", "momentum": 0.0}, "feed": {"prefetch": 2},
}  # fmt: skip


def bench_gpu(
    out: str, minutes: float, small: bool, only: Sequence[str], say: Callable[[str], Any]
) -> dict[str, Any]:
    """Runs all parts, or `only` these, and writes the file `out` anew after each.

    Returns:
        the file, and what was wrong with parts, by name.
    """
    if not small and not torch.cuda.is_available():
        say("there is no GPU here: sizes are small, as with --small")
        small = True
    found: dict[str, Any] = {**environment(), "small": small, "parts": {}}
    ends, file = time.monotonic() + 60 * minutes, Path(out)
    for name in only or LIMITS:
        file.write_text(json.dumps(found, indent=1))
        began = time.monotonic()
        limit_s = min(LIMITS[name] * minutes / 8, ends - began)
        say(f"{name}: {max(limit_s, 0):.0f} s at most")
        records, error = Records(), "left out: the time is over"
        if limit_s >= LEAST_S:
            try:
                with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
                    records, error = part(name, small, directory, began + limit_s)
            except Exception as failure:  # whatever it is, the other parts are worth having
                error = f"{type(failure).__name__}: {reason(failure)}"
        seconds = time.monotonic() - began
        found["parts"][name] = {"seconds": seconds, "error": error, "records": records}
    file.write_text(json.dumps(found, indent=1))
    return {"file": out, "errors": {k: v["error"] for k, v in found["parts"].items() if v["error"]}}


def part(name: str, small: bool, directory: str, ends: float) -> tuple[Records, str]:
    """Runs the commands of a part; returns what they printed, and the first error or nothing."""
    size: Any = SMALL if small else PUBLISHED
    recipe = Path(directory, "recipe.yaml")
    recipe.write_text(json.dumps(RECIPE))
    of_sample = f"{recipe} data={directory}/data encoder.name={directory}/encoder {size[name]}"
    alone = f"{size[name]} --references none --momentum 0"
    commands = {
        "oracle": [f"bench step --check --repeats 1 {alone},0.9 --precision {s}" for s in STORAGES],
        "step": [
            f"bench step {size['step']} --references fp16 --momentum 0 --precision bf16_sr",
            f"bench step {alone} --precision fp8_sr",
            f"bench step {size['compiled']} --references published,compiled --momentum 0 "
            f"--precision bf16_sr",
        ],
        "train": [f"bench train {of_sample} --repeats 1"],
        "topk": [
            f"bench topk {size['topk']} --references none --precision {precision}"
            for precision in STORAGES
        ],
        "memory": [f"bench step {alone},0.9 --precision {','.join(STORAGES)}"],
    }
    if name in size["samples"]:
        write_sample(directory, *size["samples"][name])
    if name == "resume":
        return resume(f"train {of_sample} output={directory}/run --json", directory, ends)
    # The oracles time nothing, and compiling is most of their work.
    if name == "oracle":
        narrow = torch.cuda.is_available() and free_memory(torch.device("cuda")) < ORACLES_BYTES
        with ThreadPoolExecutor(1 if narrow else os.cpu_count()) as pool:
            ended = list(pool.map(partial(run_command, ends=ends), commands[name]))
    else:
        ended = list(in_turn(commands[name], ends))
    return [each for records, _ in ended for each in records], next((e for _, e in ended if e), "")


def in_turn(commands: list[str], ends: float) -> Iterator[tuple[Records, str]]:
    """Runs one command after the other, each with an equal share of the time that is left."""
    for number, command in enumerate(commands):
        now = time.monotonic()
        yield run_command(command, now + (ends - now) / (len(commands) - number))


def run_command(
    arguments: str, ends: float, killed: Callable[[], Any] = lambda: False
) -> tuple[Records, str]:
    """Runs `renee-ray ARGUMENTS`; returns the lines of JSON that it printed, and why it failed.

    Args:
        ends: when it is asked to end, by the monotonic clock.
        killed: whether to kill it now.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as text:
        command = [sys.executable, "-m", "renee_ray", *arguments.split()]
        process = subprocess.Popen(command, stdout=out, stderr=text)
        try:
            while (status := process.poll()) is None and time.monotonic() < ends:
                if killed():
                    process.kill()
                time.sleep(0.05)
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LAST_S)
            process.kill()
            process.wait()
        out.seek(0)
        text.seek(0)
        records = [json.loads(line) for line in out if line.startswith("{") and line[-1] == "\n"]
        said = " ".join(text.read().split())[-300:]
    if status is None:
        return records, f"`{arguments}` took too long; its last words were: {said}"
    return records, f"`{arguments}` ended with status {status}: {said}" if status else ""


def resume(command: str, directory: str, ends: float) -> tuple[Records, str]:
    """Kills the command at a checkpoint after its first step, and runs it again."""
    checkpoints = Checkpoints(f"{directory}/run")

    def saved() -> int:
        newest = checkpoints.newest()
        return newest.state.step if newest else 0

    status = run_command(command, ends, saved)[1]
    killed_s, step = time.time(), saved()
    records, error = run_command(command, ends)
    if error or "status -9" not in status or not step:
        return [], error or status or "it ended before it was killed"
    steps = json.loads(Path(directory, "run", "history.json").read_text())["steps"]
    kept = [each["step"] for each in steps if each["time_s"] < killed_s]
    found = {"killed_after": step, "resumed_from": max(kept, default=0)}
    memory = {key: value for key, value in steps[-1].items() if key.startswith("gpu_")}
    return [found | {"steps": records[-1]["step"]} | memory], ""
