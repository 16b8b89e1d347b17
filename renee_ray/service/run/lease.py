"""A run directory has one writer: the driver that holds its lease.

Storage offers no atomic creation, so the lease is made of claims: each driver has a file of its
own, RUN/lease-TOKEN.json, and writes to no other.

1.  A driver that finds claims watches them. One whose content changes is alive: the driver is
    refused.
2.  A claim is dead if it names a process of this very host that is gone, or if its content has
    been the same for DEAD_S. That is a number of looks, a pause apart, so neither the clocks of
    hosts nor an outage of storage, nor a watcher that was suspended, count.
3.  When all claims that are there are dead, the driver writes its own.
4.  Only then does it list the directory.
5.  It holds the lease if the listing shows nothing but its own claim and the dead ones.
6.  Otherwise it deletes its claim, and begins again after a random pause.
7.  Two drivers a and b cannot both hold it, however long a write may take. Each writes before it
    lists, so one of them lists after both have written, and sees the other:
    `write_a < list_a and write_b < list_b` implies `write_a < list_b or write_b < list_a`.
8.  A holder deletes the dead claims. Every BEAT_S it lists the directory and writes its claim
    with a higher count. If storage does not answer, or shows an empty directory, it tries again.
9.  A holder whose claim is gone has lost the lease, and ends its workers.
10. Two may hold it for a beat, if one was held up for DEAD_S, or its claim was deleted by hand
    while it wrote it. Both see the other then: the one of the smaller (since_s, token) has lost.

This demands that a listing shows what was written before it, as local disks and S3 do.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pyarrow.fs as pafs

from renee_ray.data.storage import filesystem_of, make_directory, patiently, replace_file
from renee_ray.data.untrusted import read_bounded
from renee_ray.errors import ReneeError, printable, reason
from renee_ray.service.run.directory import RUN_FILE

log = logging.getLogger(__name__)

BEAT_S, DEAD_S = 5.0, 60.0
RELEASE_S = 10.0
"""Seconds for which the end of a driver tries to delete its claim."""
CLAIM = re.compile(r"lease-([0-9a-f]{16})\.json")
CLAIM_BYTES = 1 << 16


class LeaseHeld(ReneeError):
    """Another driver trains this run."""


class LeaseLost(ReneeError):
    """Another driver has taken this run over."""


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
        self._filesystem, root = filesystem_of(run)
        self._root = root.rstrip("/")
        self._token, self._since, self._beats = "", 0.0, 0
        self._holds, self._lost = False, ""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        make_directory(self.run)
        try:
            while not self._won():
                time.sleep(random.uniform(0, self._beat_s))
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

    def _won(self) -> bool:
        """Waits until no driver is alive; returns whether the lease is then this one's."""
        dead = self._all_dead()
        self._token, self._since = secrets.token_hex(8), time.time()
        self._patiently(self._write)
        if _tokens(self._patiently(self._names)) <= dead | {self._token}:
            for token in dead:
                self._patiently(partial(self._delete, token))
            self._holds = True
            self._patiently(self._write)
            return True
        self._patiently(partial(self._delete, self._token))
        return False

    def _all_dead(self) -> set[str]:
        """Watches the claims that are there until all are dead.

        Raises:
            LeaseHeld: one of them is alive.
        """
        pause = self._beat_s / 5
        looks: dict[str, tuple[bytes, int]] = {}
        reported = False
        while True:
            found = self._patiently(self._claims)
            for token, content in found.items():
                before, count = looks.get(token, (content, 0))
                if content != before:
                    raise LeaseHeld(self._held(token, _fields(content)))
                looks[token] = (content, count + 1)
            alive = [
                token
                for token, content in found.items()
                if not _gone(_fields(content)) and looks[token][1] * pause <= self._dead_s
            ]
            if not alive:
                return set(found)
            if not reported:
                who = " and ".join(_who(_fields(found[token])) for token in alive)
                self._say(
                    f"{self.run} belongs to {who}: waiting for a sign of life, "
                    f"{self._dead_s:.0f} s at most"
                )
            reported = True
            time.sleep(pause)

    def _held(self, token: str, claim: dict[str, Any]) -> str:
        return (
            f"{self.run} is being trained by {_who(claim)} since {_time(claim, 'since_s')} (last "
            f"heartbeat: {_time(claim, 'beat_s')}, by its clock); wait for its end, or stop it; to "
            f"take over from one that you cannot reach, delete {self._where(token)} and give the "
            f"command again"
        )

    def _run(self) -> None:
        reported = False
        while not self._lost:
            try:
                self._beat()
                reported = False
            except Exception as error:  # whatever storage raises, the lease is not lost by it
                if not reported:
                    log.warning("the lease of %s is not renewed: %s", self.run, reason(error))
                reported = True
            if self._closed.wait(self._beat_s):
                return

    def _beat(self) -> None:
        """Renews the claim if it is still the one that counts."""
        names = self._names()
        tokens = _tokens(names)
        others = [
            (since, token, claim)
            for token in tokens - {self._token}
            if (claim := _fields(self._content(token) or b"")).get("holds") is True
            and isinstance(since := claim.get("since_s"), int | float)
        ]
        newest = max(others, default=None, key=lambda each: each[:2])
        if self._token in tokens and (newest is None or newest[:2] < (self._since, self._token)):
            self._write()
        elif newest is None and RUN_FILE not in names:
            raise FileNotFoundError(f"{self.run} is empty: its disk may be away")
        elif not self._closed.is_set():
            by = _who(newest[2]) if newest else f"whoever deleted {self._where(self._token)}"
            self._lost = f"{self.run} was taken over by {by}; this driver ends its workers"

    def _write(self) -> None:
        self._beats += 1
        content = {
            "host": socket.gethostname(), "machine": machine(),
            "pid": os.getpid(), "started_s": started_s(os.getpid()),
            "since_s": self._since, "beat_s": time.time(), "beats": self._beats,
            "holds": self._holds,
        }  # fmt: skip
        replace_file(self._where(self._token), json.dumps(content, indent=1).encode(), patience=0)

    def _release(self) -> None:
        try:
            if self._token:
                release = partial(self._delete, self._token)
                patiently(release, f"releasing {self.run}", RELEASE_S)
        except Exception as error:  # the next driver finds it dead
            log.warning("%s remains: %s", self._where(self._token), reason(error))

    def _names(self) -> set[str]:
        if isinstance(self._filesystem, pafs.PyFileSystem):  # fsspec keeps listings
            self._filesystem.handler.fs.invalidate_cache()
        listed = self._filesystem.get_file_info(pafs.FileSelector(self._root, allow_not_found=True))
        return {info.base_name for info in listed}

    def _claims(self) -> dict[str, bytes]:
        found = {token: self._content(token) for token in _tokens(self._names())}
        return {token: content for token, content in found.items() if content is not None}

    def _content(self, token: str) -> bytes | None:
        try:
            return read_bounded(
                self._filesystem, self._name(token), CLAIM_BYTES, self._where(token)
            )
        except FileNotFoundError:
            return None

    def _delete(self, token: str) -> None:
        name = self._name(token)
        if self._filesystem.get_file_info(name).type == pafs.FileType.File:
            self._filesystem.delete_file(name)

    def _name(self, token: str) -> str:
        return f"{self._root}/lease-{token}.json"

    def _where(self, token: str) -> str:
        return f"{self.run}/lease-{token}.json"

    def _patiently(self, operation: Callable[[], Any]) -> Any:
        return patiently(operation, f"looking who trains {self.run}")


