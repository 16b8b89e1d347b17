"""Lines of a worker's log."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import datetime

import pytest

from renee_ray.rank.recorder import Recorder
from renee_ray.service.observe.logs import log_lines

LOGGER = logging.getLogger("renee_ray")


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    """A recorder at step 7; the package's logger is as before afterwards."""
    before = (LOGGER.handlers[:], LOGGER.level, LOGGER.propagate)
    recorder = Recorder()
    recorder.enter("data", 7)
    yield recorder
    LOGGER.handlers[:], LOGGER.level, LOGGER.propagate = before


def test_json_lines(recorder: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    log_lines("json", "run-a", 3, recorder)
    log_lines("json", "run-a", 3, recorder)  # a second time: no line is written twice
    log = logging.getLogger("renee_ray.training.loop")
    log.info("a %s\nof two lines, größer", "text")
    recorder.enter("data", 8)
    try:
        raise ValueError("broken")
    except ValueError:
        log.warning("caught", exc_info=True)
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert datetime.fromisoformat(first.pop("time")).tzinfo is not None
    assert first == {
        "level": "INFO", "run": "run-a", "rank": 3, "step": 7,
        "logger": "renee_ray.training.loop", "message": "a text\nof two lines, größer",
    }  # fmt: skip
    assert (second["level"], second["step"]) == ("WARNING", 8)
    assert "ValueError: broken" in second["exception"]


def test_text_lines(recorder: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    log_lines("text", "run-a", 3, recorder)
    logging.getLogger("renee_ray.x").warning("slow")
    line = capsys.readouterr().err
    assert line.endswith(" WARNING rank 3 step 7 renee_ray.x: slow\n")
