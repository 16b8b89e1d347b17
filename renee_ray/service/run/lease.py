"""Who trains a run: one driver at a time, which holds the lease of the run's directory.

RUN/lease.json is the claim of a driver, with a token drawn anew and a count that goes up:

    enter    waits until the claim that is there is dead, then writes its own over it
    beat     every BEAT_S: where the file has its token, writes it with a higher count; where it
             has another or is gone, the lease is lost, and the driver ends its workers
    leave    deletes the file, if it has its token

A claim is dead if its process ran on this machine and is gone, or if its content has not changed
for DEAD_S. That is a number of looks, a pause apart, so neither the clocks of hosts nor an outage
of storage, nor a watcher that was suspended, count.

Two drivers that write at the same moment, or one that was held up between a look and a write, may
both go on until their next beat. Then all but the one that wrote last find a token that is not
theirs. The first beat comes after a fifth of BEAT_S, when there are no workers yet.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.fs as pafs

from renee_ray.data.storage import filesystem_of, make_directory, patiently
from renee_ray.data.untrusted import object_or_empty
from renee_ray.errors import LeaseLost, ReneeError, reason
from renee_ray.service.run.directory import RUN_FILE

log = logging.getLogger(__name__)

LEASE_FILE = "lease.json"
BEAT_S, DEAD_S = 5.0, 60.0
RELEASE_S = 10.0
"""Seconds for which the end of a driver tries to delete its claim."""


class LeaseHeld(ReneeError):
    """Another driver trains this run."""


class Lease:
    """The lease of the run at `run`, a local path or URL, as a context.

    Args:
        say: is told, once, that the claim of another driver is watched.
        beat_s, dead_s: BEAT_S and DEAD_S; the same for all drivers of a run.

    Raises:
        LeaseHeld: on entering; another driver is alive.
    """

    def __init__(
        self,
        run: str,
        say: Callable[[str], None] = lambda text: None,
        *,
        beat_s: float = BEAT_S,
        dead_s: float = DEAD_S,
    ) -> None:
        self.run, self._say, self._beat_s, self._dead_s = run.rstrip("/"), say, beat_s, dead_s
        self._path = f"{self.run}/{LEASE_FILE}"
        self._token, self._since, self._beats, self._lost = secrets.token_hex(8), _now(), 0, ""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        make_directory(self.run)
        self._wait_until_dead()
        try:
            patiently(self._write, f"writing {self._path}")
        except BaseException:
            self._release()
            raise
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join(RELEASE_S)
        self._release()

    def check(self) -> None:
        """Raises LeaseLost where another driver has taken the run over."""
        if self._lost:
            raise LeaseLost(self._lost)

    def _wait_until_dead(self) -> None:
        """Watches the claim that is there until it is dead or gone.

        Raises:
            LeaseHeld: it is alive.
        """
        pause, before, looks = self._beat_s / 5, None, 0
        while (content := patiently(self._read, f"looking who trains {self.run}")) is not None:
            claim = object_or_empty(content)
            if before is not None and content != before:
                raise LeaseHeld(
                    f"{self.run} is being trained by {_who(claim)} since {claim.get('since')} "
                    f"(last heartbeat: {claim.get('beat')}, by its clock); wait for its end, or "
                    f"stop it; to take over from one that you cannot reach, delete {self._path} "
                    f"and give the command again"
                )
            before, looks = content, looks + 1
            if _gone(claim) or looks * pause > self._dead_s:
                return
            if looks == 1:
                self._say(
                    f"{self.run} belongs to {_who(claim)}: waiting for a sign of life, "
                    f"{self._dead_s:.0f} s at most"
                )
            time.sleep(pause)

    def _run(self) -> None:
        pause, reported = self._beat_s / 5, False
        while not self._lost and not self._closed.wait(pause):
            pause = self._beat_s
            try:
                self._beat()
                reported = False
            except Exception as error:  # whatever storage raises, the lease is not lost by it
                if not reported:
                    log.warning("the lease of %s is not renewed: %s", self.run, reason(error))
                reported = True

    def _beat(self) -> None:
        """Renews the claim if it is still this driver's."""
        content = self._read()
        claim = object_or_empty(content or b"")
        if claim.get("token") == self._token:
            self._write()
            return
        filesystem, root = filesystem_of(f"{self.run}/{RUN_FILE}")
        if content is None and filesystem.get_file_info(root).type != pafs.FileType.File:
            raise FileNotFoundError(f"{self.run} is empty: its disk may be away")
        by = _who(claim) if content else f"whoever deleted {self._path}"
        self._lost = f"{self.run} was taken over by {by}; this driver ends its workers"

    def _write(self) -> None:
        self._beats += 1
        content = {
            "host": socket.gethostname(), "machine": machine(),
            "pid": os.getpid(), "started_s": started_s(os.getpid()),
            "since": self._since, "beat": _now(), "beats": self._beats, "token": self._token,
        }  # fmt: skip
        filesystem, name = filesystem_of(self._path)
        own = f"{name}.{self._token}"  # not `replace_file`: another may write at the same moment
        with filesystem.open_output_stream(own) as sink:
            sink.write(json.dumps(content, indent=1).encode())
        filesystem.move(own, name)

    def _read(self) -> bytes | None:
        filesystem, name = filesystem_of(self._path)
        if isinstance(filesystem, pafs.PyFileSystem):  # fsspec keeps listings
            filesystem.handler.fs.invalidate_cache()
        try:
            with filesystem.open_input_file(name) as file:
                content: bytes = file.read()
            return content
        except FileNotFoundError:
            return None

    def _release(self) -> None:
        def release() -> None:
            if object_or_empty(self._read() or b"").get("token") == self._token:
                filesystem, name = filesystem_of(self._path)
                filesystem.delete_file(name)

        try:
            patiently(release, f"releasing {self.run}", RELEASE_S)
        except Exception as error:  # the next driver finds it dead
            log.warning("%s remains: %s", self._path, reason(error))


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())


def _who(claim: dict[str, Any]) -> str:
    return f"the driver on {claim.get('host', '?')} (process {claim.get('pid', '?')})"


def _gone(claim: dict[str, Any]) -> bool:
    """Returns whether a claim's process, of this machine and PID namespace, has ended."""
    if not (here := machine()) or claim.get("machine") != here:
        return False
    try:
        if psutil.Process(claim["pid"]).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return True
        # Another process may have the number now; the time of boot is known to the second.
        return abs(started_s(claim["pid"]) - claim["started_s"]) > 2
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:  # unknown: the heartbeat decides
        return False


def started_s(pid: int) -> float:
    """Returns when a process started, in seconds after boot: the time of day may be set."""
    boot = psutil.boot_time()
    return psutil.Process(pid).create_time() - boot


def machine() -> str:
    """Names this boot of this machine, and the PID namespace; empty where Linux does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
