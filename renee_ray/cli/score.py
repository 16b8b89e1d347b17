"""Commands on trained runs: evaluate, predict, labels, fuse, compare, export, serve."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import click

from renee_ray.cli.common import (
    PATH,
    ConfiguredCommand,
    call,
    command,
    configured,
    json_option,
    print_facts,
    print_result,
    say,
)
from renee_ray.config.score import (
    CompareConfig,
    ExportConfig,
    FuseConfig,
    IndexConfig,
    ScoreConfig,
    ServeConfig,
)
from renee_ray.errors import ReneeError, printable


@command(ScoreConfig, "run", "dataset")
def evaluate(config: ScoreConfig, run: str, dataset: str, as_json: bool) -> None:
    """Score the run at RUN on a split of DATASET: P, nDCG, PSP, PSnDCG and recall at k."""
    from renee_ray.service.score.evaluate import evaluate_run

    found = call(evaluate_run, run, dataset, config, say)
    print_result(found, as_json, f"{found['split']} split, step {found['step']}")


@command(ScoreConfig, "run", "src", "dst")
def predict(config: ScoreConfig, run: str, src: str, dst: str, as_json: bool) -> None:
    """Write the k best labels of every point of SRC to Parquet files in DST.

    SRC is a dataset directory, or raw texts: a .txt or .txt.gz file with a text a line, or
    Parquet, a file or a directory, with a column `text` (and `point_id`, else the row number).
    """
    from renee_ray.service.score.predict import predict_run

    found = call(predict_run, run, src, dst, config, say)
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


@command(ExportConfig, "run", "dst")
def export(config: ExportConfig, run: str, dst: str, as_json: bool) -> None:
    """Write the run at RUN to DST for programs that know nothing of Ray.

    A Hugging Face directory of the encoder, the classifier as safetensors, the label texts as
    Parquet, and export.json, which says how a score comes about. Votes of neighbours
    (evaluation.neighbours) are no part of it.
    """
    from renee_ray.service.score.export import export_run

    found = call(export_run, run, dst, config)
    shown = ("step", "num_labels", "dim", "max_length", "tail")
    print_result({"export": dst, **{key: found[key] for key in shown}}, as_json, f"export {dst}")


@command(IndexConfig, "model")
def index(config: IndexConfig, model: str, as_json: bool) -> None:
    """Build an index of MODEL, a run or an export, that finds labels without scoring all.

    Writes it to MODEL-index, with its recall and speed over a sweep of search effort. Then
    `predict`, `evaluate` and `serve` take search=index. Needs renee_ray[index].
    """
    from renee_ray.report.index import sweep_table
    from renee_ray.service.score.index import index_model

    print_facts(call(index_model, model, config, say), as_json, sweep_table)


@command(ServeConfig, "model")
def serve(config: ServeConfig, model: str, as_json: bool) -> None:
    """Answer HTTP requests with the labels that MODEL predicts, until Ctrl-C or SIGTERM.

    MODEL is a run or an export.

    Requests bear a token: a secret of at least 32 characters that RENEE_RAY_SERVE_TOKEN holds.
    Says at which URL once it answers, with --json as an object.
    """
    from renee_ray.service.serve.serve import serve_run

    output = sys.stdout

    def ready(facts: dict[str, Any]) -> None:
        line = json.dumps(facts) if as_json else f"{model}, step {facts['step']}: {facts['url']}"
        click.echo(line if as_json else printable(line), file=output)

    call(serve_run, model, config, ready)


@click.group()
def labels() -> None:
    """Add labels to a trained run, retire them, or list them (docs/labels.md)."""


@labels.command("list")
@click.argument("run", type=PATH)
@click.option("--texts", is_flag=True, help="Write the texts alone, as a Y.txt for `convert`.")
@json_option
def list_labels(run: str, texts: bool, as_json: bool) -> None:
    """Write id, state, training points and text of each label of RUN, a line each."""
    from renee_ray.service.labels import list_labels as listed

    if as_json and texts:
        raise click.UsageError("--texts and --json exclude each other")
    if as_json:
        click.echo(json.dumps({"labels": list(listed(run))}))
        return
    for each in listed(run):
        if texts and {"\n", "\r"} & set(each["text"]):
            raise ReneeError(
                f"the text of label {each['id']} of {run} has a line break, which a Y.txt cannot "
                f"hold: all labels after it would shift; list them by --json"
            )
        shown = "\t".join(printable(str(value)) for value in each.values())
        click.echo(each["text"] if texts else shown)


@labels.command()
@click.argument("run", type=PATH)
@click.argument("new", type=PATH)
@json_option
def add(run: str, new: str, as_json: bool) -> None:
    """Give the labels of the file NEW ids behind the last label of RUN, and rows by their texts.

    NEW is a .txt file with a label a line, or CSV, TSV, JSON lines or Parquet with columns
    `label`, the name, and `text`.
    """
    from renee_ray.service.labels import add_labels

    print_result(call(add_labels, run, new, say), as_json, f"labels of {run}")


def _changing(name: str, what: str, *, restore: bool) -> None:
    """Makes the command `name`."""

    @labels.command(name, help=what)
    @click.argument("run", type=PATH)
    @click.argument("given", nargs=-1, metavar="[ID|NAME]...")
    @click.option("--file", type=PATH, help="File of ids or names, one a line.")
    @json_option
    def change(run: str, given: tuple[str, ...], file: str | None, as_json: bool) -> None:
        from renee_ray.service.labels import retire_labels

        if not given and file is None:
            raise click.UsageError("give labels, by id or name, or --file")
        found = call(lambda: retire_labels(run, given, file or "", say, restore=restore))
        print_result(found, as_json, f"labels of {run}")


_changing("retire", "Hide labels of RUN from every result; their ids stay theirs.", restore=False)
_changing("restore", "Show retired labels of RUN again.", restore=True)
