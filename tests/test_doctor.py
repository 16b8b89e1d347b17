"""What `renee-ray doctor` says of facts: each fault is named once, with its node and its value."""

from __future__ import annotations

import copy
import importlib.metadata
import io
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from renee_ray.cli.doctor import doctor_text
from renee_ray.cli.main import main
from renee_ray.config.doctor import DoctorConfig
from renee_ray.config.overrides import make_config, parse_overrides
from renee_ray.errors import ConfigError
from renee_ray.machine import output
from renee_ray.service.doctor.doctor import rounds
from renee_ray.service.doctor.findings import find
from renee_ray.service.doctor.probes import examine_node
from renee_ray.service.observe.versions import environment

URL = "s3://bucket/runs"
VERSIONS = {"python": "3.11.9", "renee_ray": "0.1.0 (12345678)", "torch": "2.13.0"}
Facts = dict[str, Any]


def healthy() -> Facts:
    """Three nodes, of which the last has a GPU, and nothing wrong with any."""
    nodes: list[Facts] = [
        {
            "node": f"10.0.0.{i}", "ray_cpus": 4.0, "ray_gpus": 0, "versions": dict(VERSIONS),
            "gpus": [], "cuda_devices": 0, "gpu_failure": "", "shm_bytes": 8 << 30,
            "disk_bytes": 100 << 30,
            "disk_free_bytes": 50 << 30, "memory_bytes": 32 << 30, "memory_free_bytes": 20 << 30,
            "open_files": 65536, "clock_offset_s": 0.01, "clock_error_s": 0.001,
            "storage": {URL: {"sees_marker": True, "write_s": 0.02, "read_s": 0.01}},
        }
        for i in (1, 2, 3)
    ]  # fmt: skip
    gpu = {"ray_gpus": 1, "gpus": [["L4", "23034 MiB"]], "cuda_devices": 1}
    nodes[2] |= gpu | {"versions": {**VERSIONS, "driver": "550.1", "CUDA": "12.6"}}
    answer = {"latency_s": 2e-4, "bytes_per_s": 1e9}
    pairs = [
        {
            "nodes": [a["node"], b["node"]],
            "backend": "gloo",
            "answers": [dict(answer), dict(answer)],
        }
        for a, b in itertools.combinations(nodes, 2)
    ]
    cluster = {
        "cpus": 12.0,
        "free_cpus": 12.0,
        "gpus": 1,
        "free_gpus": 1,
        "num_workers": 2,
        "cpus_per_worker": 0,
    }
    return {"nodes": nodes, "pairs": pairs, "cluster": cluster}


def test_nothing_is_wrong_with_healthy_nodes() -> None:
    assert find(healthy()) == []


def node(**facts: Any) -> Callable[[Facts], None]:
    """Changes the second node."""
    return lambda all_facts: all_facts["nodes"][1].update(facts)


def storage(**found: Any) -> Callable[[Facts], None]:
    return node(storage={URL: found})


def answers(first: Facts, second: Facts) -> Callable[[Facts], None]:
    """Changes what the first pair found."""
    return lambda facts: facts["pairs"][0].update(answers=[first, second])


def cluster(**facts: Any) -> Callable[[Facts], None]:
    return lambda all_facts: all_facts["cluster"].update(facts)


