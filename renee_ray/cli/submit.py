"""`renee-ray submit`: a command as a job on a cluster."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

import click

from renee_ray.cli.common import PATH, ConfiguredCommand, count, json_option, progress, say
from renee_ray.cli.data import convert
from renee_ray.cli.doctor import doctor
from renee_ray.cli.score import evaluate, export, predict
from renee_ray.cli.train import ANYTHING, train, without_configuration
from renee_ray.config.doctor import DoctorConfig
from renee_ray.config.overrides import dotted, make_config, parse_overrides, read_yaml
from renee_ray.config.recipes import find_recipe
from renee_ray.config.schema import RunConfig
from renee_ray.data.storage import absolute
from renee_ray.signals import INTERRUPTED, at_signals

JOBS = {str(each.name): each for each in (convert, train, evaluate, predict, export, doctor)}
"""The commands that can run as jobs."""


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("--address", type=PATH, help="URL of the job server.  [default: Ray's, or port 8265]")
@click.option(
    "--env", "env", multiple=True, metavar="NAME[=VALUE]", help="A variable that the job gets."
)
@click.option("--submission-id", help="Name of the job.  [default: made of command and time]")
@click.option("--no-wait", is_flag=True, help="Return once the job is submitted.")
@count("--stop-wait-s", 60, "Seconds that a stopped job has to end by itself.")
@count("--patience-s", 600, "Seconds that the cluster may be away while the job is followed.")
@json_option
@click.argument("job", type=click.Choice(list(JOBS)))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def submit(ctx: click.Context, job: str, arguments: tuple[str, ...], **options: Any) -> None:
    """Run the command JOB with its ARGUMENTS on a cluster, and follow its log to its end.

    Options of `submit` come before JOB. Exit status: 0 if the job succeeded, 1 if it failed, 130
    if it was stopped. The log goes to standard output, with --json to standard error. Ctrl-C asks
    whether to stop the job.
    """
    config = _check_job(job, arguments)
    from renee_ray.service.submit import submit as service
    from renee_ray.service.submit.job_files import job_environment

    environment = job_environment(options["env"], options["stop_wait_s"], os.environ)
    address = service.choose_address(options["address"])
    client = service.connect(address)
    name = service.submit(client, job, arguments, environment, config, options["submission_id"])
    as_json = options["as_json"]
    if options["no_wait"]:
        facts = {"submission_id": name, "address": address}
        click.echo(json.dumps(facts) if as_json else name)
        return
    say(f"job {name} is submitted to {address}")

    def write(text: str) -> None:
        click.echo(text, nl=False, err=as_json)

    follower = service.Follower(client, name, write, say, options["patience_s"])
    with at_signals(signal.default_int_handler):
        details = _follow(follower, f"--address {address} {name}")
    ctx.exit(INTERRUPTED if details is None else _job_ended(address, name, details, as_json))


def _job_ended(address: str, name: str, details: Any, as_json: bool) -> int:
    """Says how a job ended; returns the exit status."""
    from renee_ray.service.submit.submit import EXIT_STATUS, outcome

    found, status = outcome(address, name, details), EXIT_STATUS[details.status]
    if as_json:
        click.echo(json.dumps(found))
    words = f"job {name} {found['status'].lower()}"
    if status:
        say(f"renee-ray: {words}: {found['message']}", style="red")
    else:
        say(f"{words} after {found['seconds']:.0f} s")
    return status


PATHS = (
    "start", "feed.targets", "encoder.weights", "observe.tensorboard_dir", "index", "allow", "deny",
)  # fmt: skip
"""Keys of paths that a job reads or writes, besides those of its arguments."""


def _check_job(job: str, arguments: tuple[str, ...]) -> str | None:
    """Refuses here what the command would refuse on the cluster.

    Returns:
        the argument that is a configuration file; None where there is none, or a recipe's name.
    """
    from renee_ray.service.submit.job_files import check_shared, refuse_password

    command = JOBS[job]
    assert isinstance(command, ConfiguredCommand) and command.keys is not None
    parsed = command.make_context(f"renee-ray submit {job}", list(arguments)).params
    for argument in arguments:
        refuse_password(argument, f"an argument of {job}")
    path: str | None = parsed.get("config")
    overrides, layers = list(parsed["overrides"]), list[Mapping[str, Any]]()
    alone = without_configuration(path, overrides) if job == "train" else None
    if alone is not None:  # the rest is chosen on the cluster
        overrides, path = alone, None
        layers.append(ANYTHING)
    elif path:
        layers.append(read_yaml(path))
    made = make_config(command.keys, *layers, parse_overrides(overrides), where=path or job)
    values = {key: value for key, value in dotted(made.model_dump()) if isinstance(value, str)}
    for value in (*arguments, *values.values()):
        if "://" in value:  # what follows key=, or all
            absolute(value if "://" in value.partition("=")[0] else value.partition("=")[2])
    places = {
        name.upper(): parsed[name] for name in ("run", "dataset", "src", "dst") if name in parsed
    }
    if isinstance(made, RunConfig):
        places = {"data": made.data, "output": made.output}
    if isinstance(made, DoctorConfig):
        places = {f"storage[{i}]": path for i, path in enumerate(made.storage)}
    models = ("encoder.name", "tokenizer")
    places |= {
        key: value
        for key, value in values.items()
        if value and (key in PATHS or (key in models and os.path.isdir(value)))
    }
    check_shared(places)
    return None if path is None or find_recipe(path) else path


def _follow(follower: Any, job: str) -> Any:
    """Follows a job to its end; returns None where it is left running."""
    try:
        return follower.follow()
    except KeyboardInterrupt:
        pass
    try:
        if sys.stdin.isatty() and click.confirm("\nstop the job (otherwise it runs on)?", err=True):
            say("stopping")
            follower.stop()
            return follower.follow()
    except (KeyboardInterrupt, click.Abort):
        progress.print()
    say(
        f"left running; `ray job logs --follow {job}` shows its log, and `ray job stop {job}` "
        f"stops it"
    )
    return None
