"""Free memory under planted limits of containers."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from renee_ray.machine import _limits, available_bytes, environment, limit_bytes

UNLIMITED_V1 = 9223372036854771712
V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"


def plant(root: Path, own: str, groups: dict[str, tuple[object, int, int]]) -> None:
    """own: /proc/self/cgroup. groups: (limit, use, inactive pages of files) by directory."""
    files = {"proc/self/cgroup": own}
    for group, (limit, used, inactive) in groups.items():
        first = group.startswith(V1)
        names = ("limit_in_bytes", "usage_in_bytes") if first else ("max", "current")
        stat = f"anon 1\ninactive_file {0 if first else inactive}\n"
        files |= {
            f"{group}/memory.{names[0]}": f"{limit}\n",
            f"{group}/memory.{names[1]}": f"{used}\n",
            f"{group}/memory.stat": stat + f"total_inactive_file {inactive if first else 0}\n",
        }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


@pytest.mark.parametrize(
    ("own", "groups", "expected"),
    [
        ("0::/", {V2: (9000, 5000, 700)}, 4700),
        ("0::/a/b", {f"{V2}/a/b": ("max", 10, 0), f"{V2}/a": (9000, 8000, 0)}, 1000),
        ("0::/a/b", {f"{V2}/a/b": (500, 10, 0), f"{V2}/a": (9000, 8000, 0)}, 490),
        ("0::/outside/x", {V2: (9000, 8500, 0)}, 500),
        ("4:cpu,memory:/d/x\n0::/", {V1: (9000, 7000, 50)}, 2050),
        ("4:memory:/d/x", {f"{V1}/d/x": (9000, 1, 0), f"{V1}/d": (800, 1, 0)}, 799),
        ("4:memory:/d", {f"{V1}/d": (UNLIMITED_V1, 1, 0), V1: (8000, 9000, 0)}, 0),
    ],
    ids=["v2", "nested", "nested-inner", "outside", "v1", "nested-v1", "exceeded"],
)
def test_the_least_of_all_limits(
    tmp_path: Path, own: str, groups: dict[str, tuple[object, int, int]], expected: int
) -> None:
    plant(tmp_path, own, groups)
    assert available_bytes(tmp_path) == expected
    limits = [limit for limit, *_ in groups.values() if isinstance(limit, int)]
    assert limit_bytes(tmp_path) == min(limits), "whatever is used of it"


@pytest.mark.parametrize("own", ["0::/a", "3:cpu:/a", ""])
def test_without_a_limit_the_machine_is_it(tmp_path: Path, own: str) -> None:
    plant(tmp_path, own, {f"{V2}/a": ("max", 10, 0)})
    assert list(_limits(tmp_path)) == []
    assert limit_bytes(tmp_path) == psutil.virtual_memory().total
    assert 0 < available_bytes(tmp_path) <= psutil.virtual_memory().total


def test_where_there_is_no_group(tmp_path: Path) -> None:
    assert 0 < available_bytes(tmp_path) <= psutil.virtual_memory().total


def test_the_environment_is_set_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with environment({"OMP_NUM_THREADS": "3", "SOMETHING_NEW": "x"}):
        assert (os.environ["OMP_NUM_THREADS"], os.environ["SOMETHING_NEW"]) == ("3", "x")
    assert os.environ["OMP_NUM_THREADS"] == "7" and "SOMETHING_NEW" not in os.environ
