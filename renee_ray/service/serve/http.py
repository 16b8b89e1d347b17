"""The HTTP side of `renee-ray serve`: its paths, its token, and its limits of size and time.

    POST /predict    {"texts": [str, ...], "k": 5}
                     -> {"step": N, "predictions": [[{"label", "text", "score"}, ...], ...]}
    GET /info        facts of the run, and the limits
    GET /metrics     for Prometheus
    GET /, /docs, /openapi.json, /health, /ready    need no token, and tell nothing of the run

Every error is {"error": one sentence}. Of a request without the token no body is read, and of a
body no more than the limit.
"""

import asyncio
import hmac
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, MutableMapping
from importlib import resources
from typing import Annotated, Any, Protocol, Self

import prometheus_client as prometheus
from fastapi import APIRouter, FastAPI, Header, HTTPException, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field, create_model
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

import renee_ray
from renee_ray.config.score import TOKEN, ServeConfig
from renee_ray.errors import ReneeError, printable

log = logging.getLogger(__name__)

SHORTEST = 32
DEFAULT_K = 5
OPEN = {"/", "/docs", "/openapi.json", "/health", "/ready"}
CLOSE = {"Connection": "close"}
UNKNOWN = (
    "send the header 'Authorization: Bearer TOKEN' with the service's token",
    {"WWW-Authenticate": "Bearer"},
)
LONGEST_MS = 24 * 3600 * 1000
Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class Label(BaseModel):
    label: int
    text: str
    score: float


class Answer(BaseModel):
    """The labels of each text, best first."""

    step: int = Field(description="Training steps of the model that answered.")
    predictions: list[list[Label]]


class Error(BaseModel):
    error: str


class Model(Protocol):
    """What answers questions. `facts`: the answer of `GET /info`, with `step`."""

    facts: dict[str, Any]

    async def predict(self, texts: list[str], k: int) -> tuple[list[list[dict[str, Any]]], int]:
        """Returns the labels of each text, best first, and how many texts were scored together."""

    def ready(self) -> bool:
        """Returns whether all of its processes are there; may take a while."""


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
    def take(cls, environment: MutableMapping[str, str]) -> Self:
        """Takes the token out of the environment, so that no process started later inherits it."""
        return cls(environment.pop(TOKEN, ""))

    def accepts(self, values: list[str]) -> bool:
        """Returns whether these values of the header Authorization are one, with the token."""
        scheme, _, token = (values[0] if len(values) == 1 else "").partition(" ")
        same = hmac.compare_digest(self._hash(token.strip().encode()), self._digest)
        return same and scheme.lower() == "bearer"

    def _hash(self, token: bytes) -> bytes:
        return hmac.digest(self._key, token, "sha256")


class Door:
    """The requests that are in, who and how many may be, and what Prometheus is told of them."""

    def __init__(self, settings: ServeConfig, bearer: Bearer) -> None:
        self.settings, self.bearer, self.waiting = settings, bearer, 0
        self.registry = registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=registry)
        self.requests = prometheus.Counter(
            "renee_ray_serve_requests", "Answers", ["path", "status"], registry=registry
        )
        self.seconds = prometheus.Histogram(
            "renee_ray_serve_request_seconds", "Seconds to an answer", ["path"], registry=registry
        )
        self.batch = prometheus.Histogram(
            "renee_ray_serve_batch_texts",
            "Texts that were scored together; one observation a request",
            buckets=[2**i for i in range(11)],
            registry=registry,
        )
        waiting = prometheus.Gauge("renee_ray_serve_waiting", "Requests inside", registry=registry)
        waiting.set_function(lambda: self.waiting)

    async def measure(self, request: Request, answer: Callable[..., Awaitable[Response]]) -> Any:
        """Answers a request, whatever happens; without the token, its connection then ends."""
        begin = time.monotonic()
        known = self.bearer.accepts(request.headers.getlist("authorization"))
        free = request.scope["path"] in OPEN and request.method in ("GET", "HEAD")
        try:
            response = await answer(request) if known or free else _error(401, *UNKNOWN)
        except ClientDisconnect:
            response = Response(status_code=499)
        except Exception:
            log.exception("a request failed")
            response = _error(500, "the service failed; see its log")
        path = getattr(request.scope.get("route"), "path", "other")
        self.requests.labels(path, response.status_code).inc()
        self.seconds.labels(path).observe(time.monotonic() - begin)
        if not known:
            response.headers.update(CLOSE)
        return response

    def route(self) -> type[APIRoute]:
        """Makes the class of a route that lets in `max_waiting` requests, and reads their bodies.

        FastAPI's `max_body_size` would answer 413 in place of 401, and has no timeout.
        """

        class Admitted(APIRoute):
            def get_route_handler(route) -> Handler:
                handle = super().get_route_handler()

                async def admitted(request: Request) -> Response:
                    return await self._admitted(request, handle)

                return admitted

        return Admitted

    async def _admitted(self, request: Request, handle: Handler) -> Response:
        if self.waiting >= self.settings.max_waiting:
            raise HTTPException(
                429, f"{self.waiting} requests are waiting; try again later", {"Retry-After": "1"}
            )
        self.waiting += 1
        try:
            request.state.arrived = time.monotonic()
            try:
                async with asyncio.timeout(self.settings.timeout_s):
                    body = await _body(request, self.settings.max_body_bytes)
            except TimeoutError:
                late = "the request's body did not come in time"
                raise HTTPException(408, late, CLOSE) from None

            async def receive() -> dict[str, Any]:
                return {"type": "http.request", "body": body}

            return await handle(Request(request.scope, receive))
        finally:
            self.waiting -= 1