SECOND = ["10.0.0.2"]
REFUSED = "When writing: AWS Error ACCESS_DENIED during PutObject operation"
PLANTED = {
    "another torch": (node(versions={**VERSIONS, "torch": "2.0.1"}), "versions", SECOND,
                      "torch is 2.0.1; it is 2.13.0 on 10.0.0.1, 10.0.0.3"),
    "no torch": (node(versions={**VERSIONS, "torch": None}), "versions", SECOND,
                 "torch is missing; it is 2.13.0 on 10.0.0.1, 10.0.0.3"),
    "a dead endpoint": (storage(error="AWS Error NETWORK_CONNECTION"), "storage", SECOND,
                        f"{URL} cannot be written: AWS Error NETWORK_CONNECTION"),
    "a hanging endpoint": (storage(error="no answer within 30 s"), "storage", SECOND,
                           f"{URL} cannot be written: no answer within 30 s"),
    "read-only storage": (storage(sees_marker=True, error="[errno 30] Read-only file system"),
                          "storage", SECOND, f"{URL} cannot be written: [errno 30] Read-only"),
    "refused credentials": (storage(error=REFUSED), "storage", SECOND, "ACCESS_DENIED"),
    "written, not read": (storage(sees_marker=True, write_s=0.1, error="gone"), "storage", SECOND,
                          f"{URL} cannot be read back: gone"),
    "storage of its own": (storage(sees_marker=False, write_s=0.1, read_s=0.1), "storage", SECOND,
                           f"{URL} is not what"),
    "a clock ahead": (node(clock_offset_s=300.2), "clock", SECOND, "its clock is 300 s ahead"),
    "a clock behind": (node(clock_offset_s=-300.2), "clock", SECOND, "its clock is 300 s behind"),
    "64 MiB of /dev/shm": (node(shm_bytes=64 << 20), "shm_bytes", SECOND,
                           "/dev/shm has 64 MiB, less than 256"),
    "few open files": (node(open_files=1024), "open_files", SECOND,
                       "a process may open 1024 files, less than 4096"),
    "a blocked port": (answers({"blocked": "timed out"}, {}), "ports", ["10.0.0.1"],
                       "cannot connect to a port that listens on 10.0.0.2: timed out"),
    "no collective": (answers({"error": "gloo: no route"}, {"error": "no answer"}), "collectives",
                      ["10.0.0.1 and 10.0.0.2"], "gloo fails: gloo: no route"),
    "no CPU for reading": (cluster(cpus=2.0, free_cpus=2.0), "cpus", ["cluster"],
                           "2 CPUs of 2 workers leave none of the cluster's 2 for reading"),
    "a silent node": (node(error="no answer within 30 s"), "node", SECOND, "no answer"),
    "an unusable GPU": (lambda f: f["nodes"][2].update(cuda_devices=0), "gpus", ["10.0.0.3"],
                        "torch uses 0 of 1 GPUs"),
    "a broken driver": (node(gpu_failure="nvidia-smi ends with status 9: no driver"), "gpus",
                        SECOND, "does not answer: nvidia-smi ends with status 9: no driver"),
}  # fmt: skip
"""Fault -> how it is planted, its check, its nodes, what is said."""
WARNED = {
    "little memory": (node(memory_free_bytes=1 << 30), "1 GiB of memory are free, less than 2"),
    "little disk": (node(disk_free_bytes=1 << 30), "1 GiB of disk are free"),
    "slow storage": (storage(sees_marker=True, write_s=9.0, read_s=0.1), "takes 9.0 s for 1 KiB"),
    "a slow link": (answers({"latency_s": 1, "bytes_per_s": 1e6}, {}), "gloo moves 1 MB/s"),
    "other jobs": (cluster(free_cpus=0.0), "other jobs hold all of the cluster's 12 CPUs"),
    "other jobs on GPUs": (cluster(free_gpus=0), "0 of 1 GPUs are free"),
    "a GPU of which Ray does not know": (lambda f: f["nodes"][2].update(ray_gpus=0), "0 of 1 GPUs"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_fault_is_the_only_finding(name: str) -> None:
    plant, check, nodes, words = PLANTED[name]
    facts = healthy()
    plant(facts)
    before = copy.deepcopy(facts)
    (found,) = find(facts)
    assert (found["check"], found["level"], found["nodes"]) == (check, "error", nodes)
    assert words in found["problem"] and found["remedy"]
    assert facts == before
    assert words in text(facts | {"findings": [found]}, width=900)


@pytest.mark.parametrize("name", WARNED)
def test_what_is_only_odd_is_a_warning(name: str) -> None:
    plant, words = WARNED[name]
    facts = healthy()
    plant(facts)
    (found,) = find(facts)
    assert found["level"] == "warning" and words in found["problem"]


def test_remedies_differ_by_the_reason_that_storage_gives() -> None:
    remedies = []
    for name in ("a dead endpoint", "read-only storage", "refused credentials"):
        facts = healthy()
        PLANTED[name][0](facts)
        remedies.append(find(facts)[0]["remedy"])
    assert "AWS_ENDPOINT_URL" in remedies[0]
    assert "may write" in remedies[1]
    assert "credentials" in remedies[2]


def test_workers_with_gpus_reserve_no_cpu() -> None:
    facts = healthy()
    facts["cluster"] |= {"cpus": 1.0, "free_cpus": 1.0, "gpus": 2, "free_gpus": 2}
    assert find(facts) == []
    facts["cluster"]["cpus_per_worker"] = 1
    assert [each["check"] for each in find(facts)] == ["cpus"]


def test_nodes_with_the_same_fault_share_a_finding_and_errors_come_first() -> None:
    facts = healthy()
    for i in (0, 2):
        facts["nodes"][i]["memory_free_bytes"] = 1 << 30
    facts["nodes"][1]["open_files"] = 1024
    assert [each["nodes"] for each in find(facts)] == [SECOND, ["10.0.0.1", "10.0.0.3"]]


@pytest.mark.parametrize("count", range(1, 9))
def test_rounds_have_each_pair_once_and_each_node_once_in_a_round(count: int) -> None:
    names = [str(i) for i in range(count)]
    found = list(rounds(names))
    for pairs in found:
        members = [name for pair in pairs for name in pair]
        assert count == 1 or len(members) == len(set(members))
    met = sorted(tuple(sorted(pair)) for pairs in found for pair in pairs)
    assert met == (list(itertools.combinations(names, 2)) or [("0", "0")])


def test_the_tables_have_what_was_measured() -> None:
    shown = text(healthy() | {"findings": []}, width=120)
    assert "10.0.0.2" in shown and "1000" in shown and "nothing is wrong" in shown


def text(facts: Facts, width: int) -> str:
    with Console(file=io.StringIO(), width=width) as console, console.capture() as captured:
        console.print(doctor_text(facts), highlight=False)
    return captured.get()


def install_nvidia_smi(path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(path), prepend=":")


def test_a_node_tells_its_gpus_and_what_torch_can_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "printf 'NVIDIA L4, 23034 MiB, 550.54.15\\n%.0s' 1 2"
    install_nvidia_smi(tmp_path, monkeypatch, line)
    found = examine_node()
    assert found["gpus"] == [["NVIDIA L4", "23034 MiB"]] * 2
    assert found["versions"]["driver"] == "550.54.15"
    assert found["versions"]["CUDA"] == str(torch.version.cuda)
    assert found["cuda_devices"] == torch.cuda.device_count()
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert found["shm_bytes"] == os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize


def test_a_node_with_a_broken_driver_is_examined_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_nvidia_smi(tmp_path, monkeypatch, "echo NVIDIA-SMI has failed.\nexit 9")
    found = examine_node()
    assert found["gpu_failure"] == "nvidia-smi ends with status 9: NVIDIA-SMI has failed."
    assert found["gpus"] == [] and found["cuda_devices"] == 0
    assert "driver" not in found["versions"] and environment()["driver"] is None
    with pytest.raises(TimeoutError, match="sleep takes longer"):
        output(["sleep", "9"], timeout_s=0.1)


def test_storage_is_one_place_or_several() -> None:
    def parsed(argument: str) -> tuple[str, ...]:
        return make_config(DoctorConfig, parse_overrides([argument])).storage

    assert parsed(f"storage={URL}") == (URL,)
    assert parsed(f"storage=[/data,{URL}]") == ("/data", URL)
    with pytest.raises(ConfigError, match="empty"):
        parsed("storage=")


def test_a_url_is_no_address_of_a_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--address", "http://head:8265"]) == 1
    assert "renee-ray submit --address http://head:8265 doctor" in capsys.readouterr().err
