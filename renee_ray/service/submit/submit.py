"""Submits a command of this package to a cluster's job server, and follows the job to its end.

Each new connection reads the log from its start and skips what was written already, so a lost
connection neither repeats nor loses a line.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shlex
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import TimeoutError as NoAnswer
from pathlib import Path
from typing import Any, TypeVar

import tenacity
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from renee_ray import __version__, machine
from renee_ray.errors import ReneeError
from renee_ray.rank.threads import in_thread
from renee_ray.service.submit.job_files import PACKAGE, pack

T = TypeVar("T")

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
ANSWER_TIMEOUT_S = 30.0
"""Seconds that the job server has for an answer."""
SILENCE_TIMEOUT_S = 60.0
"""Seconds without a line of the log after which a new connection is made: a cut link is silent."""
MAX_BACKOFF_S = 10.0
CONNECTION_LOST = re.compile(r"WebSocket|status code 50[0234]")
EXIT_STATUS = {JobStatus.SUCCEEDED: 0, JobStatus.FAILED: 1, JobStatus.STOPPED: 130}


def choose_address(given: str | None) -> str:
    """Returns the job server's URL: `given`, else Ray's variables', else this machine's port 8265.

    Raises:
        ReneeError: it is no http(s) URL.
    """
    named = [os.environ[name] for name in ADDRESS_VARIABLES if os.environ.get(name)]
    address = given or next(iter(named), DEFAULT_ADDRESS)
    if not address.startswith(("http://", "https://")):
        raise ReneeError(
            f"address {address!r} is no URL of a job server; give --address as {DEFAULT_ADDRESS}"
        )
    return address.rstrip("/")


def connect(address: str) -> JobSubmissionClient:
    """Returns a client of the job server at `address`.

    Raises:
        ReneeError: nothing answers there, or it refuses the token, or Ray's job client is not
            installed.
    """
    for module in ("job.sdk", "dashboard_sdk"):  # the sentences below replace their notices
        logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.ERROR)
    # Ray prefers its variables to the address that it is given.
    variables = machine.environment({ADDRESS_VARIABLES[0]: address})
    with variables, _user_errors(address):
        return _with_timeout(ANSWER_TIMEOUT_S, lambda: JobSubmissionClient(address))


def submit(
    client: JobSubmissionClient,
    job: str,
    arguments: Sequence[str],
    environment: dict[str, str],
    config: str | None,
    submission_id: str | None,
) -> str:
    """Starts `python -m renee_ray JOB ARGUMENTS` on the cluster; returns the job's id.

    Args:
        config: the one of `arguments` that is a configuration file; it goes along too.

    Raises:
        ReneeError: the server refuses, or the id is taken.
    """
    address = client.get_address()
    name = submission_id or f"renee-{job}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    words = list(arguments)
    with tempfile.TemporaryDirectory(prefix="renee-ray-job-") as scratch:
        pack(Path(scratch) / PACKAGE.name)
        if config is not None:
            words[words.index(config)] = Path(config).name
            shutil.copyfile(config, Path(scratch) / Path(config).name)
        with _user_errors(address):
            client.submit_job(
                entrypoint=shlex.join(["python", "-m", PACKAGE.name, job, *words]),
                submission_id=name,
                runtime_env={"working_dir": scratch, "env_vars": environment},
                metadata={"command": job, "renee_ray": __version__},
            )
    return name


class Follower:
    """Follows one job, over any number of connections: its log and its end."""

    def __init__(
        self,
        client: JobSubmissionClient,
        job: str,
        write: Callable[[str], None],
        on_progress: Callable[[str], None],
        patience_s: float,
    ) -> None:
        self._client, self._job = client, job
        self._write, self._on_progress, self._patience_s = write, on_progress, patience_s
        self._written = 0

    def follow(self) -> JobDetails:
        """Writes the log until the job has ended; can be called again after an interruption.

        Raises:
            ReneeError: the cluster no longer knows the job, refuses the token, or has not
                answered for `patience_s`.
        """
        while True:
            details: JobDetails = self._retry(lambda: self._client.get_job_info(self._job))
            if details.status.is_terminal():
                log: str = self._retry(lambda: self._client.get_job_logs(self._job))
                self._emit(log[self._written :])
                return details
            try:
                asyncio.run(self._tail())
            except Exception as error:
                if not _is_connection_error(error):
                    raise
                time.sleep(1)

    def stop(self) -> None:
        """Asks the cluster to stop the job; `follow` then waits for its end."""
        self._retry(lambda: self._client.stop_job(self._job))

    async def _tail(self) -> None:
        """Writes the new part of the log, until its end or SILENCE_TIMEOUT_S without a line."""
        stream = self._client.tail_job_logs(self._job)
        ahead = self._written
        with contextlib.suppress(StopAsyncIteration, asyncio.TimeoutError):
            while True:
                text = await asyncio.wait_for(anext(stream), SILENCE_TIMEOUT_S)  # type: ignore[arg-type]
                known, ahead = text[:ahead], max(0, ahead - len(text))
                self._emit(text[len(known) :])

    def _emit(self, text: str) -> None:
        self._written += len(text)
        if text:
            self._write(text)

    def _retry(self, call: Callable[[], T]) -> T:
        """Repeats `call` until the cluster answers; reports the loss and the return once each."""
        address = self._client.get_address()

        def report_loss(state: tenacity.RetryCallState) -> None:
            if state.attempt_number == 1 and state.outcome is not None:
                error = state.outcome.exception()
                assert error is not None
                self._on_progress(
                    f"{address} does not answer ({type(error).__name__}); the job may run on, "
                    f"trying again for {self._patience_s:.0f} s"
                )

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_is_connection_error),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=MAX_BACKOFF_S),
            stop=tenacity.stop_after_delay(self._patience_s),
            before_sleep=report_loss,
        )
        try:
            with _user_errors(address, self._job):
                found: T = retrying(_with_timeout, ANSWER_TIMEOUT_S, call)
        except tenacity.RetryError as error:
            raise ReneeError(
                f"{address} has not answered for {self._patience_s:.0f} s; see with `ray job "
                f"status --address {address} {self._job}` whether the job runs"
            ) from error
        if retrying.statistics.get("attempt_number", 1) > 1:
            self._on_progress(f"{address} answers again")
        return found


def _is_connection_error(error: BaseException) -> bool:
    """Returns whether the connection failed, so that another attempt may succeed."""
    import aiohttp
    import requests

    lost = (ConnectionError, TimeoutError, NoAnswer, aiohttp.ClientError)
    if isinstance(error, (*lost, requests.ConnectionError, requests.Timeout)):
        return True
    # Ray's error when the server goes away, or when a proxy in front of it does not reach it.
    return isinstance(error, RuntimeError) and bool(CONNECTION_LOST.search(str(error)))


@contextlib.contextmanager
def _user_errors(address: str, job: str = "") -> Iterator[None]:
    """Turns Ray's errors into ReneeErrors; `job` is the one that is followed, if any."""
    try:
        yield
    except AuthenticationError as error:
        raise ReneeError(
            f"{address} demands its cluster's token; set RAY_AUTH_MODE=token, and have the token "
            f"in ~/.ray/auth_token or RAY_AUTH_TOKEN"
        ) from error
    except Exception as error:
        if isinstance(error, ReneeError | tenacity.RetryError):
            raise
        raise ReneeError(_sentence(address, job, error)) from error