def question_model(settings: ServeConfig) -> type[BaseModel]:
    """Makes the model of the body of POST /predict, within the limits of a configuration."""
    text = Annotated[str, Field(max_length=settings.max_text_chars)]
    several = Field(min_length=1, max_length=settings.max_texts)
    k = Field(min(DEFAULT_K, settings.max_k), ge=1, le=settings.max_k, description="Of each text.")
    return create_model(
        "Question",
        __config__=ConfigDict(extra="forbid", strict=True),
        texts=Annotated[list[text], several],  # type: ignore[valid-type]
        k=(int, k),
    )


def application(settings: ServeConfig, bearer: Bearer, current: Callable[[], Model]) -> FastAPI:
    """Makes the ASGI application. `current` returns what answers now, for each request anew."""
    door = Door(settings, bearer)
    app = FastAPI(
        title="renee_ray",
        version=renee_ray.__version__,
        description="The labels that a trained classifier predicts for texts.",
        docs_url=None,  # FastAPI's pages would load their scripts from elsewhere
        redoc_url=None,
        exception_handlers={
            AnyHTTPException: _refuse,
            RequestValidationError: _refuse_invalid,
        },
    )
    app.middleware("http")(door.measure)
    pages = resources.files(__package__).joinpath("pages")
    for path, name in ("/", "ask.html"), ("/docs", "docs.html"):
        page = HTMLResponse(pages.joinpath(name).read_text("utf-8"))
        app.router.routes.append(Route(path, page, methods=["GET"], include_in_schema=False))
    _add_predict(app, door, current)
    _add_watching(app, door, current)
    return app


def _error(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": sentence}, status, headers)


async def _refuse(_: Request, error: Any) -> Response:
    return _error(error.status_code, str(error.detail), error.headers)


async def _refuse_invalid(_: Request, error: Any) -> Response:
    first = error.errors()[0]
    where = printable(".".join(map(str, first["loc"][1:])))[:80]
    return _error(400, f"{where}: {first['msg']:.200}" if where else f"{first['msg']:.200}")


SECRET = [Security(HTTPBearer(auto_error=False, description=f"The value of {TOKEN}."))]
"""For the OpenAPI document: `Bearer` compares the token, before FastAPI reads anything."""


def _errors(*statuses: int | str) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Error} for status in statuses}


def _add_watching(app: FastAPI, door: Door, current: Callable[[], Model]) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """Answers as long as this process does."""
        return {"status": "ok"}

    @app.get("/ready", responses=_errors(503))
    def ready() -> dict[str, str]:
        """Answers 200 if all processes that score are there."""
        if not current().ready():
            raise HTTPException(503, "a process that scores is missing; it may be starting")
        return {"status": "ok"}

    @app.get("/info", dependencies=SECRET, responses=_errors(401))
    async def info() -> dict[str, Any]:
        """Tells which run answers, and the limits of a request."""
        return current().facts

    text: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {}}}}

    @app.get("/metrics", dependencies=SECRET, responses=text | _errors(401))
    async def metrics() -> Response:
        """Counts requests by path and status, and their seconds, queue and batches."""
        content = prometheus.generate_latest(door.registry)
        return Response(content, media_type=prometheus.CONTENT_TYPE_LATEST)


def _add_predict(app: FastAPI, door: Door, current: Callable[[], Model]) -> None:
    question_type = question_model(door.settings)
    router = APIRouter(route_class=door.route())
    deadline = Header(
        alias="X-Timeout-Ms",
        ge=1,
        le=LONGEST_MS,
        description="Milliseconds after which the answer is of no use. A request is then answered "
        f"504, and not scored if it still waits. Never more than {door.settings.timeout_s:g} s.",
    )

    errors = _errors(400, 401, 408, 413, 415, 429, 504, "4XX")

    @router.post("/predict", response_model=Answer, dependencies=SECRET, responses=errors)
    async def predict(
        request: Request,
        question: question_type,  # type: ignore[valid-type]
        timeout_ms: Annotated[int, deadline] = LONGEST_MS,
    ) -> Response:
        """Predicts the k best labels of each text."""
        seconds = min(door.settings.timeout_s, timeout_ms / 1000)
        until, model = request.state.arrived + seconds, current()
        try:
            if time.monotonic() >= until:
                raise TimeoutError
            async with asyncio.timeout(until - time.monotonic()):
                found, batch = await model.predict(question.texts, question.k)  # type: ignore[attr-defined]
        except TimeoutError:
            late = f"no answer within {seconds:g} s; try again later"
            raise HTTPException(504, late) from None
        door.batch.observe(batch)
        return JSONResponse({"step": model.facts["step"], "predictions": found})

    app.include_router(router)


async def _body(request: Request, limit: int) -> bytes:
    """Reads a body; raises HTTPException if its header says no JSON, or it exceeds the limit."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, "send JSON with the header 'Content-Type: application/json'")
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise HTTPException(413, f"the body is longer than {limit} bytes; send fewer texts")
    return bytes(body)


def protocol(timeout_s: float) -> type[H11Protocol]:
    """Returns HTTP/1.1 by h11, which bounds a request's head to 64 KiB, with a timeout for it.

    Without a token nobody keeps a connection: a late head ends it, and so does the answer.
    """

    class Impatient(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.loop.call_later(timeout_s, self._late)

        def _late(self) -> None:
            if self.cycle is None and not self.transport.is_closing():
                self.transport.close()

    return Impatient
