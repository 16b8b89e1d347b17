"""The HTTP side of `renee-ray serve` alone: its paths, its token, its limits, its pages."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import uvicorn

from renee_ray.cli.main import main
from renee_ray.config.overrides import make_config
from renee_ray.config.schema import RunConfig
from renee_ray.config.score import TOKEN, ServeConfig
from renee_ray.errors import ConfigError, ReneeError
from renee_ray.service.serve.deploy import check_room
from renee_ray.service.serve.http import Bearer, application, protocol
from renee_ray.service.serve.replicas import ServedRun, answers, only
from renee_ray.xfc.topk.select import NONE

from .browser import browser

SECRET = "canary-9b1c-canary-9b1c-canary-9b1c"
AUTHORISED = {"Authorization": f"Bearer {SECRET}"}
JSON = {"Content-Type": "application/json"}
LIMITS = {"max_k": 100, "max_texts": 4, "max_text_chars": 1000, "max_body_bytes": 20000}
Answer = tuple[int, dict[str, Any], http.client.HTTPMessage]


def ask(
    port: int,
    body: object = b"",
    headers: dict[str, str] = {**AUTHORISED, **JSON},  # noqa: B006
    method: str = "POST",
    path: str = "/predict",
    timeout: float = 60,
) -> Answer:
    """One request: its status, answer and headers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request(method, path, body, headers)  # type: ignore[arg-type]
        answer = connection.getresponse()
        text = answer.read()
        is_json = answer.headers["content-type"] == "application/json"
        return answer.status, json.loads(text) if is_json else {"text": text}, answer.headers
    finally:
        connection.close()


def question(*texts: object, **others: object) -> bytes:
    return json.dumps({"texts": texts, **others}).encode()


class Echo:
    """A model for which a text is its own label."""

    facts: ClassVar[dict[str, Any]] = {"step": 7, "run": "runs/echo", "labels": 9, **LIMITS}
    here = True

    async def predict(self, texts: list[str], k: int) -> tuple[list[list[dict[str, Any]]], int]:
        if "fail" in texts:
            raise ArithmeticError("canary of an internal failure")
        await asyncio.sleep(30 if "wait" in texts else 0)
        return [[{"label": 0, "text": text, "score": float(k)}] for text in texts], len(texts)

    def ready(self) -> bool:
        return self.here


ECHO = Echo()


