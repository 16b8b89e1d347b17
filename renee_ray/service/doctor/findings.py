"""What is wrong, and what to do about it: a pure function of what the probes found."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from renee_ray.data.storage import REFUSED
from renee_ray.service.cluster.policies import READING_CPUS

Found = tuple[str, str, str, str, str]
"""check, level ("error" or "warning"), node, what is wrong, what to do."""

MIB, GIB = 1 << 20, 1 << 30
LEAST = (
    ("shm_bytes", "error", 256 * MIB, MIB, "/dev/shm has {} MiB",
     "start the container with a larger --shm-size, or mount a memory emptyDir at /dev/shm"),
    ("open_files", "error", 4096, 1, "a process may open {} files",
     "raise `ulimit -n` (LimitNOFILE, /etc/security/limits.conf) to 65536, then restart Ray there"),
    ("memory_free_bytes", "warning", 2 * GIB, GIB, "{} GiB of memory are free",
     "end other processes, or raise the container's limit"),
    ("disk_free_bytes", "warning", 5 * GIB, GIB, "{} GiB of disk are free for temporary files",
     "free disk, since Ray writes logs there, and objects that exceed memory"),
)  # fmt: skip
"""Key of a fact, level, least value, its unit, what is wrong, what to do."""
MOST_SKEW_S = 5.0
"""Ages of heartbeats and of logs are wrong then; S3 refuses requests from 900 s on."""
SLOW_STORAGE_S, SLOW_BYTES_PER_S = 2.0, 50e6
"""Seconds for a file of 1 KiB. Of a link, half of Ethernet's gigabit."""


