"""The workers' end of the channel to the driver, through a real queue of Ray."""

from __future__ import annotations

import logging

import pytest
import ray
from ray.util.queue import Queue

from renee_ray.service.cluster import ensure_ray
from renee_ray.service.progress import Channel


@pytest.mark.slow
def test_what_is_flushed_has_arrived_and_without_ray_none_is_started() -> None:
    ensure_ray(1)
    queue, logger = Queue(), logging.getLogger("renee_ray")
    before = list(logger.handlers)
    channel = Channel(queue, 1)
    try:
        channel.forward_warnings()
        logger.warning("the last words")
        channel.flush()
        assert queue.get_nowait() == {"text": "the last words"}
    finally:
        logger.handlers[:] = before
        ray.shutdown()
    channel.flush()
    assert not ray.is_initialized()