@pytest.fixture(scope="module")
def door() -> Iterator[int]:
    """The port of the HTTP side alone: a text is its own label, `wait` takes too long."""

    settings = ServeConfig(**LIMITS, max_waiting=2, timeout_s=4)
    app = application(settings, Bearer(SECRET), lambda: ECHO)
    config = uvicorn.Config(
        app, http=protocol(2), ws="none", lifespan="off", loop="asyncio", log_level="critical"
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield port
        server.should_exit = True
        thread.join()


HOSTILE: dict[str, tuple[int, str, bytes]] = {
    "not-json": (400, "JSON decode error", b"{texts"),
    "not-utf-8": (400, "parsing the body", b'{"texts": ["\xff\xfe"]}'),
    "nested-deep": (400, "parsing the body", b'{"texts": ' + b"[" * 9000 + b"]" * 9000 + b"}"),
    "lone-surrogate": (400, "texts.0: Input should be a valid string", b'{"texts": ["\\ud800"]}'),
    "many-digits": (400, "", b'{"texts": ["a"], "k": ' + b"9" * 9000 + b"}"),
    "not-an-object": (400, "object", b"[1, 2]"),
    "not-a-number": (400, "k: ", b'{"texts": ["a"], "k": NaN}'),
    "unknown-key": (400, "K: Extra inputs", question("a", K=1)),
    "key-long": (400, "Extra inputs", question("a", **{"x\x1b" * 1000: 1})),
    "texts-none": (400, "at least 1 item", question()),
    "texts-many": (400, "at most 4 items", question(*"abcde")),
    "text-long": (400, "texts.0: String should have at most 1000", question("a" * 1001)),
    "text-of-another-type": (400, "texts.1: Input should be a valid string", question("a", 1)),
    "k-zero": (400, "k: Input should be greater", question("a", k=0)),
    "k-large": (400, "k: Input should be less", question("a", k=101)),
    "k-text": (400, "k: Input should be a valid integer", question("a", k="5")),
    "k-boolean": (400, "k: Input should be a valid integer", question("a", k=True)),
    "body-long": (413, "longer than 20000 bytes", question("a" * 30000)),
}


def refused(answer: Answer, status: int, words: str) -> None:
    """One short sentence that shows nothing of the inside."""
    assert answer[0] == status, answer
    assert set(answer[1]) == {"error"}
    sentence = answer[1]["error"]
    assert words in sentence and len(sentence) < 300 and sentence.isprintable()
    assert "Traceback" not in sentence and "canary" not in sentence


def still_answers(port: int) -> None:
    status, answer, _ = ask(port, question("json parser", k=2))
    assert status == 200 and len(answer["predictions"]) == 1


@pytest.mark.parametrize("name", HOSTILE)
def test_refused(door: int, name: str) -> None:
    status, words, body = HOSTILE[name]
    refused(ask(door, body), status, words)
    still_answers(door)


def test_body_long_in_chunks(door: int) -> None:
    refused(ask(door, iter([b'{"texts": ["', *[b"a" * 9000] * 3, b'"]}'])), 413, "longer than")
    still_answers(door)


WRONG_TOKENS: dict[str, list[str]] = {
    "no-token": [],
    "wrong-token": [f"Bearer {SECRET[:-1]}x"],
    "token-of-another-scheme": [f"Basic {SECRET}"],
    "two-tokens": [f"Bearer {SECRET}", f"Bearer {SECRET}"],
}


OPEN = ("/", "/docs", "/openapi.json", "/health", "/ready")
METHODS = ("GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE")


def check_closed_without_token(port: int) -> None:
    """401, where no byte of the announced body is sent; only reading OPEN needs no token."""
    for values in WRONG_TOKENS.values():
        for path in (*OPEN, "/predict", "/info", "/metrics", "/-/routes", "/x", "//", "/docs/"):
            for method in METHODS[path in OPEN :]:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
                connection.putrequest(method, path)
                for value in values:
                    connection.putheader("Authorization", value)
                connection.putheader("Content-Length", "1000000000")
                connection.endheaders()
                answer = connection.getresponse()
                found = (answer.status, json.loads(answer.read()), answer.headers)
                connection.close()
                refused(found, 401, "Authorization: Bearer TOKEN")
                assert answer.headers["www-authenticate"] == "Bearer"
                assert answer.headers["connection"] == "close"


def test_without_the_token_every_path_is_closed(door: int) -> None:
    check_closed_without_token(door)
    still_answers(door)


def test_what_needs_no_token_says_nothing_of_the_run(door: int) -> None:
    for path in OPEN:
        for method in ("GET", "HEAD")[: 1 + (path in ("/", "/docs"))]:
            status, answer, headers = ask(door, b"", {}, method, path)
            assert status == 200 and headers["connection"] == "close"
            assert "echo" not in str(answer)
    for path in ("/", "/docs"):
        assert (
            b"default-src 'none'; connect-src 'self'" in ask(door, b"", {}, "GET", path)[1]["text"]
        )


def test_paths_methods_and_types(door: int) -> None:
    refused(ask(door, question("a"), path="/other"), 404, "Not Found")
    refused(ask(door, method="GET"), 405, "Not Allowed")
    refused(ask(door, path="/info"), 405, "Not Allowed")
    refused(ask(door, question("a"), {**AUTHORISED, "Content-Type": "text/plain"}), 415, "JSON")
    assert ask(door, method="GET", path="/info")[1] == ECHO.facts
    assert ask(door, question("a"))[1] == {
        "step": 7,
        "predictions": [[{"label": 0, "text": "a", "score": 5.0}]],
    }


def test_an_internal_failure_shows_nothing(door: int) -> None:
    refused(ask(door, question("fail")), 500, "the service failed")
    still_answers(door)


def test_a_late_answer_is_given_up(door: int) -> None:
    refused(ask(door, question("wait")), 504, "no answer within 4 s")
    within = {**AUTHORISED, **JSON, "X-Timeout-Ms": "50"}
    refused(ask(door, question("wait"), within, timeout=3.9), 504, "no answer within 0.05 s")
    refused(ask(door, question("a"), within | {"X-Timeout-Ms": "0"}), 400, "X-Timeout-Ms: Input")
    still_answers(door)


def test_health_and_readiness(door: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ECHO, "here", False)
    assert ask(door, b"", {}, "GET", "/health")[:2] == (200, {"status": "ok"})
    refused(ask(door, b"", {}, "GET", "/ready"), 503, "missing")
    monkeypatch.undo()
    assert ask(door, b"", {}, "GET", "/ready")[0] == 200


def metrics(port: int) -> dict[str, float]:
    """The values of /metrics, by name and tags."""
    text = ask(port, method="GET", path="/metrics")[1]["text"].decode()
    rows = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in rows}


