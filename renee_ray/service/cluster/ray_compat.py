"""Every part of Ray that is not public, in one place: what it is needed for, and its risks.

`setup.cfg` keeps Ray below the version after the one that this file was read against (2.60).
Before raising that bound, read the note beside each name, then run `tests/test_ray_compat.py`
and `tests/service`. No other module imports a private part of Ray (tests/test_ray_compat.py).

Methods of Ray's that are private and overridden elsewhere, beside what they decide:

    TorchTrainer._initialize_and_run_controller    launch.py: hands our policies to the controller.
        Check that the controller still takes `callbacks`, `failure_policy` and `scaling_policy`,
        and that its actor is only asked to `run`, then for `get_result`, as `ControllerHere` does.
    ElasticScalingPolicy._count_possible_workers   policies.py: leaves a CPU to the reading tasks.
        Check that the policy still sizes a group of workers by this method alone, and decides
        about a running one in `make_decision_for_running_worker_group`.
    FixedScalingPolicy    policies.py: asks nobody for nodes in a local Ray. Check that it asks in
        `after_controller_start` and `_maybe_send_resource_request`, and can do without.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray._private import ray_constants, state, utils
from ray._private.node import Node
from ray.runtime_context import RuntimeContext

from renee_ray.machine import environment

TRAIN = "ray.train.v2._internal"
LAZY = {
    # Base of our failure policy. Check that `make_decision` still takes one error, and that
    # `FailureDecision.RAISE` still ends the job.
    "DefaultFailurePolicy": f"{TRAIN}.execution.failure_handling",
    "FailureDecision": f"{TRAIN}.execution.failure_handling",
    # Base of our scaling policy: see `_count_possible_workers` above.
    "ElasticScalingPolicy": f"{TRAIN}.execution.scaling_policy",
    "NoopDecision": f"{TRAIN}.execution.scaling_policy",
    # Base of the one of a local Ray: see above.
    "FixedScalingPolicy": f"{TRAIN}.execution.scaling_policy",
    # Bases of our callbacks: a worker's SIGTERM, a checkpoint before a group is resized. Check
    # that the three methods that preemption.py defines are still called, where it says.
    "ControllerCallback": f"{TRAIN}.execution.callback",
    "WorkerCallback": f"{TRAIN}.execution.callback",
    "WorkerGroupCallback": f"{TRAIN}.execution.callback",
    # The state that tells a resize from a failure. Check that elastic training still enters it.
    "ResizingState": f"{TRAIN}.execution.controller.state",
    # Callbacks whose actors idle for nothing here. Check that removing them is still harmless.
    "DatasetsCallback": f"{TRAIN}.callbacks.datasets",
    "PlacementGroupCleanerCallback": f"{TRAIN}.callbacks.placement_group_callback",
}
"""Name -> module. Imported when first asked for: a conversion starts 0.6 s sooner without it."""

CONTROLLER = f"{TRAIN}.execution.controller.controller"
"""Where `TrainController` is. Check that it still needs no actor around it."""
available_resources_per_node = state.available_resources_per_node
"""What is free on each node, by its id. Public Ray tells the sum over all nodes alone."""
node_cpus = utils.get_num_cpus
"""CPUs as Ray counts them for a node: a container's, if it has fewer. Check its one argument."""
LOCAL_ONLY = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
"""Variable that `on_loopback` sets to "0" for Ray's processes, which inherit it."""
WORKER_GROUP = f"{TRAIN}.execution.worker_group"
"""Where a group of workers makes its `SynchronizationActor` and ends it: see `NoActor`."""
CANCEL_S = 10.0
"""Seconds for which the end of a controller in this process is waited for."""
NO_WATCHER = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
"""For a local Ray, whose only node nobody takes away."""
NO_LOGGING = {"RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0"}
"""For a controller in this process: Ray's `logging.config.dictConfig` would close all handlers
here, and wait for ever where a thread of Ray Data's opens one."""
SYSTEM_CONFIG = {"idle_worker_killing_time_threshold_ms": 60_000}
"""For `ray.init(_system_config=...)`: by default an idle process ends after a second, between two
windows of rows, and a new one takes a core for four. Check the key in Ray's ray_config_def.h."""
UNUSED = ("start_log_monitor", "start_api_server", "start_monitor")
"""Methods of a node that start processes which a local cluster has no use for: they send logs to a
driver that shows none, report that Ray is used, and look after other nodes."""

