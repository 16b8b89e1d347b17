"""A plan of a run: memory, time, network and checkpoints, the fewest devices, what would help."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from renee_ray.config.overrides import make_config, parse_overrides
from renee_ray.config.recipes import About
from renee_ray.config.schema import RunConfig
from renee_ray.data.dataset import Dataset
from renee_ray.errors import ConfigError, ReneeError
from renee_ray.plan.devices import GIB, Device
from renee_ray.plan.encoder import Transformer, find_transformer
from renee_ray.plan.memory import COPIED, STATES, Worker, Workload
from renee_ray.plan.time import (
    STORAGE_RATE,
    Rates,
    checkpoint_bytes,
    forward_seconds,
    network_bytes,
    step_seconds,
    steps_of_epoch,
)

MOST_DEVICES = 4096
CHANGES = (
    "classifier.precision=bf16_sr", "classifier.precision=fp8_sr", "classifier.momentum=0",
    "average=0", "encoder.micro_batch={rows}", "encoder.gradient_checkpointing=true",
    "num_workers={double}",
)  # fmt: skip
"""What may save memory. None of them changes what the model is."""


@dataclass(frozen=True)
class Plan:
    """A plan, in bytes, seconds and hours; None: unknown without the number of points.

    memory: of one device, by component; total_bytes: their sum; limit_bytes: of the device, or of
        the machine for all workers on it; fits: whether they fit.
    fewest_devices: of the same kind; None: no number up to MOST_DEVICES.
    changes: (setting, bytes that it saves a device, seconds that it adds to a step), best first.
    """

    device: str
    num_workers: int
    precision: str
    memory: dict[str, int]
    total_bytes: int
    limit_bytes: int
    fits: bool
    fewest_devices: int | None
    host_copy_bytes: int
    step: dict[str, float]
    step_s: float
    calibrated: bool
    epoch_steps: int | None
    epoch_hours: float | None
    run_hours: float | None
    network_bytes: dict[str, float]
    checkpoint_bytes: int
    checkpoint_s: float
    changes: list[tuple[str, int, float]]


def find_workload(
    config: RunConfig, about: About | None, labels: int | None, points: int | None,
    tokens: float | None,
) -> Workload:  # fmt: skip
    """Returns what is to be trained on: the dataset at `config.data`, if that is not empty.

    labels, points, tokens: take precedence; what is not given is as the recipe says.

    Raises:
        ConfigError: nothing tells the number of labels.
    """
    longest = config.encoder.max_length
    if config.data != NO_DATA:
        known = Workload.of_manifest(Dataset.open(config.data).manifest, config.encoder)
    elif about or labels:
        own = (about.labels, about.points, about.tokens) if about else (0, None, None)
        known = Workload(own[0], own[1], min(own[2] or longest, longest), longest)
    else:
        raise ConfigError("nothing tells the number of labels; give data=DATASET or --labels")
    if labels:  # not the dataset's: nor are its label texts
        known = replace(known, other_texts=None, label_parts=0)
    return replace(
        known, labels=labels or known.labels, points=points or known.points,
        tokens=min(tokens or known.tokens, longest),
    )  # fmt: skip


NO_DATA = "-"
"""`data` of a configuration that is planned without a dataset."""


def make_plan(
    config: RunConfig,
    workload: Workload,
    transformer: Transformer,
    device: Device,
    num_workers: int,
    measure: Callable[[Worker], Rates] | None = None,
) -> Plan:
    """Plans a run of `num_workers` workers, each with one device.

    measure: returns measured rates for a worker on this machine; None: the device's table is used.
    """
    worker = Worker(config, device, transformer, workload, num_workers)
    rates = measure(worker) if measure else None
    memory, step = worker.memory(), step_seconds(worker, rates)
    steps, seconds = steps_of_epoch(worker), sum(step.values())
    hours = None if steps is None else steps * seconds / 3600
    once = forward_seconds(worker, rates) if config.encoder.frozen else 0.0
    saved = checkpoint_bytes(worker)
    return Plan(
        device=device.name,
        num_workers=num_workers,
        precision=worker.precision,
        memory=memory,
        total_bytes=sum(memory.values()),
        limit_bytes=device.memory,
        fits=fits(worker),
        fewest_devices=fewest(worker),
        host_copy_bytes=sum(memory[name] for name in COPIED),
        step=step,
        step_s=seconds,
        calibrated=rates is not None,
        epoch_steps=steps,
        epoch_hours=hours,
        run_hours=None if hours is None else hours * config.epochs + (steps or 0) * once / 3600,
        network_bytes=network_bytes(worker),
        checkpoint_bytes=saved,
        checkpoint_s=saved / (STORAGE_RATE * num_workers),
        changes=list(helpful(worker)),
    )


def needed(worker: Worker, components: tuple[str, ...] = ()) -> int:
    """Returns the bytes that a device must have: on a CPU, for all workers of the machine.

    components: those that count; none: all but the copy, which a run does without.
    """
    memory = worker.without_copy().memory()
    own = sum(memory[name] for name in components or memory)
    return own * (worker.num_workers if worker.device.kind == "cpu" else 1)


def fits(worker: Worker) -> bool:
    return needed(worker) <= worker.device.memory


def fewest(worker: Worker) -> int | None:
    """Returns the fewest devices that the run fits, or machines of one worker where it has CPUs."""
    counts = range(1, 1 + min(MOST_DEVICES, worker.batch))

    def fit(count: int) -> bool:
        memory = replace(worker.without_copy(), num_workers=count).memory()
        return sum(memory.values()) <= worker.device.memory

    found = bisect_left(counts, True, key=fit)
    return counts[found] if found < len(counts) else None


def helpful(
    worker: Worker, size: Callable[[Worker], int] = lambda worker: sum(worker.memory().values())
) -> Iterator[tuple[str, int, float]]:
    """Yields the three changes that save most of `size`, bytes, if it is 1% at least."""
    before, seconds = size(worker), sum(step_seconds(worker).values())
    found = []
    for template in CHANGES:
        double = 2 * worker.num_workers
        change = template.format(rows=max(1, worker.rows // 4), double=double)
        try:
            config = make_config(RunConfig, worker.config.model_dump(), parse_overrides([change]))
        except ReneeError:  # more workers than rows, or a bag has no such key
            continue
        workers = double if "double" in template else worker.num_workers
        changed = replace(worker, config=config, num_workers=workers)
        saved = before - size(changed)
        if saved > before / 100:
            found.append((change, saved, sum(step_seconds(changed).values()) - seconds))
    yield from sorted(found, key=lambda each: -each[1])[:3]


def plan_or_refuse(
    config: RunConfig, dataset: Dataset, device: Device, whose: str,
    on_progress: Callable[[str], None], *, force: bool = False,
) -> Plan:  # fmt: skip
    """Plans a run, or refuses one whose weights, momentum, averages and encoder exceed `device`.

    Activations and buffers, which are known less well, are in the table but refuse nothing.

    Args:
        whose: of whom the memory is, for people.
        force: refuses nothing.

    Raises:
        ReneeError: it does; `on_progress` is told the table.
    """
    workload = Workload.of_manifest(dataset.manifest, config.encoder)
    transformer = find_transformer(config.encoder, None)
    worker = Worker(config, device, transformer, workload, config.min_workers)
    plan = make_plan(config, workload, transformer, device, config.min_workers)
    states = needed(worker, STATES)
    if force or states <= device.memory:
        return plan
    for name, size in (plan.memory | {"all of a worker": plan.total_bytes}).items():
        on_progress(f"{name:20} {size / GIB:9.2f} GiB")
    # More workers on CPUs save nothing, as `needed` counts all of them.
    changes = list(helpful(worker, partial(needed, components=STATES)))
    for change, saved, _ in changes:
        on_progress(f"{change} saves {saved / GIB:.1f} GiB of them")
    raise ReneeError(
        f"weights, momentum, averages and encoder alone take {states / GIB:.1f} GiB and {whose} "
        f"has {device.memory / GIB:.1f} GiB; take {'a change above, ' * bool(changes)}more "
        f"machines, or --force"
    )
