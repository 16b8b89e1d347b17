"""A trained run behind HTTP: Ray Serve scores, this process listens.

Serve runs a deployment for each range of labels and one for the encoder (replicas.py). HTTP
(http.py) is not Serve's but this command's, for three reasons read in Serve 2.60. Its proxy
buffers whatever a client sends before the application has seen the token (`proxy_asgi_receive`
fills an unbounded queue). It answers some paths without a token. The token would have to reach
its replicas; here it stays in one process, and the port closes with that.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from typing import Any

import ray

from renee_ray.config.schema import ScoreConfig
from renee_ray.config.serve import ServeConfig
from renee_ray.errors import ReneeError, reason

try:
    import uvicorn
    from ray import serve
    from ray.serve.handle import DeploymentHandle

    from renee_ray.service.serve.http import Bearer, Endpoint, protocol
    from renee_ray.service.serve.replicas import EncoderReplica, ServedRun, ShardReplica
except ImportError as error:
    raise ReneeError(
        f"serving needs Ray Serve ({reason(error):.200}); pip install 'renee_ray[serve]'"
    ) from error

from renee_ray.data.storage import absolute
from renee_ray.model.encoder import check_positions
from renee_ray.parallel.threads import in_thread
from renee_ray.scoring.index import check_search
from renee_ray.service.cluster import ensure_ray
from renee_ray.service.launch import threads_of, worker_environment
from renee_ray.service.run.directory import RunDirectory
from renee_ray.service.score.job import scoring_config
from renee_ray.service.score.labels import check_labels, vocabulary_of
from renee_ray.signals import at_signals

STARTS = 2
"""Failed starts of a replica after which the service is given up."""
SHOWN = ("max_k", "max_texts", "max_text_chars", "max_body_bytes", "timeout_s")
"""Settings that `GET /` shows."""


def serve_run(run: str, settings: ServeConfig, on_ready: Callable[[dict[str, Any]], None]) -> None:
    """Serves a run until SIGINT or SIGTERM.

    on_ready: is given "url", "run", "step", "labels" and "shards" once requests are answered.

    Raises:
        ReneeError: no token, no run, no checkpoint, a taken port, or replicas that do not start.
    """
    bearer = Bearer.take(os.environ)
    served, facts = _served_run(run, settings)
    with _bound(settings.host, settings.port) as listener, _deployed(served) as encoder:
        _answer(settings, bearer, facts, encoder, listener, on_ready)


def _served_run(run: str, settings: ServeConfig) -> tuple[ServedRun, dict[str, Any]]:
    """Returns the run to serve, checked before there is Ray, and the answer of `GET /`."""
    directory = RunDirectory(absolute(run))
    config, dataset = directory.config(), directory.dataset()
    check_labels(directory, dataset)
    check_positions(config.encoder, dataset.manifest.max_length)
    vocabulary_of(dataset)  # what replicas would fail on is found before there is any
    num_labels = dataset.manifest.num_labels
    shards = settings.num_shards or min(config.max_workers, num_labels)
    if shards > num_labels:
        raise ReneeError(f"num_shards={shards} exceeds the {num_labels} labels; lower num_shards")
    anew = ("tail", "neighbours", "neighbour_weight")
    score = ScoreConfig.model_validate({name: getattr(settings, name) for name in anew})
    config = scoring_config(config, score, shards).model_copy(update={"threads": settings.threads})
    checkpoint = directory.checkpoint(settings.checkpoint)
    check_search(settings, directory.path, checkpoint.hash, config.evaluation.tail)
    facts = {
        "run": directory.path,
        "step": checkpoint.state.step,
        "labels": num_labels,
        "shards": shards,
        **{name: getattr(settings, name) for name in SHOWN},
    }
    return ServedRun(config, settings, directory.path, checkpoint.name), facts


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


@contextlib.contextmanager
def _deployed(served: ServedRun) -> Iterator[DeploymentHandle]:
    """Yields the encoder's handle; afterwards ends the Ray started for it, or our application."""
    joined = ray.is_initialized() or bool(os.environ.get("RAY_ADDRESS"))
    ensure_ray(served.num_shards + 2)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    name = f"renee_ray-{secrets.token_hex(4)}"
    try:
        _check_gpus(served)
        serve.start(proxy_location="Disabled")
        yield _run(name, served)
    finally:
        if joined:
            _leave(name)
        else:
            ray.shutdown()