def test_metrics_count_what_was_asked(door: int) -> None:
    name = "renee_ray_serve_"
    before = metrics(door)
    ask(door, question("a", "b", "c"))
    ask(door, question())
    ask(door, path="/x/1", headers={})
    after = metrics(door)
    added = {key: after[key] - before.get(key, 0) for key in after if key.startswith(name)}
    assert added[name + 'requests_total{path="/predict",status="200"}'] == 1
    assert added[name + 'requests_total{path="/predict",status="400"}'] == 1
    assert added[name + 'requests_total{path="other",status="401"}'] == 1
    assert added[name + 'request_seconds_count{path="/predict"}'] == 2
    assert (added[name + "batch_texts_count"], added[name + "batch_texts_sum"]) == (1, 3)
    assert after[name + "waiting"] == 0 and not any("/x" in key for key in after)


def test_too_many_at_once_are_refused(door: int) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: ask(door, question("wait")), range(4)))
    assert sorted(status for status, *_ in found) == [429, 429, 504, 504]
    for answer in found:
        if answer[0] == 429:
            refused(answer, 429, "try again later")
            assert answer[2]["retry-after"] == "1"
    still_answers(door)


@pytest.mark.parametrize("sent", [b"", b"POST /predict HTTP/1.1\r\nHost: a\r\nX"])
def test_a_head_that_does_not_come_ends_the_connection(door: int, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", door), timeout=20) as client:
        client.sendall(sent)
        assert client.recv(100) == b""


def test_a_body_that_does_not_come_is_given_up(door: int) -> None:
    head = f"POST /predict HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {SECRET}\r\n"
    with socket.create_connection(("127.0.0.1", door), timeout=20) as client:
        client.sendall(
            f"{head}Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{{".encode()
        )
        assert client.recv(1000).startswith(b"HTTP/1.1 408")
    still_answers(door)


@pytest.mark.parametrize("token", ["", "a" * 31, "a" * 31 + " b", "\u00e4" * 40])
def test_a_weak_token_is_refused(token: str) -> None:
    with pytest.raises(ReneeError, match="token_hex"):
        Bearer.take({TOKEN: token})


def test_the_token_is_taken_out_of_the_environment_and_not_kept() -> None:
    environment = {TOKEN: SECRET, "other": "1"}
    bearer = Bearer.take(environment)
    assert environment == {"other": "1"}
    assert SECRET not in repr(vars(bearer))
    assert bearer.accepts([f"bearer {SECRET}"]) and not bearer.accepts([f"bearer {SECRET}x"])


def test_without_a_token_nothing_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    assert main(["serve", "no-such-run"]) == 1
    error = capsys.readouterr().err
    assert TOKEN in error and error.count("\n") == 1
    monkeypatch.setenv(TOKEN, SECRET)
    assert main(["serve", "no-such-run"]) == 1
    assert "no-such-run is neither an export nor a run" in capsys.readouterr().err


def test_a_request_fits_a_batch() -> None:
    with pytest.raises(ConfigError, match="raise max_batch_size"):
        make_config(ServeConfig, {"max_texts": 9, "max_batch_size": 8})


@pytest.mark.parametrize(
    ("gpus", "have", "fits"),
    [
        (0, {"CPU": 5}, True),
        (0, {"CPU": 4}, False),
        (0.25, {"CPU": 5, "GPU": 1.25}, True),
        (0.25, {"CPU": 5, "GPU": 1}, False),
        (0.3, {"CPU": 5, "GPU": 2}, True),  # three on the first and two on the second
        (0.6, {"CPU": 5, "GPU": 4}, False),  # one on each, though 5 x 0.6 = 3
        (1, {"CPU": 5, "GPU": 5}, True),
        (1, {"CPU": 9}, False),
    ],
)
def test_processes_that_cannot_be_placed_are_refused(
    gpus: float, have: dict[str, float], fits: bool
) -> None:
    settings = make_config(ServeConfig, {"gpus_per_process": gpus, "num_encoders": 2})
    config = make_config(RunConfig, {"data": "d", "output": "o", "num_workers": 3})
    served = ServedRun(config, settings, "run", "step-1", "", {})
    if fits:
        check_room(served, have)
    else:
        with pytest.raises(ReneeError, match="num_shards=3, num_encoders=2"):
            check_room(served, have)


def test_without_ray_serve_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['uvicorn'] = None; import renee_ray.service.serve.serve"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'renee_ray[serve]'" in done.stderr.splitlines()[-1]


def test_rows_are_cut_to_what_each_was_asked_for() -> None:
    scores, labels = torch.tensor([[3.0, 2.0], [5.0, 4.0]]), torch.tensor([[8, 1], [8, 9]])
    cut = only((scores, labels), torch.tensor([1, 2]))
    assert cut[1].tolist() == [[8, NONE], [8, 9]]
    rows = answers(*cut, {8: "a", 9: "b"})
    assert [[each["label"] for each in row] for row in rows] == [[8], [8, 9]]
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ArithmeticError):
            answers(torch.tensor([[wrong]]), torch.tensor([[8]]), {8: "a"})