STATISTICS = (
    "update_execution_metrics", "update_iteration_metrics", "register_dataset_to_stats_actor",
)  # fmt: skip
"""Methods by which Ray Data tells its dashboard what it does."""


@contextlib.contextmanager
def _replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Gives a module or class of Ray's other attributes, and its own back in the end."""
    before = {name: getattr(owner, name) for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(LAZY[name]), name)


def started_node() -> Any:
    """Returns the node of a Ray that this process started, or None.

    Ray does not tell publicly whether it was joined or started. Check `_global_node` and `head`.
    """
    node = ray._private.worker._global_node
    return node if node is not None and node.head else None


@contextlib.contextmanager
def without_unused() -> Iterator[None]:
    """Keeps a Ray that starts inside from starting UNUSED, and its agent from serving a dashboard.

    Check that a node has these methods, and that an agent is `--minimal` where this error is told.
    """
    unused = dict.fromkeys(UNUSED, lambda self, **_: None)
    error = ImportError("not wanted")
    with _replaced(Node, **unused), _replaced(utils, get_dashboard_dependency_error=lambda: error):
        yield


class NoActor:
    """Replaces the actor through which Ray Train's workers meet in `ray.train.report`.

    No worker calls that here, and the actor takes 1.3 s of CPU to start. Check that a group only
    makes it, hands it to its workers and ends it, while the preemption watcher is off.
    """

    @classmethod
    def options(cls, **_: Any) -> type[NoActor]:
        return cls

    @classmethod
    def remote(cls, **_: Any) -> NoActor:
        return cls()


class ControllerHere:
    """Ray Train's controller in a thread of this process, which needs no process of its own then.

    It hands its own actor to workers, for `ray.train.get_all_reported_checkpoints` alone, which
    is not used here: they get None. Check who reads `controller_actor` of a worker's context.
    """

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._cancel: Callable[[], object] | None = None

    def run(self, of_controller: dict[str, Any]) -> Any:
        """Runs a controller that is made of these arguments to its end; returns its result."""
        group = importlib.import_module(f"{WORKER_GROUP}.worker_group")
        state = importlib.import_module(f"{WORKER_GROUP}.state")
        try:
            with (
                _replaced(RuntimeContext, current_actor=None),
                _replaced(group, SynchronizationActor=NoActor),
                _replaced(state, _shutdown_sync_actor=lambda actor: None),
            ):
                # Its notices would be on the terminal.
                logging.getLogger("ray.train").setLevel(logging.CRITICAL)
                with environment(NO_WATCHER | NO_LOGGING):
                    made = importlib.import_module(CONTROLLER).TrainController(**of_controller)
                asyncio.run(self._run(made))
        finally:
            self._ended.set()
        return made.get_result()

    async def _run(self, controller: Any) -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        self._cancel = lambda: loop.call_soon_threadsafe(task.cancel)
        await controller.run()

    def cancel(self) -> None:
        """Ends the controller between two looks at its workers, CANCEL_S later at most.

        If Ray were shut down while it looks, Ray would end this process.
        """
        if self._cancel is not None and not self._ended.is_set():
            with contextlib.suppress(RuntimeError):  # the loop has just ended
                self._cancel()
            self._ended.wait(CANCEL_S)


def preemption() -> Any:
    """Returns what Ray Train has told this worker of nodes that are to be taken away, or None.

    The public `ray.train.get_preemption_info` is a collective of all workers through an actor: a
    round trip in every step, and without a time limit, so that one that hangs holds all others.
    Check that Ray's watcher still calls `mark_preempt` on every worker, which keeps it here.
    """
    context = importlib.import_module(f"{TRAIN}.execution.context").get_train_context()
    return context.preemption_context.preemption_info


