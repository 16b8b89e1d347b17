"""`renee-ray bench`: the benchmarks."""

from __future__ import annotations

import json
import os
from functools import partial
from itertools import product
from typing import Any

import click

from renee_ray.cli.common import PATH, ConfiguredCommand, call, count, flag, say
from renee_ray.config.overrides import parse_overrides, read_yaml
from renee_ray.config.schema import RunConfig
from renee_ray.errors import reason
from renee_ray.machine import OPENMP


@click.group()
def bench() -> None:
    """Benchmarks; each prints one JSON line, with references timed in turns."""
    quiet = {"KINETO_LOG_LEVEL": "99"}  # torch's profiler says on standard error that it starts
    for name, value in (OPENMP | quiet).items():
        os.environ.setdefault(name, value)


COUNT, SHARE = click.IntRange(min=1), click.FloatRange(0, 1, max_open=True)
STORED = click.Choice(["fp32", "bf16_split", "bf16_sr", "fp16", "fp8_sr"])
STORAGE = click.Choice(["auto", *STORED.choices])
REFERENCE = click.Choice(["none", "published", "fp16", "compiled", "autograd"])
PART = click.Choice(["oracle", "step", "train", "topk", "memory", "resume"])
NAMES = ("labels", "dim", "batch", "precision", "momentum")
"""What `bench step` takes lists of."""


class _Several(click.ParamType):
    """A list with commas, each entry of a kind."""

    def __init__(self, kind: click.ParamType) -> None:
        self._kind, self.name = kind, f"{kind.name},..."

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[Any, ...]:
        return tuple(self._kind.convert(each, param, ctx) for each in str(value).split(","))


def _sizes(function: Any, kind: click.ParamType = COUNT) -> Any:
    """The flags of every benchmark of a classifier on one device."""
    function = flag("--batch", kind, 256, "Rows of a global batch.")(function)
    function = flag("--dim", kind, 384, "Dimension of the embeddings.")(function)
    return flag("--labels", kind, 131072, "Labels.")(function)


_repeats = count("--repeats", 5, "Timed rounds.")


@bench.command("step")
@partial(_sizes, kind=_Several(COUNT))
@flag("--precision", _Several(STORAGE), "auto", "Storage of the weights.")
@flag("--momentum", _Several(SHARE), 0.9, "Momentum of SGD; 0 keeps no buffer.")
@_repeats
@count("--chunk", 0, "Labels worked on at once; 0: as training chooses.", minimum=0)
@flag("--references", _Several(REFERENCE), "published,autograd", "What to time beside it.")
@click.option("--check", is_flag=True, help="Compare a step with float64, too.")
def bench_step(**settings: Any) -> None:
    """A classifier step, beside bare matmuls, the published algorithm and others.

    Sizes, storages and momenta may be lists with commas. Each combination is then a line of its
    own, even if another fails.
    """
    from renee_ray.benchmarks.step import bench_step as run

    settings["references"] = [name for name in settings["references"] if name != "none"]
    combinations = list(product(*(settings.pop(name) for name in NAMES)))
    for each in combinations:
        try:
            line = run(*each, **settings)
        except Exception as error:
            if len(combinations) == 1:
                raise
            line = dict(zip(NAMES, each, strict=True)) | {"error": reason(error)}
        click.echo(json.dumps(line))


@bench.command("topk")
@_sizes
@count("--k", 100, "Labels.")
@flag("--precision", STORED, "fp32", "Storage of the weights.")
@flag(
    "--references",
    click.Choice(["all", "none"]),
    "all",
    "Beside fp32 weights and full logits, which must fit in memory, or the product alone.",
)
@_repeats
def bench_topk(**settings: Any) -> None:
    """The k best labels of each row, beside the bare matmul and torch.topk of full logits."""
    from renee_ray.benchmarks.topk import bench_topk as run

    click.echo(json.dumps(run(**settings)))


@bench.command("scale")
@count("--labels", 1_000_000, "Labels.")
@count("--dim", 64, "Dimension.")
@count("--batch", 256, "Rows.")
@count("--workers", 2, "Workers.")
@count("--threads", 1, "Torch threads of a worker.")
@flag("--precision", STORAGE, "auto", "Storage of the weights.")
@count("--steps", 3, "Timed steps.")
@click.option(
    "--speedup", is_flag=True, help="Beside one worker with as many threads, with Ray and without."
)
def bench_scale(**settings: Any) -> None:
    """The classifier on Ray Train workers, without momentum: time and memory by labels."""
    from renee_ray.service.bench.scale import bench_scale as run

    click.echo(json.dumps(call(lambda: run(**settings))))


@bench.command("train", cls=ConfiguredCommand, keys=RunConfig)
@click.argument("config", type=PATH)
@click.argument("overrides", nargs=-1)
@count("--steps", 64, "Timed steps of a block, rounded up to feed.window times feed.prefetch.")
@count("--repeats", 3, "Blocks of each.")
def bench_train(config: str, overrides: tuple[str, ...], steps: int, repeats: int) -> None:
    """A run of CONFIG through Ray, beside the same steps by torch.distributed alone.

    CONFIG is a YAML file or the name of a recipe. `data` is a converted dataset; `output` cannot be
    set, since nothing is kept, and classifier.init is `normal` in both.
    """
    layers = read_yaml(config), parse_overrides(overrides)
    from renee_ray.service.bench.train import bench_train as run

    click.echo(json.dumps(call(run, *layers, steps, repeats, say)))


@bench.command("gpu")
@flag("--out", click.Path(dir_okay=False), "gpu.json", "The file to write.")
@flag("--minutes", click.FloatRange(min=0), 8.0, "For all parts.")
@click.option("--small", is_flag=True, help="Small sizes; the default where there is no GPU.")
@click.option("--only", type=PART, multiple=True, help="A part to run; without, all are.")
def bench_gpu(**settings: Any) -> None:
    """All that one GPU is to tell, in one JSON file: correctness, times, memory, runs.

    Every part runs in processes of its own, so that one that fails does not end the others.
    """
    from renee_ray.service.bench.gpu import bench_gpu as run

    click.echo(json.dumps(call(lambda: run(say=say, **settings))))
