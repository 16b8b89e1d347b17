"""Messages between the driver and its workers, in both directions, through one actor.

A `ray.util.queue` for each direction would be two actors. An idle one takes 1% of a core and
130 MB of the machine that trains.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

FLUSH_SECONDS = 5


class _ChannelActor:
    """Queues records for the driver, and holds workers that wait for the end."""

    def __init__(self) -> None:
        self._records: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._stop = asyncio.Event()

    async def send(self, record: dict[str, Any]) -> None:
        self._records.put_nowait(record)

    async def receive(self, timeout: float) -> dict[str, Any] | None:
        try:
            return await asyncio.wait_for(self._records.get(), timeout)
        except TimeoutError:
            return None

    async def stop(self) -> None:
        self._stop.set()

    async def wait_for_stop(self) -> None:
        await self._stop.wait()


class DriverChannel:
    """A handle of the actor, which the driver makes and hands to every worker.

    Methods raise ray.exceptions.RayError once the actor is gone, with the driver or by `close`, and
    ConnectionError after the end of Ray, which would start anew if it were asked.
    """

    def __init__(self) -> None:
        # Beside the driver: on another node, which may be taken away, it would end before the run.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": here}
        self._actor: Any = ray.remote(**options)(_ChannelActor).remote()
        self._last: ray.ObjectRef | None = None

    def send(self, record: dict[str, Any]) -> None:
        """Sends a record to the driver without waiting."""
        self._last = self._there().send.remote(record)

    def say(self, text: str) -> None:
        self.send({"text": text})

    def flush(self) -> None:
        """Waits until what was sent has arrived, FLUSH_SECONDS at most; before a process ends."""
        # Logging flushes again when the interpreter exits.
        if self._last is not None and ray.is_initialized():
            ray.wait([self._last], timeout=FLUSH_SECONDS)

    def forward_warnings(self) -> None:
        """Sends the warnings of this package in this worker to the driver from now on."""
        logging.getLogger("renee_ray").addHandler(_Forward(self))

    def receive(self, timeout_s: float) -> dict[str, Any] | None:
        """Takes the oldest record; None if there is none within `timeout_s`."""
        record: dict[str, Any] | None = ray.get(self._there().receive.remote(timeout_s))
        return record

    def stop(self) -> None:
        """Asks all workers to stop, including workers started after a restart."""
        self._there().stop.remote()

    def wait_for_stop(self) -> None:
        """Waits until the driver has asked for the end."""
        ray.get(self._there().wait_for_stop.remote())

    def close(self) -> None:
        ray.kill(self._there())

    def _there(self) -> Any:
        if not ray.is_initialized():
            raise ConnectionError("Ray has ended")
        return self._actor


class _Forward(logging.Handler):
    def __init__(self, channel: DriverChannel) -> None:
        super().__init__(logging.WARNING)
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(ConnectionError):
            self._channel.say(record.getMessage())

    def flush(self) -> None:
        self._channel.flush()
