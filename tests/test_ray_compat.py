"""The private parts of Ray that the package needs: in one file, and present in this Ray."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from renee_ray.service.cluster import ray_compat

PACKAGE = Path(ray_compat.__file__).parents[1]
PRIVATE = re.compile(r"\bray\.(_\w+|\w[\w.]*\._\w+)|import _raylet|_global_node")


def test_no_other_module_names_a_private_part_of_ray() -> None:
    found = {path.name for path in PACKAGE.rglob("*.py") if PRIVATE.search(path.read_text())}
    assert found == {"ray_compat.py"}


@pytest.mark.parametrize("name", ray_compat.LAZY)
def test_what_is_imported_late_is_there(name: str) -> None:
    assert getattr(ray_compat, name).__name__ == name


def test_what_is_overridden_is_there() -> None:
    from ray._private import utils
    from ray._private.node import Node
    from ray.data._internal.cluster_autoscaler import DefaultAutoscalingCoordinator as Coordinator
    from ray.data._internal.stats import _StatsManager
    from ray.runtime_context import RuntimeContext
    from ray.serve._private import replica
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.execution.preemption import PreemptionContext
    from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker

    assert callable(TorchTrainer._initialize_and_run_controller)  # type: ignore[attr-defined]
    assert callable(ray_compat.ElasticScalingPolicy._count_possible_workers)
    assert callable(ray_compat.ElasticScalingPolicy.make_decision_for_running_worker_group)
    assert callable(ray_compat.FixedScalingPolicy.after_controller_start)
    assert callable(ray_compat.FixedScalingPolicy._maybe_send_resource_request)
    assert callable(replica.add_port_to_grpc_server)
    assert all(callable(getattr(Node, name)) for name in ray_compat.UNUSED)
    assert callable(utils.get_dashboard_dependency_error)
    assert all(callable(getattr(_StatsManager, name)) for name in ray_compat.STATISTICS)
    assert callable(_StatsManager.gen_dataset_id_from_stats_actor)
    assert callable(Coordinator.request_resources) and callable(Coordinator.cancel_request)
    assert callable(Coordinator.get_reserved_resources)
    assert callable(RayTrainWorker.mark_preempt) and PreemptionContext().preemption_info is None
    assert callable(importlib.import_module(ray_compat.CONTROLLER).TrainController)
    group = importlib.import_module(f"{ray_compat.WORKER_GROUP}.worker_group")
    state = importlib.import_module(f"{ray_compat.WORKER_GROUP}.state")
    assert group.SynchronizationActor and callable(state._shutdown_sync_actor)
    assert isinstance(RuntimeContext.current_actor, property)
    with pytest.raises(AttributeError, match="no attribute 'Unknown'"):
        _ = ray_compat.Unknown
