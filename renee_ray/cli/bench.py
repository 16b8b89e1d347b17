"""`renee-ray bench`: the benchmarks."""

from __future__ import annotations

import json
import os
from typing import Any

import click

from renee_ray.cli.common import PATH, ConfiguredCommand, call, configured
from renee_ray.cli.output import say
from renee_ray.config.overrides import parse_overrides, read_yaml
from renee_ray.config.schema import (
    ConvertConfig,
    RunConfig,
)
from renee_ray.machine import OPENMP


@click.group()
def bench() -> None:
    """Benchmarks; each prints one JSON line, with references timed in turns."""
    for name, value in OPENMP.items():
        os.environ.setdefault(name, value)


def _sizes(function: Any) -> Any:
    """The flags that every benchmark of a classifier has."""
    flags = (
        ("--labels", 131072, 1, "Labels."),
        ("--dim", 384, 1, "Dimension of the embeddings."),
        ("--batch", 256, 1, "Rows of a global batch."),
    )
    for name, default, least, text in reversed(flags):
        kind = click.IntRange(min=least)
        function = click.option(name, type=kind, default=default, show_default=True, help=text)(
            function
        )
    return function


_repeats = click.option(
    "--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Timed rounds."
)
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
@click.option("--k", type=click.IntRange(min=1), default=100, show_default=True, help="Labels.")
@_repeats
def bench_topk(**settings: Any) -> None:
    """The k best labels of each row, beside the bare matmul and torch.topk of full logits."""
    from renee_ray.benchmarks.topk import bench_topk as run

    click.echo(json.dumps(run(**settings)))


@bench.command("scale")
@click.option(
    "--labels", type=click.IntRange(min=1), default=None, help="Labels; without: 1M, 4M, 16M."
)
@click.option("--dim", type=click.IntRange(min=1), default=64, show_default=True, help="Dimension.")
@click.option("--batch", type=click.IntRange(min=1), default=256, show_default=True, help="Rows.")
@click.option(
    "--workers", type=click.IntRange(min=1), default=2, show_default=True, help="Workers."
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Torch threads of a worker.",
)
@_precision
@click.option("--steps", type=click.IntRange(min=1), default=3, show_default=True, help="Timed.")
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
@click.option(
    "--workers", type=click.IntRange(min=1), default=2, show_default=True, help="Workers."
)
@click.option(
    "--batch", type=click.IntRange(min=8), default=4096, show_default=True, help="Rows of a batch."
)
def bench_feed(**settings: Any) -> None:
    """An epoch of DATASET streamed through workers: rows a second, memory, each pair once."""
    from renee_ray.service.bench.feed import bench_feed as run

    click.echo(json.dumps(call(lambda: run(**settings))))


@bench.command("train", cls=ConfiguredCommand, keys=RunConfig)
@click.argument("config", type=PATH)
@click.argument("overrides", nargs=-1)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Timed steps of a block, rounded up to feed.window times feed.prefetch.",
)
@click.option(
    "--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Blocks of each."
)
def bench_train(config: str, overrides: tuple[str, ...], steps: int, repeats: int) -> None:
    """A run of CONFIG through Ray, beside the same steps by torch.distributed alone.

    CONFIG is a YAML file or the name of a recipe. `data` is a converted dataset; `output` cannot be
    set, since nothing is kept, and classifier.init is `normal` in both.
    """
    layers = read_yaml(config), parse_overrides(overrides)
    from renee_ray.service.bench.train import bench_train as run

    click.echo(json.dumps(call(run, *layers, steps, repeats, say)))
