"""Commands on trained runs: evaluate, predict, fuse, compare, export, index, serve."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import click

from renee_ray.cli.common import PATH, ConfiguredCommand, call, configured, json_option
from renee_ray.cli.output import print_facts, print_result, say
from renee_ray.config.score import (
    CompareConfig,
    ExportConfig,
    FuseConfig,
    IndexConfig,
    ScoreConfig,
)
from renee_ray.config.serve import ServeConfig
from renee_ray.errors import printable


@click.command(cls=ConfiguredCommand, keys=ScoreConfig)
@click.argument("run", type=PATH)
@click.argument("dataset", type=PATH)
@click.argument("overrides", nargs=-1)
@json_option
def evaluate(run: str, dataset: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Score the run at RUN on a split of DATASET: P, nDCG, PSP, PSnDCG and recall at k."""
    config = configured(ScoreConfig, overrides, "evaluate")
    from renee_ray.service.score.evaluate import evaluate_run

    found = call(evaluate_run, run, dataset, config)
    print_result(found, as_json, f"{found['split']} split, step {found['step']}")


@click.command(cls=ConfiguredCommand, keys=ScoreConfig)
@click.argument("run", type=PATH)
@click.argument("src", type=PATH)
@click.argument("dst", type=PATH)
@click.argument("overrides", nargs=-1)
@json_option
def predict(run: str, src: str, dst: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Write the k best labels of every point of SRC to Parquet files in DST.

    SRC is a dataset directory, or raw texts: a .txt or .txt.gz file with a text a line, or
    Parquet, a file or a directory, with a column `text` (and `point_id`, else the row number).
    """
    config = configured(ScoreConfig, overrides, "predict")
    from renee_ray.service.score.predict import predict_run

    found = call(predict_run, run, src, dst, config)
    print_result({**found, "predictions": dst}, as_json, f"predictions {dst}")


@click.command(cls=ConfiguredCommand, keys=FuseConfig)
@click.argument("paths", nargs=-1, required=True, metavar="PRED PRED ... DST")
@json_option
def fuse(paths: tuple[str, ...], as_json: bool) -> None:
    """Put predictions of the same points together: each PRED is a directory that predict wrote.

    Or that another model wrote in the same format (docs/scoring.md), with probabilities as scores.
    """
    keys = tuple(f"{key}=" for key in FuseConfig.model_fields)
    overrides = [each for each in paths if each.startswith(keys)]
    *sources, destination = [each for each in paths if each not in overrides] or [""]
    overrides += [each for each in (*sources, destination) if re.match(r"\w+=", each)]
    config = configured(FuseConfig, overrides, "fuse")
    from renee_ray.service.score.fuse import fuse as run

    found = call(run, sources, destination, config)
    print_result({"predictions": destination, **found}, as_json, f"predictions {destination}")


@click.command(cls=ConfiguredCommand, keys=CompareConfig)
@click.argument("runs", nargs=-1, required=True, metavar="RUN RUN ...")
@json_option
def compare(runs: tuple[str, ...], as_json: bool) -> None:
    """Say whether runs differ from the first: metrics, settings, curves, examples.

    Each RUN is a run, whose test points are predicted, or a directory of predictions. Intervals and
    tests are by a paired bootstrap over the points. A page is written to `output`.
    """
    overrides = [each for each in runs if re.match(r"\w+=", each)]
    config = configured(CompareConfig, overrides, "compare")
    from renee_ray.report.compare import comparison_text
    from renee_ray.service.score.compare import compare_runs

    paths = [each for each in runs if each not in overrides]
    found = call(compare_runs, paths, config, say)
    print_facts(found, as_json, comparison_text)
    if not as_json:
        click.echo(f"report: {found['report']}")


@click.command(cls=ConfiguredCommand, keys=ExportConfig)
@click.argument("run", type=PATH)
@click.argument("dst", type=PATH)
@click.argument("overrides", nargs=-1)
@json_option
def export(run: str, dst: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Write the run at RUN to DST for programs that know nothing of Ray.

    A Hugging Face directory of the encoder, the classifier as safetensors, the label texts as
    Parquet, and export.json, which says how a score comes about. Votes of neighbours
    (evaluation.neighbours) are no part of it.
    """
    config = configured(ExportConfig, overrides, "export")
    from renee_ray.service.score.export import export_run

    found = call(export_run, run, dst, config)
    shown = ("step", "num_labels", "dim", "max_length", "tail")
    print_result({"export": dst, **{key: found[key] for key in shown}}, as_json, f"export {dst}")


@click.command(cls=ConfiguredCommand, keys=IndexConfig)
@click.argument("model", type=PATH)
@click.argument("overrides", nargs=-1)
@json_option
def index(model: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Build an index of MODEL, a run or an export, that finds labels without scoring all.

    Writes it to MODEL-index, with its recall and speed over a sweep of search effort. Then
    `predict`, `evaluate` and `serve` take search=index. Needs renee_ray[index].
    """
    config = configured(IndexConfig, overrides, "index")
    from renee_ray.report.index import sweep_table
    from renee_ray.service.score.index import index_model

    print_facts(call(index_model, model, config, say), as_json, sweep_table)


@click.command(cls=ConfiguredCommand, keys=ServeConfig)
@click.argument("run", type=PATH)
@click.argument("overrides", nargs=-1)
@json_option
def serve(run: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Answer HTTP requests with the labels that the run at RUN predicts, until Ctrl-C or SIGTERM.

    Requests bear a token: a secret of at least 32 characters that RENEE_RAY_SERVE_TOKEN holds.
    Says at which URL once it answers, with --json as an object.
    """
    config = configured(ServeConfig, overrides, "serve")
    from renee_ray.service.serve.serve import serve_run

    output = sys.stdout

    def ready(facts: dict[str, Any]) -> None:
        line = json.dumps(facts) if as_json else f"{run}, step {facts['step']}: {facts['url']}"
        click.echo(line if as_json else printable(line), file=output)

    call(serve_run, run, config, ready)
