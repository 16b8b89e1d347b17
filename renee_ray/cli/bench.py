"""`renee-ray bench`: the benchmarks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import click

from renee_ray.cli.common import PATH, ConfiguredCommand, call, configured
from renee_ray.cli.output import say
from renee_ray.config.overrides import parse_overrides, read_yaml
from renee_ray.config.schema import ConvertConfig, RunConfig
from renee_ray.machine import OPENMP


@click.group()
def bench() -> None:
    """Benchmarks; each prints one JSON line, with references timed in turns."""
    for name, value in OPENMP.items():
        os.environ.setdefault(name, value)


def _count(name: str, default: int | None, text: str, minimum: int = 1) -> Callable[[Any], Any]:
    """A flag that is a number, `minimum` at least; its default is shown if it has one."""
    kind, shown = click.IntRange(min=minimum), default is not None
    return click.option(name, type=kind, default=default, show_default=shown, help=text)


def _sizes(function: Any) -> Any:
    """The flags of every benchmark of a classifier on one device."""
    function = _count("--batch", 256, "Rows of a global batch.")(function)
    function = _count("--dim", 384, "Dimension of the embeddings.")(function)
    return _count("--labels", 131072, "Labels.")(function)


_repeats = _count("--repeats", 5, "Timed rounds.")
_workers = _count("--workers", 2, "Workers.")
_precision = click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16_split", "bf16_sr", "fp16", "fp8_sr"]),
    default="auto",
    show_default=True,
    help="Storage of the weights.",
)
_momentum = click.option(
    "--momentum",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.9,
    show_default=True,
    help="Momentum of SGD; 0 keeps no buffer.",
)


@bench.command("step")
@_sizes
@_precision
@_momentum
@_repeats
def bench_step(**settings: Any) -> None:
    """A classifier step, beside bare matmuls, the published algorithm and autograd."""
    from renee_ray.benchmarks.step import bench_step as run

    click.echo(json.dumps(run(**settings)))


@bench.command("topk")
@_sizes
@_count("--k", 100, "Labels.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16_split", "bf16_sr", "fp16", "fp8_sr"]),
    default="fp32",
    show_default=True,
    help="Storage of the weights.",
)
@click.option(
    "--references",
    type=click.Choice(["all", "none"]),
    default="all",
    show_default=True,
    help="Beside fp32 weights and full logits, which must fit in memory, or the product alone.",
)
@_repeats
def bench_topk(**settings: Any) -> None:
    """The k best labels of each row, beside the bare matmul and torch.topk of full logits."""
    from renee_ray.benchmarks.topk import bench_topk as run

    click.echo(json.dumps(run(**settings)))


@bench.command("scale")
@_count("--labels", None, "Labels; without: 1M, 4M, 16M.")
@_count("--dim", 64, "Dimension.")
@_count("--batch", 256, "Rows.")
@_workers
@_count("--threads", 1, "Torch threads of a worker.")
@_precision
@_count("--steps", 3, "Timed steps.")
@click.option(
    "--speedup", is_flag=True, help="Beside one worker with as many threads, with Ray and without."
)
def bench_scale(**settings: Any) -> None:
    """The classifier on Ray Train workers, without momentum: time and memory by labels."""
    from renee_ray.service.bench.scale import bench_scale as run

    click.echo(json.dumps(call(lambda: run(**settings))))


@bench.command("checkpoint")
@click.option(
    "--gib", type=click.FloatRange(min=0.001), default=4.0, show_default=True, help="Of weights."
)
@click.option("--dim", type=click.IntRange(min=1), default=384, show_default=True, help="Columns.")
@click.option(
    "--directory",
    type=click.Path(exists=True, file_okay=False),
    default=None,
    help="An existing directory, below which it writes; by default a temporary one.",
)
def bench_checkpoint(**settings: Any) -> None:
    """A checkpoint beside training: how long it stalls it, and what resuming reads."""
    from renee_ray.benchmarks.checkpoint import bench_checkpoint as run

    click.echo(json.dumps(run(**settings)))


@bench.command("convert", cls=ConfiguredCommand, keys=ConvertConfig)
@click.argument("src", type=PATH)
@click.argument("overrides", nargs=-1)
def bench_convert(src: str, overrides: tuple[str, ...]) -> None:
    """The conversion of SRC beside the bare tokenizer on the same texts; nothing is kept."""
    config = configured(ConvertConfig, overrides, "bench convert")
    from renee_ray.service.bench.convert import bench_convert as run

    click.echo(json.dumps(call(run, src, config)))


@bench.command("feed")
@click.argument("dataset", type=PATH)
@_workers
@_count("--batch", 4096, "Rows of a batch.", minimum=8)
def bench_feed(**settings: Any) -> None:
    """An epoch of DATASET streamed through workers: rows a second, memory, each pair once."""
    from renee_ray.service.bench.feed import bench_feed as run

    click.echo(json.dumps(call(lambda: run(**settings))))


@bench.command("train", cls=ConfiguredCommand, keys=RunConfig)
@click.argument("config", type=PATH)
@click.argument("overrides", nargs=-1)
@_count("--steps", 64, "Timed steps of a block, rounded up to feed.window times feed.prefetch.")
@_count("--repeats", 3, "Blocks of each.")
def bench_train(config: str, overrides: tuple[str, ...], steps: int, repeats: int) -> None:
    """A run of CONFIG through Ray, beside the same steps by torch.distributed alone.

    CONFIG is a YAML file or the name of a recipe. `data` is a converted dataset; `output` cannot be
    set, since nothing is kept, and classifier.init is `normal` in both.
    """
    layers = read_yaml(config), parse_overrides(overrides)
    from renee_ray.service.bench.train import bench_train as run

    click.echo(json.dumps(call(run, *layers, steps, repeats, say)))