def _tokens(names: set[str]) -> set[str]:
    return {match[1] for match in map(CLAIM.fullmatch, names) if match}


def _time(claim: dict[str, Any], name: str) -> str:
    seconds = claim.get(name)
    known = isinstance(seconds, int | float) and 0 <= seconds < 1e11
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds)) if known else "?"


def _fields(content: bytes) -> dict[str, Any]:
    """Parses a claim; empty where it is damaged."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {
        key: printable(each)[:200] if isinstance(each, str) else each for key, each in found.items()
    }


def _who(claim: dict[str, Any]) -> str:
    return f"the driver on {claim.get('host', '?')} (process {claim.get('pid', '?')})"


def _gone(claim: dict[str, Any]) -> bool:
    """Returns whether a claim's process, of this machine and PID namespace, has ended."""
    pid, started, here = claim.get("pid"), claim.get("started_s"), machine()
    if not here or claim.get("machine") != here:
        return False
    if type(pid) is not int or pid <= 0 or not isinstance(started, int | float):
        return False
    try:
        os.kill(pid, 0)
        if psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return True
        # Another process may have the number now; the time of boot is known to the second.
        return abs(started_s(pid) - started) > 2
    except ProcessLookupError:
        return True
    except (OSError, OverflowError, psutil.Error):  # unknown: the heartbeat decides
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