def _sentence(address: str, job: str, error: Exception) -> str:
    text = str(error)
    if job and "status code 404" in text:
        return (
            f"{address} knows no job {job}: the head was started anew, and "
            f"its jobs ended with it; give the same command again to go on from what they stored"
        )
    if "already" in text and "ubmission" in text:
        return f"{address} has a job of that id already; give another --submission-id"
    if "ray[default]" in text:
        return "Ray's job client is not installed; pip install 'renee_ray[cluster]'"
    if "status code" not in text and _is_connection_error(error):
        return f"no job server answers at {address}; check the address, or open the tunnel to it"
    last = text.strip().splitlines()[-1:] or [type(error).__name__]
    return f"the job server at {address} refused this: {last[0].strip()}"


def _with_timeout(seconds: float, call: Callable[[], T]) -> T:
    """Calls in a thread that is abandoned after `seconds`, since Ray's client has no timeouts."""
    return in_thread(call, "job server").result(seconds)


def outcome(address: str, job: str, details: JobDetails) -> dict[str, Any]:
    """Returns how a job ended."""
    status = JobStatus(details.status)
    message = (details.message or "").partition(", last available logs")[0]  # the log was written
    seconds = ((details.end_time or 0) - (details.start_time or 0)) / 1000
    return {
        "submission_id": job,
        "address": address,
        "status": status.value,
        "message": message.strip(),
        "seconds": seconds,
    }
