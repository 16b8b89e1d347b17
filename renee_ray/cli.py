"""`renee-ray`: parses, calls the service, prints, and returns an exit status."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from renee_ray.config import (
    OPENMP,
    Config,
    ConvertConfig,
    ExportConfig,
    ReneeError,
    RunConfig,
    ScoreConfig,
    ServeConfig,
    keys_of,
    make_config,
    parse_overrides,
    printable,
    read_yaml,
    redacted,
)
from renee_ray.program import INTERRUPTED, at_signals, interrupted, program, unwinding

T = TypeVar("T")
C = TypeVar("C", bound=Config)

progress = Console(stderr=True)


def _say(text: str, style: str | None = None) -> None:
    """A sentence for people, to standard error, on one line however narrow the terminal."""
    shown = printable(redacted(text))
    progress.print(shown, style=style, markup=False, highlight=False, soft_wrap=True)


class _Command(click.Command):
    """A command whose help lists the keys of its configuration."""

    def __init__(self, *args: Any, keys: type[Config] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.keys = keys

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.keys is None:
            return
        with formatter.section("Keys (key=value, after the positional arguments)"):
            formatter.write_dl(
                [
                    (f"{key}: {kind} = {default}" if default != "required" else f"{key}: {kind}",
                     meaning)
                    for key, kind, default, meaning in keys_of(self.keys)
                ],
                col_max=44,
            )  # fmt: skip


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Distributed training of extreme multi-label text classifiers on Ray."""


def _configured(model: type[C], overrides: Sequence[str], command: str) -> C:
    return make_config(model, parse_overrides(overrides, model), where=command)


class _Path(click.ParamType):
    """A path or a URL; an empty one, of a variable that is not set, is refused."""

    name = "text"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if param is not None and not value.strip():
            raise ReneeError(f"{param.human_readable_name} is empty; give a path")
        return value


PATH = _Path()


def _json_option(function: Any) -> Any:
    return click.option(
        "--json", "as_json", is_flag=True, help="Write one JSON object to standard output."
    )(function)


@cli.command(cls=_Command, keys=RunConfig)
@click.argument("overrides", nargs=-1)
@_json_option
def quickstart(overrides: tuple[str, ...], as_json: bool) -> None:
    """Convert, train and evaluate the small dataset of examples/, in a few minutes on two cores.

    Everything goes to `output` (by default ./quickstart), the report to report.html in it. The
    recipe is recipes/quickstart.yaml; `data` cannot be set.
    """
    from renee_ray.report import comparison_table, examples_text
    from renee_ray.service.quickstart import quickstart as run

    found = _call(run, parse_overrides(overrides), _say)
    if as_json:
        click.echo(json.dumps(found))
        return
    console = Console()
    console.print()
    console.print(comparison_table(found["comparison"]))
    console.print("\nTest points and their five best labels, right ones ticked:\n", highlight=False)
    console.print(examples_text(found["examples"]))
    click.echo(f"report: {found['report']}")


