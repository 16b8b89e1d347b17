"""A trained run, or an export, behind HTTP: Ray Serve scores, this process listens.

Serve runs a deployment for each range of labels and one for the encoder (deploy.py). HTTP
(http.py) is not Serve's but this command's, for three reasons read in Serve 2.60. Its proxy
buffers whatever a client sends before the application has seen the token (`proxy_asgi_receive`
fills an unbounded queue). It answers some paths without a token. The token would have to reach
its replicas; here it stays in one process, and the port closes with that.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import ray

from renee_ray.config.score import ServeConfig
from renee_ray.errors import ReneeError, reason

try:
    import uvicorn

    from renee_ray.service.serve.deploy import Application, check_room, deploy, ray_serve
    from renee_ray.service.serve.http import Bearer, application, protocol
    from renee_ray.service.serve.replicas import ServedRun
except ImportError as error:
    raise ReneeError(
        f"serving needs Ray Serve ({reason(error):.200}); pip install 'renee_ray[serve]'"
    ) from error

from renee_ray.data.storage import absolute
from renee_ray.rank.threads import in_thread
from renee_ray.scoring.index import check_search
from renee_ray.service.score.job import scoring_config
from renee_ray.service.score.saved import Export, SavedRun, open_saved
from renee_ray.signals import at_signals

log = logging.getLogger(__name__)

SHOWN = ("max_k", "max_texts", "max_text_chars", "max_body_bytes", "timeout_s")
"""Settings that `GET /info` shows."""
LEAVE_S = 60
"""Seconds that the end waits for a change which is being given up."""
OnReady = Callable[[dict[str, Any]], None]


def serve_run(run: str, settings: ServeConfig, on_ready: OnReady) -> None:
    """Serves a run or an export until SIGINT or SIGTERM. At SIGHUP it looks at `run` again.

    on_ready: is given "url", "run", "step", "labels" and "shards" once requests are answered, and
        again after each change.

    Raises:
        ReneeError: no token, no model, no checkpoint, a taken port, or replicas that do not start.
    """
    stopped, changed = threading.Event(), threading.Event()
    with at_signals(lambda *_: changed.set(), [signal.SIGHUP]):
        bearer = Bearer.take(os.environ)
        served = _served_run(run, settings)
        if served.config.evaluation.neighbours:
            log.warning(
                "first, the training points, which vote, are embedded; neighbours=0 omits them"
            )
        name = f"renee_ray-{secrets.token_hex(4)}"
        with _bound(settings.host, settings.port) as listener, ray_serve(served, name):
            first = deploy(f"{name}-0", served, stopped)
            serving = Serving(name, run, settings, first, stopped)
            _answer(serving, bearer, listener, changed, on_ready)


@dataclass
class Serving:
    """The application that answers, and its changes. The names of all applications are numbered.

    stopped: set once the service ends, which gives up a change.
    """

    name: str
    run: str
    settings: ServeConfig
    current: Application
    stopped: threading.Event
    changes: int = 0

    def change(self, on_ready: Callable[[], None]) -> None:
        """Starts what `run` names now, hands over to it, then ends the one before.

        If that fails, a warning says why, and the one before goes on. Meanwhile both are held.
        """
        try:
            served = _served_run(self.run, self.settings)
            check_room(served, ray.available_resources())
            self.changes += 1
            self.hand_over(deploy(f"{self.name}-{self.changes}", served, self.stopped), on_ready)
        except Exception as error:
            if not self.stopped.is_set():
                log.warning("step %d answers: %.500s", self.current.facts["step"], reason(error))

    def hand_over(self, new: Application, on_ready: Callable[[], None]) -> None:
        """Lets `new` answer, says so, and ends the one before even if nobody can be told."""
        before, self.current = self.current, new
        try:
            on_ready()
        finally:
            before.end()


def _served_run(run: str, settings: ServeConfig) -> ServedRun:
    """Returns the run or export to serve, checked before there is Ray."""
    path = absolute(run)  # a link may lead elsewhere when a replica starts again
    path = path if "://" in path else os.path.realpath(path)
    if settings.index:  # replicas have another working directory
        settings = settings.model_copy(update={"index": absolute(settings.index)})
    saved = open_saved(path, settings.checkpoint)
    if isinstance(saved, Export) and settings.neighbours:
        raise ReneeError(f"{path} is an export, without points that vote; leave neighbours= out")
    if isinstance(saved, SavedRun):
        saved.vocabulary()  # what replicas would fail on is found before there is any
    num_labels = saved.facts["num_labels"]
    shards = settings.num_shards or min(saved.config.max_workers, num_labels)
    if shards > num_labels:
        raise ReneeError(f"num_shards={shards} exceeds the {num_labels} labels; lower num_shards")
    config = scoring_config(saved.config, settings, shards, threads=settings.threads)
    check_search(settings, path, saved.facts["model"], config.evaluation.tail)
    facts = {
        "run": path,
        "step": saved.facts["step"],
        "labels": num_labels,
        "shards": shards,
        **{name: getattr(settings, name) for name in SHOWN},
    }
    return ServedRun(config, settings, path, saved.name, saved.facts["model"], facts)


def _bound(host: str, port: int) -> socket.socket:
    """Binds a socket that does not listen yet: a taken port is found before Ray starts."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ReneeError(
            f"cannot listen on host={host!r:.200} port={port} ({error.strerror}); choose others"
        ) from error
    return listener


def _answer(
    serving: Serving,
    bearer: Bearer,
    listener: socket.socket,
    changed: threading.Event,
    on_ready: OnReady,
) -> None:
    """Answers requests until a signal; `changed` asks for a change, which has ended then, too."""
    settings = serving.settings
    config = uvicorn.Config(
        application(settings, bearer, lambda: serving.current),
        http=protocol(settings.timeout_s),
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        log_level="critical",  # a client's mistakes are no news
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(settings.timeout_s),
    )
    server, stopped = uvicorn.Server(config), serving.stopped

    def say_ready() -> None:
        on_ready({"url": _url(listener), **serving.current.facts})

    with at_signals(lambda *_: stopped.set()):
        # In a thread, where uvicorn leaves the signals alone.
        running = in_thread(lambda: server.run([listener]), "http")
        while not server.started and not wait([running], timeout=0.05).done:
            pass
        if server.started:
            say_ready()
        changes: list[Future[None]] = []
        while not wait([running], timeout=0.1).done:
            if stopped.is_set():
                server.should_exit = True
            elif changed.is_set() and not wait(changes, timeout=0).not_done:
                changed.clear()
                changes = [in_thread(lambda: serving.change(say_ready), "change")]
        stopped.set()
        wait(changes, timeout=LEAVE_S)
        running.result()


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
