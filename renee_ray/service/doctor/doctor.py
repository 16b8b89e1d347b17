"""Sends probes to every node of a cluster, each with a time limit, and collects what they found.

Probes reserve no CPU, so that they run beside whatever else runs. A probe that fails or does not
answer in time is a fact like any other: {"error": reason}.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, TypeVar

import ray
from ray import ObjectRef, cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import renee_ray
from renee_ray.config.doctor import DoctorConfig
from renee_ray.data.storage import PATIENCE, absolute, remove, write_file
from renee_ray.errors import reason
from renee_ray.service.cluster.connect import ensure_ray
from renee_ray.service.doctor import probes
from renee_ray.service.doctor.findings import find

K = TypeVar("K", bound=Hashable)

CLOCK_READINGS = 3


def examine(config: DoctorConfig, on_progress: Callable[[str], None]) -> dict[str, Any]:
    """Examines the cluster of RAY_ADDRESS, or this machine.

    Returns:
        nodes: facts of each, this process's first; pairs: what two nodes exchange; cluster: its
        CPUs and GPUs; findings: what is wrong.
    """
    storage = [absolute(url).rstrip("/") for url in config.storage]
    ensure_ray(0, local_cpus=config.num_workers + 1)
    cloudpickle.register_pickle_by_value(renee_ray)
    try:
        nodes = _Nodes(config.timeout_s)
        on_progress(f"examining {len(nodes.facts)} nodes")
        nodes.examine()
        total, free = ray.cluster_resources(), ray.available_resources()
        for url in storage:
            on_progress(f"reading and writing {url}")
            nodes.examine_storage(url)
        gpus, free_gpus = total.get("GPU", 0), free.get("GPU", 0)
        backends = ["gloo", *["nccl"] * (gpus == free_gpus > 0)]
        pairs = list(nodes.exchange(backends, on_progress))
    finally:
        cloudpickle.unregister_pickle_by_value(renee_ray)
    cluster = {"cpus": total.get("CPU", 0), "free_cpus": free.get("CPU", 0)}
    cluster |= {"gpus": gpus, "free_gpus": free_gpus}
    cluster |= config.model_dump(include={"num_workers", "cpus_per_worker"})
    facts = {"nodes": list(nodes.facts.values()), "pairs": pairs, "cluster": cluster}
    return facts | {"findings": find(facts)}


def rounds(names: list[str]) -> Iterator[list[tuple[str, str]]]:
    """Yields all pairs in rounds in which each name is once: the circle method of tournaments.

    A single name is paired with itself.
    """
    if len(names) == 1:
        yield [(names[0], names[0])]
        return
    circle: list[str | None] = [*names, *[None] * (len(names) % 2)]
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        meeting = zip(circle[:half], reversed(circle[half:]), strict=True)
        yield [(one, other) for one, other in meeting if one and other]
        circle.insert(1, circle.pop())


class _Nodes:
    """The facts of each node that is up, by its name, and the probes that find them."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        here = ray.get_runtime_context().get_node_id()
        alive = [node for node in ray.nodes() if node["Alive"]]
        addresses = [node["NodeManagerAddress"] for node in alive]
        self.facts: dict[str, dict[str, Any]] = {}
        for node in sorted(alive, key=lambda node: (node["NodeID"] != here, node["NodeID"])):
            address, number = node["NodeManagerAddress"], node["NodeID"]
            name = address if addresses.count(address) == 1 else f"{address}/{number[:6]}"
            self.facts[name] = {"node": name, "address": address, "node_id": number, "storage": {}}
            self.facts[name] |= {f"ray_{kind}s": node["Resources"].get(kind.upper(), 0)
                                 for kind in ("cpu", "gpu")}  # fmt: skip

    @property
    def _able(self) -> list[str]:
        """The nodes that answered."""
        return [name for name, facts in self.facts.items() if "error" not in facts]

    def examine(self) -> None:
        """Asks each node for its facts, and compares its clock with this process's."""
        for name, found in self._ask(self.facts, probes.examine_node).items():
            self.facts[name] |= found
        for name in self._able * CLOCK_READINGS:
            before = time.time()
            found = self._ask([name], probes.read_clock)[name]
            error = (time.time() - before) / 2  # half of the way there and back
            if "time_s" in found and error < self.facts[name].get("clock_error_s", 1e9):
                offset = found["time_s"] - before - error
                self.facts[name] |= {"clock_offset_s": offset, "clock_error_s": error}

    def examine_storage(self, url: str) -> None:
        """Has each node read and write, and look for what the first of them wrote."""
        able, name = self._able, f"{probes.PROBE_FILE}{uuid.uuid4().hex}"
        placed = self._ask(able[:1], write_file, f"{url}/{name}", b"")
        is_placed = not any("error" in each for each in placed.values())
        for node, found in self._ask(able, probes.examine_storage, url, name).items():
            if not is_placed:
                found.pop("sees_marker", None)
            self.facts[node]["storage"][url] = found
        if is_placed:
            self._ask(able[:1], remove, f"{url}/{name}")

    def exchange(
        self, backends: list[str], on_progress: Callable[[str], None]
    ) -> Iterator[dict[str, Any]]:
        """Yields what each pair found, one round of pairs at a time."""
        for pairs in rounds(self._able):
            on_progress("exchanging: " + ", ".join(f"{one} with {other}" for one, other in pairs))
            for backend in backends:
                calls: dict[tuple[tuple[str, str], int], Any] = {}
                for pair in pairs:
                    gpus = [self.facts[name]["ray_gpus"] for name in pair]
                    if backend == "nccl" and min(gpus) <= (pair[0] == pair[1]):
                        continue
                    ports = [self._ask([name], probes.free_port)[name] for name in pair]
                    places = [(self.facts[name]["address"], found.get("port", 0))
                              for name, found in zip(pair, ports, strict=True)]  # fmt: skip
                    for rank, name in enumerate(pair):
                        calls[pair, rank] = self._call(
                            name, probes.exchange, rank, backend, places, self._timeout_s,
                            num_gpus=int(backend == "nccl"),
                        )  # fmt: skip
                found = self._answers(calls, 2 * self._timeout_s)
                for pair in dict.fromkeys(pair for pair, _ in calls):
                    answers = [found[pair, 0], found[pair, 1]]
                    yield {"nodes": list(pair), "backend": backend, "answers": answers}

    def _call(self, name: str, probe: Callable[..., Any], *args: Any, num_gpus: int = 0) -> Any:
        where = NodeAffinitySchedulingStrategy(self.facts[name]["node_id"], soft=False)
        task: Any = ray.remote(probe).options(
            num_cpus=0, num_gpus=num_gpus, max_retries=0, scheduling_strategy=where,
            runtime_env={"env_vars": {PATIENCE: "0"}},  # retries would hide that storage is away
        )  # fmt: skip
        return task.remote(*args)

    def _ask(
        self, names: Iterable[str], probe: Callable[..., Any], *args: Any
    ) -> dict[str, dict[str, Any]]:
        calls = {name: self._call(name, probe, *args) for name in names}
        return self._answers(calls, self._timeout_s)

    def _answers(self, calls: dict[K, ObjectRef], limit_s: float) -> dict[K, dict[str, Any]]:
        """Returns what the calls return, {"error": reason} of one that fails or is late."""
        found: dict[K, dict[str, Any]] = {}
        end = time.monotonic() + limit_s
        for key, call in calls.items():
            try:
                found[key] = ray.get(call, timeout=max(0.0, end - time.monotonic())) or {}
            except ray.exceptions.GetTimeoutError:
                ray.cancel(call, force=True)
                found[key] = {"error": f"no answer within {limit_s:g} s"}
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None) or error
                found[key] = {"error": f"{type(cause).__name__}: {reason(cause):.300}"}
        return found
