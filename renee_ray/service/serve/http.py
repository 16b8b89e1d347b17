"""The HTTP side of `renee-ray serve`: its paths, its token, and its limits of size and time.

    POST /predict   {"texts": [str, ...], "k": 5}
                    -> {"step": N, "predictions": [[{"label", "text", "score"}, ...], ...]}
    GET /           facts of the run, and the limits

Every answer but these two is {"error": one sentence}. Nothing of a request is read before its
token has been compared, and of a body no more than the limit.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from renee_ray.config.serve import ServeConfig
from renee_ray.errors import ReneeError, printable

log = logging.getLogger(__name__)

TOKEN = "RENEE_RAY_SERVE_TOKEN"
SHORTEST = 32
DEFAULT_K = 5
ALLOWED = {"/": ("GET", "HEAD"), "/predict": ("POST",)}
T = TypeVar("T")
Predict = Callable[[list[str], int], Awaitable[list[list[dict[str, Any]]]]]
"""(texts, k) -> for each text its labels, best first."""


class Refused(Exception):
    """An answer that is an error. `close`: the connection ends, whatever the client still sends."""

    def __init__(self, status: int, sentence: str, *, close: bool = False, **headers: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if close:
            self.headers["connection"] = "close"


class Bearer:
    """The token that requests must bear, kept as a hash with a key of this process.

    Raises:
        ReneeError: it is too short, or not printable ASCII.
    """

    def __init__(self, token: str) -> None:
        if not re.fullmatch(rf"[!-~]{{{SHORTEST},}}", token):
            raise ReneeError(
                f"serving needs a secret of at least {SHORTEST} printable ASCII characters in the "
                f"environment variable {TOKEN}: export {TOKEN}="
                f'$(python -c "import secrets; print(secrets.token_hex(32))")'
            )
        self._key = secrets.token_bytes(32)
        self._digest = self._hash(token.encode())

    @classmethod
    def take(cls, environment: MutableMapping[str, str]) -> Bearer:
        """Takes the token out of the environment, so that no process started later inherits it."""
        return cls(environment.pop(TOKEN, ""))

    def accepts(self, values: list[str]) -> bool:
        """Returns whether these values of the header Authorization are one, with the token."""
        scheme, _, token = (values[0] if len(values) == 1 else "").partition(" ")
        same = hmac.compare_digest(self._hash(token.strip().encode()), self._digest)
        return same and scheme.lower() == "bearer"

    def _hash(self, token: bytes) -> bytes:
        return hmac.digest(self._key, token, "sha256")


class Question(BaseModel):
    """The body of POST /predict."""

    model_config = ConfigDict(extra="forbid", strict=True)
    texts: list[str]
    k: int


def question_model(config: ServeConfig) -> type[Question]:
    """Makes the model of a question within the limits of a configuration."""
    text = Annotated[str, Field(max_length=config.max_text_chars)]
    several = Field(min_length=1, max_length=config.max_texts)
    texts = Annotated[list[text], several]  # type: ignore[valid-type]
    k = Annotated[int, Field(ge=1, le=config.max_k)]
    fields: dict[str, Any] = {"texts": (texts, ...), "k": (k, min(DEFAULT_K, config.max_k))}
    return create_model("Question", __base__=Question, **fields)


def parse(model: type[Question], body: bytes) -> Question:
    """Parses a body; raises Refused if it is no JSON, or no question within the limits."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = printable(".".join(map(str, first["loc"])))[:80]
    raise Refused(400, f"{where}: {first['msg']:.200}" if where else f"{first['msg']:.200}")


class Endpoint:
    """The ASGI application.

    Args:
        facts: the answer of `GET /`, with `step`.
        predict: scores texts; it is cancelled after `timeout_s`.
    """

    def __init__(
        self, config: ServeConfig, bearer: Bearer, facts: dict[str, Any], predict: Predict
    ) -> None:
        self._config, self._bearer, self._facts, self._predict = config, bearer, facts, predict
        self._model = question_model(config)
        self._waiting = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            response: Response = JSONResponse(await self._answer(request))
        except Refused as refused:
            response = _error(refused)
        except ClientDisconnect:
            return
        except Exception:
            log.exception("a request failed")
            response = _error(Refused(500, "the service failed; see its log"))
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> dict[str, Any]:
        if not self._bearer.accepts(request.headers.getlist("authorization")):
            raise Refused(
                401,
                "send the header 'Authorization: Bearer TOKEN' with the service's token",
                close=True,
                www_authenticate="Bearer",
            )
        path, method = request.url.path, request.method
        if path not in ALLOWED:
            raise Refused(404, "there are GET / and POST /predict and no other paths")
        if method not in ALLOWED[path]:
            allow = ", ".join(ALLOWED[path])
            raise Refused(405, f"this path takes {allow} alone", allow=allow)
        if path == "/":
            return self._facts
        if self._waiting >= self._config.max_waiting:
            raise Refused(
                503, f"{self._waiting} requests are waiting; try again later", retry_after="1"
            )
        self._waiting += 1
        try:
            return await self._predictions(request)
        finally:
            self._waiting -= 1

    async def _predictions(self, request: Request) -> dict[str, Any]:
        until = time.monotonic() + self._config.timeout_s
        late = Refused(408, "the request's body did not come in time", close=True)
        body = await _before(until, _body(request, self._config.max_body_bytes), late)
        question = parse(self._model, body)
        late = Refused(504, f"no answer within {self._config.timeout_s:g} s; try again later")
        found = await _before(until, self._predict(question.texts, question.k), late)
        return {"step": self._facts["step"], "predictions": found}


async def _before(until: float, work: Awaitable[T], late: Refused) -> T:
    """Awaits `work`, or cancels it at the time `until` and raises `late`."""
    try:
        return await asyncio.wait_for(work, max(0.0, until - time.monotonic()))
    except TimeoutError:
        raise late from None


async def _body(request: Request, limit: int) -> bytes:
    """Reads a body; raises Refused if its header says no JSON, or it exceeds the limit."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, "send JSON with the header 'Content-Type: application/json'")
    long = Refused(413, f"the body is longer than {limit} bytes; send fewer texts at once")
    # The HTTP parser checks that these are digits, but not how many.
    length = request.headers.get("content-length", "0")
    if len(length) > 18 or int(length) > limit:
        raise long
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise long
    return bytes(body)


def _error(refused: Refused) -> JSONResponse:
    return JSONResponse({"error": str(refused)}, refused.status, headers=refused.headers)


def protocol(timeout_s: float) -> type[H11Protocol]:
    """Returns HTTP/1.1 by h11, which bounds a request's head to 64 KiB, with a timeout for it.

    Without a token nobody keeps a connection: a late head ends it, and so does the answer 401.
    """

    class Impatient(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.loop.call_later(timeout_s, self._late)

        def _late(self) -> None:
            if self.cycle is None and not self.transport.is_closing():
                self.transport.close()

    return Impatient
