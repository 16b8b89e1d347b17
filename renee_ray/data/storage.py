"""Files wherever they are: the filesystem of a path or URL, and waiting while it does not answer.

Endpoint, region and credentials of S3 come from the environment (AWS_ENDPOINT_URL, AWS_REGION,
AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, or what else the AWS SDK looks at); none is ever logged.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
import tenacity

from renee_ray.config import ReneeError, reason

T = TypeVar("T")

log = logging.getLogger(__name__)

PATIENCE = "RENEE_RAY_STORAGE_PATIENCE_S"
PATIENCE_S = 300.0
"""Seconds that storage may be away before a run fails, unless the environment says otherwise."""
LONGEST_PAUSE_S = 5.0
SDK_ATTEMPTS, SDK_ATTEMPTS_FOR_RAY = 2, 30
"""Of the S3 client, by itself; it pauses up to 20 s between late ones. Ray Train's own writing of
checkpoints knows no other patience."""
TRANSIENT = (
    "NETWORK_CONNECTION",
    "SLOW_DOWN",
    "SERVICE_UNAVAILABLE",
    "INTERNAL_FAILURE",
    "REQUEST_TIMEOUT",
    "THROTTLING",
    "HTTP status 50",
)
"""What the S3 client says of errors that pass."""
REFUSED = ("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "HTTP status 403")


def absolute(path: str) -> str:
    """`path` so that a process with another working directory finds it too."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def filesystem_of(path: str, *, for_ray: bool = False) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a path or URL, and the path on it.

    pyarrow's own filesystem where there is one (local, s3://, gs://, hdfs://, abfs://),
    otherwise fsspec's.

    Args:
        for_ray: it is handed to Ray Train, whose calls do not go through `patiently`.

    Raises:
        ReneeError: nothing installed knows the URL's scheme.
    """
    scheme, separator, rest = path.partition("://")
    if not separator:
        return pafs.LocalFileSystem(), absolute(path)
    if scheme == "file":
        return pafs.LocalFileSystem(), absolute(rest)
    try:
        filesystem, root = pafs.FileSystem.from_uri(path)
        if isinstance(filesystem, pafs.S3FileSystem) and "?" not in path:
            attempts = SDK_ATTEMPTS_FOR_RAY if for_ray else SDK_ATTEMPTS
            filesystem = _s3(filesystem.region, attempts)
        return filesystem, root.rstrip("/")
    except pa.ArrowInvalid:
        pass
    import fsspec

    try:
        remote, root = fsspec.core.url_to_fs(path)
    except (ValueError, ImportError) as error:
        raise ReneeError(
            f"no filesystem is installed for {path!r} ({reason(error)}); use a local path, or "
            f"install the fsspec package of {scheme}://"
        ) from error
    return pafs.PyFileSystem(pafs.FSSpecHandler(remote)), root.rstrip("/")


def patiently(operation: Callable[[], T], what: str) -> T:
    """Calls `operation`, again and again while storage does not answer; logs that once.

    Args:
        operation: may be called repeatedly, and does all of it each time.
        what: for the log, as "reading FILE".

    Raises:
        OSError: of another kind, or the last one when the patience is at its end.
    """
    patience = float(os.environ.get(PATIENCE, PATIENCE_S))

    def say(state: tenacity.RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            error = state.outcome.exception()
            assert error is not None
            log.warning("%s: %s; trying again for %.0f s", what, reason(error), patience)

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_transient),
        wait=tenacity.wait_random_exponential(multiplier=0.5, max=LONGEST_PAUSE_S),
        stop=tenacity.stop_after_delay(patience),
        before_sleep=say,
        reraise=True,
    )
    return retrying(operation)


def write_file(path: str, content: bytes | pa.Buffer) -> None:
    """Writes a file whole, patiently."""
    filesystem, root = filesystem_of(path)

    def write() -> None:
        with filesystem.open_output_stream(root) as sink:
            sink.write(content)

    patiently(write, f"writing {path}")


def replace_file(path: str, content: bytes) -> None:
    """Writes a file, patiently, of which readers see all or what was there before."""
    filesystem, root = filesystem_of(path)

    def write() -> None:
        with filesystem.open_output_stream(f"{root}.tmp") as sink:
            sink.write(content)
        filesystem.move(f"{root}.tmp", root)

    patiently(write, f"writing {path}")


def read_file(path: str) -> bytes | None:
    """The content of a file, patiently; None where there is none."""
    filesystem, root = filesystem_of(path)

    def read() -> bytes | None:
        if filesystem.get_file_info(root).type != pafs.FileType.File:
            return None
        with filesystem.open_input_file(root) as file:
            return file.read()

    return patiently(read, f"reading {path}")


def listing(path: str, *, recursive: bool = False) -> list[pafs.FileInfo]:
    """What is in a directory, patiently; nothing where there is none."""
    filesystem, root = filesystem_of(path)
    selector = pafs.FileSelector(root, allow_not_found=True, recursive=recursive)
    return patiently(lambda: filesystem.get_file_info(selector), f"listing {path}")


def make_directory(path: str) -> None:
    """Makes a directory, and those that it is in, patiently."""
    filesystem, root = filesystem_of(path)
    patiently(lambda: filesystem.create_dir(root, recursive=True), f"making {path}")


def remove(path: str) -> None:
    """Removes a file, or a directory with all that is in it, patiently; nothing if neither."""
    filesystem, root = filesystem_of(path)

    def delete() -> None:
        kind = filesystem.get_file_info(root).type
        if kind == pafs.FileType.Directory:
            filesystem.delete_dir(root)
        elif kind == pafs.FileType.File:
            filesystem.delete_file(root)

    patiently(delete, f"removing {path}")


def is_transient(error: BaseException) -> bool:
    """Whether an error of storage, or one that it caused, is one that passes."""
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError) and any(mark in str(error) for mark in TRANSIENT):
        return True
    return error.__cause__ is not None and is_transient(error.__cause__)


def storage_error(error: OSError) -> ReneeError:
    """One sentence for people."""
    text = reason(error)
    if any(mark in text for mark in REFUSED):
        return ReneeError(
            f"the object store refuses the credentials in the environment, or they have no right "
            f"to this ({text}); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the path"
        )
    return ReneeError(f"storage failed ({text}); check the path and the endpoint")


def _s3(region: str, attempts: int) -> pafs.S3FileSystem:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    scheme, separator, host = (endpoint or "").partition("://")
    return pafs.S3FileSystem(
        region=region,
        endpoint_override=host.rstrip("/") if separator else endpoint,
        scheme=scheme if separator else "https",
        connect_timeout=5,
        request_timeout=30,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=attempts),
    )