def _leave(name: str) -> None:
    """Ends an application, and Serve too if it has no other and no proxy: then it was ours."""
    if serve.status().applications:
        serve.delete(name)
    left = serve.status()
    if not left.applications and not left.proxies:
        serve.shutdown()


def _check_gpus(served: ServedRun) -> None:
    """Refuses replicas that could never be placed, for which Serve would wait for ever."""
    each, have = served.settings.gpus_per_process, ray.cluster_resources().get("GPU", 0)
    if each * (served.num_shards + 1) > have:
        raise ReneeError(
            f"gpus_per_process={each:g} for {served.num_shards} shards and the encoder exceeds the "
            f"{have:.0f} GPUs of the Ray cluster; lower it or num_shards"
        )


def _run(name: str, served: ServedRun) -> DeploymentHandle:
    on_gpu = bool(served.settings.gpus_per_process)
    threads = threads_of(served.config, on_gpu, served.config.max_workers)
    options: dict[str, Any] = {
        "ray_actor_options": {
            "num_cpus": 1,
            "num_gpus": served.settings.gpus_per_process,
            "runtime_env": {"env_vars": worker_environment(threads)},
        },
        "graceful_shutdown_wait_loop_s": 0.1,
        "graceful_shutdown_timeout_s": 5,
        "max_constructor_retry_count": STARTS,
        "logging_config": {"enable_access_log": False},
    }
    shards = [
        # One call at a time: a shard reuses its working memory.
        serve.deployment(ShardReplica, name=f"shard-{rank}", max_ongoing_requests=1, **options)
        .bind(served, rank)  # type: ignore[attr-defined]
        for rank in range(served.num_shards)
    ]  # fmt: skip
    encoder = serve.deployment(
        EncoderReplica,
        name="encoder",
        max_ongoing_requests=served.settings.max_waiting,
        **options,
    )
    try:
        bound = encoder.bind(served, shards)  # type: ignore[attr-defined]
        handle = serve.run(bound, name=name, route_prefix=None)
    except RuntimeError as error:
        raise ReneeError(_reason(error)) from error
    handle.predict.remote([""], 1).result()  # raises unless all of it works
    return handle


def _reason(error: Exception) -> str:
    """Finds the sentence of a replica that could not start, without its traceback."""
    sentences = re.findall(r"^renee_ray\.[\w.]+: (.+)$", str(error), re.MULTILINE)
    return sentences[-1] if sentences else f"the service did not start: {reason(error):.500}"


def _answer(
    settings: ServeConfig,
    bearer: Bearer,
    facts: dict[str, Any],
    encoder: DeploymentHandle,
    listener: socket.socket,
    on_ready: Callable[[dict[str, Any]], None],
) -> None:
    """Answers requests until a signal."""

    async def predict(texts: list[str], k: int) -> list[list[dict[str, Any]]]:
        found: list[list[dict[str, Any]]] = await encoder.predict.remote(texts, k)
        return found

    config = uvicorn.Config(
        Endpoint(settings, bearer, facts, predict),
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
    server, url, stopped = uvicorn.Server(config), _url(listener), threading.Event()
    with at_signals(lambda *_: stopped.set()):
        # In a thread, where uvicorn leaves the signals alone.
        running = in_thread(lambda: server.run([listener]), "http")
        while not server.started and not wait([running], timeout=0.05).done:
            pass
        if server.started:
            on_ready({"url": url, **facts})
        while not wait([running], timeout=0.1).done:
            server.should_exit = stopped.is_set()
        running.result()


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