@cli.command(cls=_Command, keys=ConvertConfig)
@click.argument("src", type=PATH)
@click.argument("dst", type=PATH)
@click.argument("overrides", nargs=-1)
@_json_option
def convert(src: str, dst: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Turn a folder SRC, of the XML repository or of Parquet, into a dataset directory DST."""
    config = _configured(ConvertConfig, overrides, "convert")
    from renee_ray.conversion_report import conversion_text
    from renee_ray.service import convert as service

    manifest = _call(service.convert, src, dst, config, _say)
    facts: dict[str, Any] = {
        "dataset": dst,
        "labels": manifest.num_labels,
        **{split: manifest.num_points(split) for split in ("train", "validation", "test")},
        "statistics": manifest.statistics,
        "hints": service.hints(manifest, config),
    }
    if as_json:
        click.echo(json.dumps(facts))
    else:
        Console().print(conversion_text(facts), highlight=False)


@cli.command()
@click.argument("dataset", type=PATH)
@click.option("--verify", is_flag=True, help="Read everything and check every invariant.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Points of a global batch, for the share of padding.",
)
@click.option(
    "--samples", type=click.IntRange(min=0), default=3, show_default=True, help="Points shown."
)
@_json_option
def inspect(dataset: str, verify: bool, batch_size: int, samples: int, as_json: bool) -> None:
    """Show what is in DATASET; with --verify, every way in which it is not as it should be.

    Exit status 1 if --verify finds any.
    """
    from renee_ray.data.dataset import Dataset
    from renee_ray.data.inspection import inspect as run
    from renee_ray.inspection_report import inspection_text

    opened = (Dataset.without_check if verify else Dataset.open)(dataset)
    facts = run(opened, batch_size=batch_size, samples=samples, verify=verify)
    if as_json:
        click.echo(json.dumps(facts))
    else:
        Console().print(inspection_text(facts), highlight=False)
    if problems := facts.get("problems"):
        number = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
        raise ReneeError(f"{dataset} has {number}: convert its source again")


@cli.command(cls=_Command, keys=RunConfig)
@click.argument("config", type=PATH)
@click.argument("overrides", nargs=-1)
@_json_option
def train(config: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Train as the YAML file CONFIG and the overrides say; resumes a run that is at `output`."""
    made = make_config(RunConfig, read_yaml(config), parse_overrides(overrides), where=config)
    from renee_ray.service.train import train as run

    _print(_call(run, made, _say), as_json, f"run {made.output}")


@cli.command()
@click.argument("run", type=PATH)
@click.option("--watch", is_flag=True, help="Show it again every ten seconds, until Ctrl-C.")
@_json_option
def status(run: str, watch: bool, as_json: bool) -> None:
    """Show how the run at RUN is: running, finished, waiting, failed or unknown, and how far.

    Reads the files of the run's directory alone, so it needs no Ray and disturbs nothing.
    """
    from renee_ray.status import read_status, status_text

    while True:
        found = read_status(run.rstrip("/"), time.time())
        if as_json:
            click.echo(json.dumps(found))
        else:
            Console().print(status_text(found), highlight=False)
        if not watch:
            return
        time.sleep(10)


@cli.command(cls=_Command, keys=ScoreConfig)
@click.argument("run", type=PATH)
@click.argument("dataset", type=PATH)
@click.argument("overrides", nargs=-1)
@_json_option
def evaluate(run: str, dataset: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Score the run at RUN on a split of DATASET: P, nDCG, PSP, PSnDCG and recall at k."""
    config = _configured(ScoreConfig, overrides, "evaluate")
    from renee_ray.service.predict import evaluate_run

    found = _call(evaluate_run, run, dataset, config)
    _print(found, as_json, f"{found['split']} split, step {found['step']}")


@cli.command(cls=_Command, keys=ScoreConfig)
@click.argument("run", type=PATH)
@click.argument("src", type=PATH)
@click.argument("dst", type=PATH)
@click.argument("overrides", nargs=-1)
@_json_option
def predict(run: str, src: str, dst: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Write the k best labels of every point of SRC to Parquet files in DST.

    SRC is a dataset directory, or raw texts: a .txt or .txt.gz file with a text a line, or
    Parquet, a file or a directory, with a column `text` (and `point_id`, else the row number).
    """
    config = _configured(ScoreConfig, overrides, "predict")
    from renee_ray.service.predict import predict_run

    found = _call(predict_run, run, src, dst, config)
    _print({**found, "predictions": dst}, as_json, f"predictions {dst}")


@cli.command(cls=_Command, keys=ExportConfig)
@click.argument("run", type=PATH)
@click.argument("dst", type=PATH)
@click.argument("overrides", nargs=-1)
@_json_option
def export(run: str, dst: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Write the run at RUN to DST for programs that know nothing of Ray.

    A Hugging Face directory of the encoder, the classifier as safetensors, the label texts as
    Parquet, and export.json, which says how a score comes about. Votes of neighbours
    (evaluation.neighbours) are no part of it.
    """
    config = _configured(ExportConfig, overrides, "export")
    from renee_ray.service.export import export_run

    found = _call(export_run, run, dst, config)
    shown = ("step", "num_labels", "dim", "max_length", "tail")
    _print({"export": dst, **{key: found[key] for key in shown}}, as_json, f"export {dst}")


@cli.command(cls=_Command, keys=ServeConfig)
@click.argument("run", type=PATH)
@click.argument("overrides", nargs=-1)
@_json_option
def serve(run: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Answer HTTP requests with the labels that the run at RUN predicts, until Ctrl-C or SIGTERM.

    Requests bear a token: a secret of at least 32 characters that RENEE_RAY_SERVE_TOKEN holds.
    Says at which URL once it answers, with --json as an object.
    """
    config = _configured(ServeConfig, overrides, "serve")
    from renee_ray.service.serve import serve_run

    output = sys.stdout

    def ready(facts: dict[str, Any]) -> None:
        line = json.dumps(facts) if as_json else f"{run}, step {facts['step']}: {facts['url']}"
        click.echo(line if as_json else printable(line), file=output)

    _call(serve_run, run, config, ready)


@cli.command(context_settings={"allow_interspersed_args": False})
@click.option("--address", type=PATH, help="URL of the job server.  [default: Ray's, or port 8265]")
@click.option(
    "--working-dir", type=PATH, help="The clone that it takes along.  [default: this one]"
)
@click.option(
    "--env", "env", multiple=True, metavar="NAME[=VALUE]", help="A variable that the job gets."
)
@click.option("--submission-id", help="Name of the job.  [default: made of command and time]")
@click.option("--no-wait", is_flag=True, help="Return once the job is submitted.")
@click.option(
    "--stop-wait-s",
    type=click.IntRange(min=1),
    default=60,
    show_default=True,
    help="Seconds that a stopped job has to end by itself.",
)
@click.option(
    "--patience-s",
    type=click.FloatRange(min=1),
    default=600,
    show_default=True,
    help="Seconds that the cluster may be away while the job is followed.",
)
@_json_option
@click.argument("job", type=click.Choice(["convert", "train", "evaluate", "predict", "export"]))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def submit(ctx: click.Context, job: str, arguments: tuple[str, ...], **options: Any) -> None:
    """Run the command JOB with its ARGUMENTS on a cluster, and follow its log to its end.

    Options of `submit` come before JOB. Exit status: 0 if the job succeeded, 1 if it failed, 130
    if it was stopped. The log goes to standard output, with --json to standard error. Ctrl-C asks
    whether to stop the job.
    """
    config = _check_job(job, arguments)
    from renee_ray.service import submit as service
    from renee_ray.service.job_files import job_environment, working_directory

    root = working_directory(options["working_dir"])
    environment = job_environment(options["env"], options["stop_wait_s"], os.environ)
    address = service.choose_address(options["address"])
    client = service.connect(address)
    submission = service.submit(
        client,
        job,
        arguments,
        root=root,
        environment=environment,
        config=config,
        submission_id=options["submission_id"],
        on_progress=_say,
    )
    as_json = options["as_json"]
    if options["no_wait"]:
        facts = {"submission_id": submission.submission_id, "address": address}
        click.echo(json.dumps(facts) if as_json else submission.submission_id)
        return
    _say(f"job {submission.submission_id} is submitted to {address}")

    def write(text: str) -> None:
        click.echo(text, nl=False, err=as_json)

    follower = service.Follower(client, submission, write, _say, options["patience_s"])
    with at_signals(signal.default_int_handler):
        details = _follow(follower, submission)
    ctx.exit(INTERRUPTED if details is None else _job_ended(submission, details, as_json))


def _job_ended(submission: Any, details: Any, as_json: bool) -> int:
    """Says how a job ended; returns the exit status."""
    from renee_ray.service.submit import EXIT_STATUS, outcome

    found, status = outcome(submission, details), EXIT_STATUS[details.status]
    if as_json:
        click.echo(json.dumps(found))
    words = f"job {submission.submission_id} {found['status'].lower()}"
    if status:
        _say(f"renee-ray: {words}: {found['message']}", style="red")
    else:
        _say(f"{words} after {found['seconds']:.0f} s")
    return status


def _check_job(job: str, arguments: tuple[str, ...]) -> str | None:
    """Refuses here what the command would refuse on the cluster; returns its configuration file."""
    from renee_ray.service.job_files import check_shared, refuse_password

    command = cli.commands[job]
    assert isinstance(command, _Command) and command.keys is not None
    parsed = command.make_context(f"renee-ray submit {job}", list(arguments)).params
    for argument in arguments:
        refuse_password(argument, f"an argument of {job}")
    path: str | None = parsed.get("config")
    layers = [read_yaml(path)] if path else []
    overrides = parse_overrides(parsed["overrides"], command.keys)
    made = make_config(command.keys, *layers, overrides, where=path or job)
    places = {
        name.upper(): parsed[name] for name in ("run", "dataset", "src", "dst") if name in parsed
    }
    if isinstance(made, RunConfig):
        places = {"data": made.data, "output": made.output}
    check_shared(places)
    return path


def _follow(follower: Any, submission: Any) -> Any:
    """The end of a job; None where it is left running."""
    try:
        return follower.follow()
    except KeyboardInterrupt:
        pass
    try:
        if sys.stdin.isatty() and click.confirm("\nstop the job (otherwise it runs on)?", err=True):
            _say("stopping")
            follower.stop()
            return follower.follow()
    except (KeyboardInterrupt, click.Abort):
        progress.print()
    _say(
        f"left running; `{submission.log_command}` shows its log, and "
        f"`{submission.stop_command}` stops it"
    )
    return None


@cli.command()
@click.argument("run", type=PATH)
@click.option("--verify", is_flag=True, help="Read everything and compare checksums.")
@_json_option
def checkpoints(run: str, verify: bool, as_json: bool) -> None:
    """List the checkpoints of the run at RUN: size, step, metrics, and whether they are whole.

    Exit status 1 if any is not.
    """
    from renee_ray.checkpoint_report import checkpoint_table, list_checkpoints
    from renee_ray.service.run import RunDirectory

    metric = RunDirectory(run).config().evaluation.metric
    rows = list_checkpoints(run, verify=verify)
    if as_json:
        click.echo(json.dumps({"run": run, "checkpoints": rows}))
    else:
        Console().print(checkpoint_table(rows, metric, verify))
    if bad := [row["name"] for row in rows if row["problem"]]:
        raise ReneeError(
            f"{run} has {len(bad)} checkpoint{'s' * (len(bad) > 1)} that cannot be used "
            f"({', '.join(bad)}); `renee-ray train` goes on from the newest whole one"
        )


@cli.group()
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
    from renee_ray.service.bench import bench_scale as run

    click.echo(json.dumps(_call(lambda: run(**settings))))


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


@bench.command("convert", cls=_Command, keys=ConvertConfig)
@click.argument("src", type=PATH)
@click.argument("overrides", nargs=-1)
def bench_convert(src: str, overrides: tuple[str, ...]) -> None:
    """The conversion of SRC beside the bare tokenizer on the same texts; nothing is kept."""
    config = _configured(ConvertConfig, overrides, "bench convert")
    from renee_ray.service.bench_convert import bench_convert as run

    click.echo(json.dumps(_call(run, src, config)))


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
    from renee_ray.service.bench_feed import bench_feed as run

    click.echo(json.dumps(_call(lambda: run(**settings))))


@bench.command("train", cls=_Command, keys=RunConfig)
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

    `data` is a converted dataset; `output` cannot be set, since nothing is kept, and
    classifier.init is `normal` in both.
    """
    layers = read_yaml(config), parse_overrides(overrides)
    from renee_ray.service.bench_train import bench_train as run

    click.echo(json.dumps(_call(run, *layers, steps, repeats, _say)))


def _call(function: Callable[..., T], *arguments: Any) -> T:
    """Calls; Ray's own notices, which it writes to standard output, go to standard error."""
    with contextlib.redirect_stdout(sys.stderr), unwinding():
        return function(*arguments)


def _print(content: dict[str, Any], as_json: bool, title: str) -> None:
    if as_json:
        click.echo(json.dumps(content))
        return
    flat = dict(_flatten(content))
    metrics = {k: v for k, v in flat.items() if "@" in k}
    if metrics:
        Console().print(_metric_table(metrics, title))
    rest = {k: v for k, v in flat.items() if k not in metrics}
    for key, value in rest.items():
        click.echo(printable(f"{key:28} {value}"))


def _flatten(content: dict[str, Any], prefix: str = "") -> Any:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flatten(value, "" if key in ("metrics",) else f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _metric_table(metrics: dict[str, float], title: str) -> Table:
    families = list(dict.fromkeys(name.partition("@")[0] for name in metrics))
    ks = sorted({int(name.partition("@")[2]) for name in metrics})
    table = Table(title=Text(printable(title)))
    table.add_column("")
    for k in ks:
        table.add_column(f"@{k}", justify="right")
    for family in families:
        cells = (metrics.get(f"{family}@{k}") for k in ks)
        table.add_row(family, *("" if v is None else f"{v:.2f}" for v in cells))
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, 1 for a user's error, 2 for wrong usage."""
    try:
        return cli.main(args=argv, prog_name="renee-ray", standalone_mode=False) or 0
    except click.ClickException as error:
        usage = io.StringIO()
        error.show(usage)
        click.echo(redacted(usage.getvalue()), err=True, nl=False)
        return 2
    except (click.Abort, KeyboardInterrupt):
        _say("renee-ray: interrupted")
        return INTERRUPTED
    except Exception as error:
        if interrupted():
            _say("renee-ray: interrupted")
            return INTERRUPTED
        found = _user_error(error)
        if found is None:
            raise
        _say(f"renee-ray: {found}", style="red")
        return found.status


def _user_error(error: Exception) -> ReneeError | None:
    """`error` if it is a user's, or the user's error that Ray wrapped in it."""
    from renee_ray.data.storage import storage_error

    if isinstance(error, ReneeError):
        return error
    if "ray" in sys.modules:
        from renee_ray.service.policies import user_error

        if (found := user_error(error)) is not None:
            return found
    return storage_error(error) if isinstance(error, OSError) else None


if __name__ == "__main__":
    program()
