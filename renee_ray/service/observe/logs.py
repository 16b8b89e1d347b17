"""The lines of a worker's log, which Ray keeps: text, or one JSON object each."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

from renee_ray.rank.recorder import Recorder

TEXT = "%(time)s %(levelname)s rank %(rank)d step %(step)d %(name)s: %(message)s"


def log_lines(log_format: str, run: str, rank: int, recorder: Recorder) -> None:
    """Sends what this package logs in this process to standard error, from now on.

    Args:
        log_format: `text` or `json`.
        run: name of the run; rank: this worker's; recorder: knows the step.
    """
    logger, handler = logging.getLogger("renee_ray"), logging.StreamHandler(sys.stderr)

    def where(record: logging.LogRecord) -> bool:
        moment = datetime.fromtimestamp(record.created, UTC)
        record.time = moment.isoformat(timespec="milliseconds")
        record.run, record.rank, record.step = run, rank, recorder.place().step
        return True

    handler.set_name(__name__)
    handler.addFilter(where)
    handler.setFormatter(JSONLines() if log_format == "json" else logging.Formatter(TEXT))
    others = [each for each in logger.handlers if each.get_name() != __name__]
    logger.handlers = [*others, handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False  # Ray Train's handler of the root would write each line again


class JSONLines(logging.Formatter):
    """Formats `{"time", "level", "run", "rank", "step", "logger", "message"}`, and `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        content = {
            "time": record.__dict__["time"],
            "level": record.levelname,
            **{key: record.__dict__[key] for key in ("run", "rank", "step")},
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        return json.dumps(content, ensure_ascii=False)
