"""What workers and the driver send each other, through a real actor."""

from __future__ import annotations

import logging
import time

import pytest
import ray

from renee_ray.service.driver_channel import Mail
from renee_ray.service.observe.progress import Channel
from renee_ray.service.train.preemption import Wishes
from renee_ray.training.loop import STOP

pytestmark = pytest.mark.slow
PATIENT_S = 60


@pytest.mark.usefixtures("local_ray")
def test_the_wish_to_stop_reaches_whoever_waits_before_and_after() -> None:
    mail = Mail()
    waiter = ray.remote(num_cpus=0)(Waiter).remote(mail)
    gone = ray.remote(num_cpus=0)(Waiter).remote(mail)
    ray.get([waiter.follow.remote(), gone.follow.remote()])
    ray.kill(gone)  # a worker that ended while it waited takes nothing with it
    assert ray.get(waiter.wish.remote(0)) == 0
    mail.stop()
    assert ray.get(waiter.wish.remote(PATIENT_S)) == STOP
    later = ray.remote(num_cpus=0)(Waiter).remote(mail)
    ray.get(later.follow.remote())
    assert ray.get(later.wish.remote(PATIENT_S)) == STOP


@pytest.mark.usefixtures("local_ray")
def test_what_is_flushed_has_arrived_and_without_ray_none_is_started() -> None:
    mail, logger = Mail(), logging.getLogger("renee_ray")
    before = list(logger.handlers)
    channel = Channel(mail, 1)
    try:
        channel.forward_warnings()
        logger.warning("the last words")
        channel.flush()
        assert mail.receive(1) == {"text": "the last words"}
    finally:
        logger.handlers[:] = before
        ray.shutdown()
    channel.flush()
    assert not ray.is_initialized()


class Waiter:
    def __init__(self, mail: Mail) -> None:
        self._mail, self._wishes = mail, Wishes()
        self._wishes._look_for_preemption = lambda: None  # type: ignore[method-assign]

    def follow(self) -> None:
        self._wishes.follow(self._mail)

    def wish(self, seconds: float) -> int:
        """What is wished for within so many seconds."""
        until = time.monotonic() + seconds
        while not (bits := self._wishes.take(0)) and time.monotonic() < until:
            time.sleep(0.1)
        return bits
