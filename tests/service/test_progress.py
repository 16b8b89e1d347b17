"""What workers and the driver send each other, through a real actor."""

from __future__ import annotations

import logging
import time

import pytest
import ray

from renee_ray.service.cluster.driver_channel import DriverChannel
from renee_ray.service.cluster.preemption import Requests
from renee_ray.training.loop import STOP

pytestmark = pytest.mark.slow
PATIENT_S = 60


@pytest.mark.usefixtures("local_ray")
def test_the_request_to_stop_reaches_whoever_waits_before_and_after() -> None:
    sent = DriverChannel()
    waiter = ray.remote(num_cpus=0)(Waiter).remote(sent)
    gone = ray.remote(num_cpus=0)(Waiter).remote(sent)
    ray.get([waiter.follow.remote(), gone.follow.remote()])
    ray.kill(gone)  # a worker that ended while it waited takes nothing with it
    assert ray.get(waiter.request.remote(0)) == 0
    sent.stop()
    assert ray.get(waiter.request.remote(PATIENT_S)) == STOP
    later = ray.remote(num_cpus=0)(Waiter).remote(sent)
    ray.get(later.follow.remote())
    assert ray.get(later.request.remote(PATIENT_S)) == STOP


@pytest.mark.usefixtures("local_ray")
def test_what_is_flushed_has_arrived_and_without_ray_none_is_started() -> None:
    sent, logger = DriverChannel(), logging.getLogger("renee_ray")
    before = list(logger.handlers)
    try:
        sent.forward_warnings()
        logger.warning("the last words")
        sent.flush()
        assert sent.receive(1) == {"text": "the last words"}
    finally:
        logger.handlers[:] = before
        ray.shutdown()
    sent.flush()
    assert not ray.is_initialized()


class Waiter:
    def __init__(self, channel: DriverChannel) -> None:
        self._channel, self._requests = channel, Requests()
        self._requests._look_for_preemption = lambda: None  # type: ignore[method-assign]

    def follow(self) -> None:
        self._requests.follow(self._channel)

    def request(self, seconds: float) -> int:
        """Waits so many seconds for a request, and takes it."""
        until = time.monotonic() + seconds
        while not (bits := self._requests.take(0)) and time.monotonic() < until:
            time.sleep(0.1)
        return bits
