"""`renee-ray doctor` names what is wrong with a cluster whose hosts have real faults."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import end, finish
from .hosts import Hosts, ip, needs_hosts

pytestmark = [pytest.mark.slow, needs_hosts]

SKEW_S = 300
CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
int clock_gettime(clockid_t clock, struct timespec *at) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int status = real(clock, at);
    if (clock == CLOCK_REALTIME) at->tv_sec += SKEW_S;
    return status;
}
"""
"""A library that puts the clock of a process forward: hosts on one machine share its clock."""
EPHEMERAL = "20000-60999"
"""Ports that a rendezvous gets. What goes from one of them to another is dropped, Ray's is not."""
BUCKET, SILENT_PORT, LIMIT_S = "s3://no-bucket", 9000, 45
SILENT = f"""
import socket, time
server = socket.create_server(("127.0.0.1", {SILENT_PORT}))
print("listening", flush=True)
time.sleep(3600)
"""
"""A store that takes requests and answers none."""


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "store"
    path.mkdir()
    (path / "mine").write_text("mine")
    return path


@pytest.fixture
def faulty(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    """A head with the only CPU, and two hosts that do not reach each other.

    The first has another torch and few open files. The other has a wrong clock and a small
    /dev/shm; `store` is read-only there. Nobody answers for BUCKET; on the last host it hangs.
    """
    other, shim = tmp_path / "other", tmp_path / "clock.so"
    metadata = other / "torch-2.0.1.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.0.1\n")
    source = tmp_path / "clock.c"
    source.write_text(CLOCK)
    compile = ["cc", "-shared", "-fPIC", f"-DSKEW_S={SKEW_S}", "-o", str(shim), str(source), "-ldl"]
    subprocess.run(compile, check=True)
    one = {"PYTHONPATH": f"{other}:{Path(__file__).parents[2]}"}
    # With its clock, timed waits of the S3 client never end: so it is where they would not anyway.
    two = {
        "LD_PRELOAD": str(shim),
        "RAY_LD_PRELOAD_ON_WORKERS": "1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{SILENT_PORT}",
    }
    mounts = (
        f"mount -t tmpfs -o size=64m tmpfs /dev/shm && mount --bind {store} {store} && "
        f'mount -o remount,bind,ro {store} && exec "$@"'
    )
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.setenv(name, "us-east-1")
    # Paths of Ray's sockets must be short.
    with tempfile.TemporaryDirectory(prefix="rr", ignore_cleanup_errors=True) as directory:
        made = Hosts(Path(directory))
        try:
            made.start(0)
            made.add(0, ("sh", "-c", 'ulimit -n 1024; exec "$@"', "sh"), one)
            made.add(0, ("sh", "-c", mounts, "sh"), two)
            ip(
                "-n", made.hosts[1].name, "rule", "add", "to", made.hosts[2].address, "ipproto",
                "tcp", "sport", EPHEMERAL, "dport", EPHEMERAL, "blackhole",
            )  # fmt: skip
            listener = made.hosts[2].run(sys.executable, "-c", SILENT, env={})
            assert listener.stdout is not None and listener.stdout.readline()
            yield made
            end(listener)
        finally:
            made.stop()


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler for the wrong clock")
def test_each_planted_fault_is_named(
    faulty: Hosts, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = faulty.head.run(
        sys.executable, "-m", "renee_ray", "doctor", f"--address={faulty.address}",
        f"storage=[{store},{BUCKET}]", f"timeout_s={LIMIT_S}", "--json", env={},
    )  # fmt: skip
    try:
        done = finish(process)
    finally:
        end(process)
    assert done.status == 1, done.stderr
    facts = json.loads(done.stdout)
    head, one, two = (host.address for host in faulty.hosts)
    said = [
        (each["check"], node, each["problem"])
        for each in facts["findings"]
        if each["level"] == "error"
        for node in each["nodes"]
    ]
    planted = [
        ("versions", one, "torch is 2.0.1"),
        ("storage", head, f"{BUCKET} cannot be written: When"),
        ("storage", one, f"{BUCKET} cannot be written: When"),
        ("storage", two, f"{BUCKET} cannot be written: no answer within {LIMIT_S} s"),
        ("storage", two, f"{store} cannot be written: [Errno 30]"),
        ("clock", two, f"its clock is {SKEW_S} s ahead"),
        ("shm_bytes", two, "/dev/shm has 64 MiB"),
        ("ports", one, f"it cannot connect to a port that listens on {two}"),
        ("ports", two, f"it cannot connect to a port that listens on {one}: timed out"),
        ("open_files", one, "a process may open 1024 files"),
        ("cpus", "cluster", "2 CPUs of 2 workers leave none of the cluster's 1"),
    ]
    for check, node, words in planted:
        assert [s for s in said if s[:2] == (check, node) and s[2].startswith(words)], (
            words,
            said,
        )
    assert len(said) == len(planted), said
    with capsys.disabled():
        for each in facts["findings"]:
            print(f"\n{', '.join(each['nodes'])}: {each['problem']}; {each['remedy']}", end="")
    measured = {
        tuple(pair["nodes"]) for pair in facts["pairs"] if "latency_s" in pair["answers"][0]
    }
    assert measured and {one, two} not in map(set, measured)
    assert [(path.name, path.read_text()) for path in store.iterdir()] == [("mine", "mine")]
