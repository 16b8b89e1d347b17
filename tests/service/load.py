"""A running service under more questions than it can answer.

First `clients` clients ask without a pause: what is answered then is the sustainable rate. Then
questions come at a multiple of it, whatever becomes of those before: the excess must be refused.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from typing import Any

import aiohttp
import numpy as np

from renee_ray.config.score import TOKEN

WORDS = ["a", "small", "fast", "library", "for", "the", "web", "image", "sound", "network", "data"]


def bench_load(url: str, seconds: int, clients: int, factor: float) -> dict[str, Any]:
    """Loads the service at `url` for `seconds` a phase, with questions of one text of 12 words.

    Returns: of the second phase, answers: status -> number, and p50_ms and p99_ms until a 200.
    """
    made = random.Random(0)

    async def ask(session: Any) -> tuple[str, float]:
        body = {"texts": [" ".join(made.choices(WORDS, k=12))], "k": 5}
        begin = time.monotonic()
        try:
            async with session.post(f"{url.rstrip('/')}/predict", json=body) as response:
                await response.read()
                return str(response.status), time.monotonic() - begin
        except (aiohttp.ClientError, TimeoutError) as error:
            return type(error).__name__, time.monotonic() - begin

    async def load() -> tuple[float, list[tuple[str, float]]]:
        headers = {"Authorization": f"Bearer {os.environ.get(TOKEN, '')}"}
        connector = aiohttp.TCPConnector(limit=0)  # no queue but the service's
        async with aiohttp.ClientSession(headers=headers, connector=connector) as session:
            rate = await _sustainable(lambda: ask(session), seconds, clients)
            return rate, await _offered(lambda: ask(session), seconds, factor * rate)

    rate, answers = asyncio.run(load())
    taken = [1000 * each for status, each in answers if status == "200"] or [float("nan")]
    return {
        "sustainable_per_s": round(rate, 1),
        "offered_per_s": round(factor * rate, 1),
        "answers": dict(Counter(status for status, _ in answers)),
        "p50_ms": round(float(np.percentile(taken, 50)), 1),
        "p99_ms": round(float(np.percentile(taken, 99)), 1),
    }


async def _sustainable(ask: Any, seconds: float, clients: int) -> float:
    """Returns the answers 200 a second to `clients` clients that each ask one by one."""
    end, good = time.monotonic() + seconds, 0

    async def client() -> None:
        nonlocal good
        while time.monotonic() < end:
            status, _ = await ask()
            assert status == "200", status
            good += 1

    await asyncio.gather(*(client() for _ in range(clients)))
    return good / seconds


async def _offered(ask: Any, seconds: float, rate: float) -> list[tuple[str, float]]:
    """Asks `rate` times a second, without waiting for answers, and returns them all."""
    begin, tasks = time.monotonic(), []
    for i in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, begin + i / rate - time.monotonic()))
        tasks.append(asyncio.create_task(ask()))
    return await asyncio.gather(*tasks)
