"""`renee-ray`: its commands, and the exit status of errors."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

import click

from renee_ray import __version__
from renee_ray.cli import bench, data, doctor, score, submit, train
from renee_ray.cli.common import say
from renee_ray.errors import ReneeError, redacted
from renee_ray.signals import INTERRUPTED, interrupted


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Distributed training of extreme multi-label text classifiers on Ray."""


for command in (
    train.quickstart, data.convert, data.inspect, data.from_renee, train.recipes, train.plan,
    train.train, train.tune, train.status, train.report, train.checkpoints, score.evaluate,
    train.expect, score.predict, score.labels, score.fuse, score.compare, score.export, score.index,
    score.serve, submit.submit, doctor.doctor, bench.bench,
):  # fmt: skip
    cli.add_command(command)


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
        say("renee-ray: interrupted")
        return INTERRUPTED
    except Exception as error:
        if interrupted():
            say("renee-ray: interrupted")
            return INTERRUPTED
        found = _user_error(error)
        if found is None:
            raise
        say(f"renee-ray: {found}", style="red")
        return found.status


def _user_error(error: Exception) -> ReneeError | None:
    """Returns `error` if it is a user's, or the user's error that Ray wrapped in it."""
    from renee_ray.data.storage import storage_error

    if isinstance(error, ReneeError):
        return error
    if "ray" in sys.modules:
        from renee_ray.service.cluster.policies import user_error

        if (found := user_error(error)) is not None:
            return found
    return storage_error(error) if isinstance(error, OSError) else None