@pytest.mark.slow
def test_what_the_document_allows_is_never_a_server_error(door: int, tmp_path: Path) -> None:
    """Schemathesis makes requests by the OpenAPI document, and compares the answers with it."""
    url = f"http://127.0.0.1:{door}/openapi.json"
    checks = "not_a_server_error,status_code_conformance,response_schema_conformance"
    checks += ",content_type_conformance,ignored_auth,unsupported_method"
    headers = f"Authorization: Bearer {SECRET}", "X-Timeout-Ms: 2000"  # 504 is right for fewer
    settings = ["--max-examples=10", "--seed=1", *(f"--header={each}" for each in headers)]
    run = [sys.executable, "-m", "schemathesis.cli", "run", url, f"--checks={checks}"]
    for _ in range(3):  # a connection was reset once, on a machine with much else to do
        done = subprocess.run([*run, *settings], capture_output=True, text=True, cwd=tmp_path)
        if "Network Error" not in done.stdout:
            break
    assert done.returncode == 0 and "Tested: 5" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_in_a_browser(
    door: int, tmp_path: Path, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the keyboard alone: the token, wrong and right, a question, its answer, an error."""
    with browser(tmp_path, width) as page:
        page.open(f"http://127.0.0.1:{door}/")
        page.until("!document.getElementById('door').hidden")
        for wrong in "wrong", "wr\u0151ng":  # the second fits no header
            page.type(wrong)
            page.until("document.getElementById('status').textContent.includes('not the service')")
            assert page.value("sessionStorage.length") == 0
            page.open(f"http://127.0.0.1:{door}/")
            page.until("!document.getElementById('door').hidden")
        page.type(SECRET)
        page.until("document.activeElement.id === 'text'")
        assert page.value("sessionStorage.length") == 1
        text = "<img src=x onerror=document.title='hit'>"
        page.type(text)
        page.until("document.querySelectorAll('#labels li').length === 1")
        shown = "document.querySelector('#labels .text').textContent"
        assert page.value(shown) == text and page.value("document.title") != "hit"
        assert page.value("document.documentElement.scrollWidth") <= width
        page.type("fail")
        page.until("document.getElementById('status').textContent.includes('service failed')")
        assert page.value("document.querySelectorAll('#labels li').length") == 0
        monkeypatch.setattr(ECHO, "facts", {"not JSON": object()})
        page.open(f"http://127.0.0.1:{door}/")
        page.until("document.getElementById('status').textContent.includes('reload')")
        monkeypatch.undo()
        page.open(f"http://127.0.0.1:{door}/")
        page.until("!document.getElementById('ask').hidden")  # the token was kept
        page.open(f"http://127.0.0.1:{door}/docs")
        page.until("document.querySelectorAll('article').length > 5")
        assert "POST /predict" in page.value("document.body.innerText")
        assert "1 to 4 entries" in page.value("document.body.innerText")
        assert page.value("document.documentElement.scrollWidth") <= width
        assert {each.split("/")[2] for each in page.asked} == {f"127.0.0.1:{door}"}