def find(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the findings, errors first; nodes of which the same is true share one.

    facts: as `doctor.examine` returns them.
    """
    able = [node for node in facts["nodes"] if "error" not in node]
    found = [*_silent(facts["nodes"]), *_versions(able), *_cpus(facts["cluster"])]
    for node in able:
        found += [*_least(node), *_gpus(node), *_clock(node), *_storage(node)]
    for pair in facts["pairs"]:
        found += _pair(pair)
    nodes: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for check, level, node, problem, remedy in found:
        nodes[check, level, problem, remedy].append(node)
    keys = ("check", "level", "problem", "remedy")
    merged = [dict(zip(keys, key, strict=True)) | {"nodes": nodes[key]} for key in nodes]
    return sorted(merged, key=lambda each: each["level"] != "error")


def _silent(nodes: list[dict[str, Any]]) -> Iterator[Found]:
    for node in nodes:
        if "error" in node:
            yield ("node", "error", node["node"], f"the node cannot be examined: {node['error']}",
                   "look into its raylet's log, restart Ray there, or raise timeout_s")  # fmt: skip


def _versions(nodes: list[dict[str, Any]]) -> Iterator[Found]:
    for name in dict.fromkeys(name for node in nodes for name in node["versions"]):
        have = {n["node"]: n["versions"][name] for n in nodes if name in n["versions"]}
        usual = Counter(have.values()).most_common(1)[0][0]
        like = ", ".join(node for node, version in have.items() if version == usual)
        for node, version in have.items():
            if version is None or version != usual:
                others = f"; it is {usual} on {like}" if usual != version else ""
                yield ("versions", "error", node, f"{name} is {version or 'missing'}{others}",
                       f"install the same {name} on every node, or use one image")  # fmt: skip


def _cpus(cluster: dict[str, Any]) -> Iterator[Found]:
    workers, cpus = cluster["num_workers"], cluster["cpus"]
    each = cluster["cpus_per_worker"] or int(cluster["gpus"] < workers)
    if cpus - workers * each < READING_CPUS:
        yield ("cpus", "error", "cluster", f"{workers * each} CPUs of {workers} workers leave none "
               f"of the cluster's {cpus:g} for reading data",
               "add a node, or lower num_workers or cpus_per_worker")  # fmt: skip
    elif cluster["free_cpus"] < READING_CPUS:
        yield ("cpus", "warning", "cluster", f"other jobs hold all of the cluster's {cpus:g} CPUs, "
               "so that a run would wait", "wait for them, end them, or add a node")  # fmt: skip
    if cluster["free_gpus"] < cluster["gpus"]:
        yield ("gpus", "warning", "cluster", f"only {cluster['free_gpus']:g} of "
               f"{cluster['gpus']:g} GPUs are free, so that NCCL was not tried",
               "try again when no other job runs")  # fmt: skip


def _least(node: dict[str, Any]) -> Iterator[Found]:
    for key, level, least, unit, problem, remedy in LEAST:
        if node[key] < least:
            have = problem.format(f"{node[key] / unit:.4g}")
            yield key, level, node["node"], f"{have}, less than {least / unit:g}", remedy


def _gpus(node: dict[str, Any]) -> Iterator[Found]:
    have = len(node["gpus"])
    if failure := node["gpu_failure"]:
        yield ("gpus", "error", node["node"], f"the driver of its GPUs does not answer: {failure}",
               "mend or reload the driver, or remove nvidia-smi where there is no GPU")  # fmt: skip
    if node["cuda_devices"] < have:
        yield ("gpus", "error", node["node"], f"torch uses {node['cuda_devices']} of {have} GPUs",
               "install a build of torch that fits the driver")  # fmt: skip
    if node["ray_gpus"] < have:
        yield ("gpus", "warning", node["node"], f"Ray offers {node['ray_gpus']:g} of {have} GPUs",
               "start Ray there with --num-gpus, or without CUDA_VISIBLE_DEVICES")  # fmt: skip


def _clock(node: dict[str, Any]) -> Iterator[Found]:
    offset = node.get("clock_offset_s", 0)
    if abs(offset) > MOST_SKEW_S + node.get("clock_error_s", 0):
        yield ("clock", "error", node["node"], f"its clock is {abs(offset):.0f} s "
               f"{'ahead' if offset > 0 else 'behind'} of this command's, more than "
               f"{MOST_SKEW_S:g}", "synchronise its clock (chronyd, timesyncd)")  # fmt: skip


def _storage(node: dict[str, Any]) -> Iterator[Found]:
    for url, found in node["storage"].items():
        if error := found.get("error"):
            what = "read back" if "write_s" in found else "written"
            remedy = "check the path, the mount, and AWS_ENDPOINT_URL in the nodes' environment"
            if any(mark in error for mark in REFUSED):
                remedy = "check the credentials in the nodes' environment, and their rights"
            elif "ead-only" in error or "ermission denied" in error:
                remedy = "mount it so that the user of Ray's processes may write"
            yield ("storage", "error", node["node"], f"{url} cannot be {what}: {error}", remedy)
        if found.get("sees_marker") is False:
            yield ("storage", "error", node["node"], f"{url} is not what other nodes see there",
                   "mount shared storage on every node, or give a URL")  # fmt: skip
        slowest = max(found.get("write_s", 0), found.get("read_s", 0))
        if slowest > SLOW_STORAGE_S:
            yield ("storage", "warning", node["node"], f"{url} takes {slowest:.1f} s for 1 KiB, "
                   f"more than {SLOW_STORAGE_S:g}", "use storage near the cluster")  # fmt: skip


def _pair(pair: dict[str, Any]) -> Iterator[Found]:
    answers, backend = pair["answers"], pair["backend"]
    blocked = [i for i in (0, 1) if "blocked" in answers[i]]
    for i in blocked:
        yield ("ports", "error", pair["nodes"][i], f"it cannot connect to a port that listens on "
               f"{pair['nodes'][1 - i]}: {answers[i]['blocked']}",
               "open all TCP ports between the nodes in firewall and security group")  # fmt: skip
    errors = [answer["error"] for answer in answers if "error" in answer]
    where = " and ".join(dict.fromkeys(pair["nodes"]))
    if errors and not blocked:
        yield ("collectives", "error", where, f"{backend} fails: {errors[0]}",
               f"set {backend.upper()}_SOCKET_IFNAME to the network interface between them, and "
               f"see that no host name leads to 127.0.0.1")  # fmt: skip
    rate = answers[0].get("bytes_per_s", SLOW_BYTES_PER_S)
    if rate < SLOW_BYTES_PER_S:
        yield ("collectives", "warning", where, f"{backend} moves {rate / 1e6:.0f} MB/s, less than "
               f"{SLOW_BYTES_PER_S / 1e6:g}", "use a faster link or fewer nodes")  # fmt: skip