def reserved_by_worker(scaling_config: Any) -> dict[str, float]:
    """Returns what a worker reserves. Check this property of ScalingConfig."""
    reserved: dict[str, float] = scaling_config._resources_per_worker_not_none
    return reserved


def silence_token_notice() -> None:
    """Keeps Ray from warning that it asks for a token by default. Check the logger's name."""
    name = "ray._private.authentication.authentication_token_setup"
    logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def sigterm_left_alone() -> Iterator[None]:
    """Keeps a handler of SIGTERM that somebody has set, while Ray starts.

    Ray would replace it by one that raises SystemExit, and add one in C++ that prints a stack.
    Check that `ray.init` still sets its handler by `utils.set_sigterm_handler`.
    """
    handler, set_by_ray = signal.getsignal(signal.SIGTERM), utils.set_sigterm_handler
    ours = threading.current_thread() is threading.main_thread() and handler != signal.SIG_DFL
    if ours:
        utils.set_sigterm_handler = lambda theirs: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = set_by_ray
        if ours:
            signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """Makes a Ray that starts inside, and its workers' collectives, listen on 127.0.0.1 alone.

    Whoever reaches a port of Ray's can run code, and on Linux Ray listens on every interface. Its
    only switch is the one for systems without clusters, read from the environment by each of its
    processes. Check with `ss -ltn` that nothing listens on 0.0.0.0 while a command runs.
    """
    local = {LOCAL_ONLY: "0", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} | NO_WATCHER
    with _replaced(ray_constants, ENABLE_RAY_CLUSTER=False), environment(local):
        yield


def in_local_ray() -> bool:
    """Whether this process started the Ray that it uses, or works for a command that did."""
    return os.environ.get(LOCAL_ONLY) == "0" or started_node() is not None


def without_actors() -> None:
    """Keeps Ray Data in this process, in a local Ray, from starting actors that it can do without.

    Each takes 1.3 s of CPU to start. One collects figures for a dashboard, which a local Ray has
    not. Check that `_StatsManager` alone talks to `_StatsActor`, by these methods, and that an id
    is any string. The other shares nodes out among jobs, and asks for more of them: here the one
    node is all there is, and a task waits for a CPU in any case. Check that Ray Data asks it by
    these methods of `DefaultAutoscalingCoordinator` alone.
    """
    from ray.data._internal.cluster_autoscaler import DefaultAutoscalingCoordinator
    from ray.data._internal.stats import _StatsManager

    coordinator: Any = DefaultAutoscalingCoordinator
    if not in_local_ray():
        for name, method in _ASKED.items():  # of a local Ray that this process had before
            setattr(coordinator, name, method)
        return
    for name in STATISTICS:
        setattr(_StatsManager, name, staticmethod(lambda *_, **__: None))
    manager: Any = _StatsManager
    manager.gen_dataset_id_from_stats_actor = staticmethod(lambda: uuid.uuid4().hex)
    node = {each["NodeID"]: each["Resources"] for each in ray.nodes() if each["Alive"]}
    answers = {
        "request_resources": lambda self, *_, **__: None,
        "cancel_request": lambda self: None,
        "get_reserved_resources": lambda self: node,
    }
    for name, answer in answers.items():
        _ASKED.setdefault(name, getattr(coordinator, name))
        setattr(coordinator, name, answer)


_ASKED: dict[str, Any] = {}
"""Methods of Ray Data's coordinator as Ray has them, where they were replaced."""


def replica_on_loopback() -> None:
    """Puts the server of a Serve replica in a local Ray on 127.0.0.1, before it starts.

    That server unpickles what it gets. Serve opens it on every interface, unused, after the
    replica's constructor. Check that it still does so by `add_port_to_grpc_server`.
    """
    if os.environ.get(LOCAL_ONLY) != "0":
        return
    from ray.serve._private import replica

    listen = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: listen(
        server, address.replace("[::]", "127.0.0.1")
    )
