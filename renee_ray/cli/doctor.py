"""`renee-ray doctor`: what is wrong with a machine or a cluster, and what to do about it."""

from __future__ import annotations

import os
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from renee_ray.cli.common import (
    PATH,
    ConfiguredCommand,
    call,
    configured,
    json_option,
    print_facts,
    say,
)
from renee_ray.config.doctor import DoctorConfig
from renee_ray.errors import ConfigError, printable

NODES = ("node", "CPUs", "GPUs", "free GiB", "shm GiB", "disk GiB", "files", "clock s")
SIZES = ("memory_free", "shm", "disk_free")


@click.command(cls=ConfiguredCommand, keys=DoctorConfig)
@click.argument("overrides", nargs=-1)
@click.option(
    "--address", type=PATH, help="Of a Ray cluster, as HOST:6379.  [default: RAY_ADDRESS]"
)
@json_option
@click.pass_context
def doctor(
    ctx: click.Context, overrides: tuple[str, ...], address: str | None, as_json: bool
) -> None:
    """Examine this machine or every node of a Ray cluster, and say what to do about what is wrong.

    Versions, GPUs, memory, limits, clocks, storage, and collectives between all pairs of nodes. The
    exit status is 1 if there are errors. `renee-ray submit doctor` examines a remote cluster.
    """
    config = configured(DoctorConfig, overrides, "doctor")
    if address and "://" in address:
        raise ConfigError(
            f"--address {address} is a URL; give HOST:PORT of the cluster's head on one of its "
            f"nodes, or use `renee-ray submit --address {address} doctor`"
        )
    if address:
        os.environ["RAY_ADDRESS"] = address
    from renee_ray.service.doctor.doctor import examine

    facts = call(examine, config, say)
    print_facts(facts, as_json, doctor_text)
    ctx.exit(int(any(each["level"] == "error" for each in facts["findings"])))


def doctor_text(facts: dict[str, Any]) -> Group:
    """Returns tables of the nodes, of the pairs, and of what is wrong."""
    nodes = Table(*NODES)
    for each in facts["nodes"]:
        sizes = [each.get(f"{name}_bytes", 0) / 2**30 for name in SIZES]
        cells = [f"{each['ray_cpus']:g}", f"{each['ray_gpus']:g}", *(f"{n:.1f}" for n in sizes)]
        cells += [str(each.get("open_files", "")), f"{each.get('clock_offset_s', 0):.3f}"]
        nodes.add_row(each["node"], *cells)
    measured = Table("measured", "where", "ms", "MB/s")
    for each in facts["nodes"]:
        for url, found in each["storage"].items():
            for step in ("write", "read"):
                if (seconds := found.get(f"{step}_s")) is not None:
                    measured.add_row(Text(f"{step} {url}"), each["node"], f"{seconds * 1e3:.1f}")
    for pair in facts["pairs"]:
        if (found := pair["answers"][0]).get("latency_s"):
            where = " and ".join(dict.fromkeys(pair["nodes"]))
            times = f"{found['latency_s'] * 1e3:.2f}", f"{found['bytes_per_s'] / 1e6:.0f}"
            measured.add_row(pair["backend"], where, *times)
    parts: list[RenderableType] = [table for table in (nodes, measured) if table.row_count]
    for each in facts["findings"]:
        problem = f"{each['level']}: {', '.join(each['nodes'])}: {each['problem']}"
        parts += [
            Text(printable(problem)),
            Padding(Text(each["remedy"]), (0, 0, 1, 4), expand=False),
        ]
    return Group(*parts, *([] if facts["findings"] else ["nothing is wrong"]))
