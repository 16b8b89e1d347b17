"""What users are told: errors that are one sentence, and text that is fit for a terminal."""

from __future__ import annotations

import re
from collections.abc import Callable

SHOWN = 200
"""Characters of a wrong value in an error's sentence."""
_CREDENTIALS = re.compile(r"(\w://)[^\s/?#'\"]*:[^\s?#'\"]*@|(\ws?3a?://)[^\s/?#'\"]*@")
_SECRET = re.compile(
    r"([?&][^=&\s'\"]*(?:secret|token|key|sig|signature|password|credential)[^=&\s'\"]*=)"
    r"[^&\s'\"]*",
    re.IGNORECASE,
)
_UNSEEN = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff"
    r"\ud800-\udfff\ufff9-\ufffb]"
)


Progress = Callable[[str], None]
"""Takes a line that tells how far a command is."""


def silent(line: str) -> None:
    """Tells nobody."""


_QUOTED = re.compile(r"[\w.]+(Error|Exception)\b: ")


class ReneeError(Exception):
    """A user's error: its text is one sentence, shown without a traceback.

    status: exit status of a command that ends with it.
    """

    status = 1


class LeaseLost(ReneeError):
    """Another driver has taken a run over."""


class ConfigError(ReneeError):
    """A configuration that cannot be run."""


def printable(text: str) -> str:
    """`text` for a terminal: what would steer it, or change the order of what is seen, escaped."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def redacted(text: str) -> str:
    """`text` without the credentials in the URLs that it quotes."""
    text = _CREDENTIALS.sub(lambda found: f"{found[1] or found[2]}***@", text)
    return _SECRET.sub(lambda found: f"{found[1]}***", text)


def reason(error: BaseException) -> str:
    """What another library's exception says, as a part of one sentence: its first line.

    Where that announces an error ("failed due to:"), the first one that is quoted below follows.
    """
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    quoted = filter(_QUOTED.match, lines[1:] if lines[0].rstrip().endswith(":") else [])
    return f"{lines[0].strip()} {next(quoted, '').strip():.300}".rstrip()
