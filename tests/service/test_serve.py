"""The service behind HTTP: its door alone, then the whole of it beside `renee-ray predict`."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.dataset as pads
import pytest
import torch
import uvicorn

from renee_ray.cli.main import main
from renee_ray.config.overrides import make_config
from renee_ray.config.serve import ServeConfig
from renee_ray.errors import ConfigError, ReneeError
from renee_ray.service.serve.http import TOKEN, Bearer, Endpoint, protocol
from renee_ray.service.serve.replicas import answers, only
from renee_ray.xfc.topk.select import NONE

from .conftest import Run, descendants, end, start
from .test_listening import LOOPBACK, listening

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
        return answer.status, json.loads(text) if text else {}, answer.headers
    finally:
        connection.close()


def question(*texts: object, **others: object) -> bytes:
    return json.dumps({"texts": texts, **others}).encode()


@pytest.fixture(scope="module")
def door() -> Iterator[int]:
    """The port of the HTTP side alone: a text is its own label, `wait` takes too long."""

    async def predict(texts: list[str], k: int) -> list[list[dict[str, Any]]]:
        if "fail" in texts:
            raise ArithmeticError("canary of an internal failure")
        await asyncio.sleep(30 if "wait" in texts else 0)
        return [[{"label": 0, "text": text, "score": float(k)}] for text in texts]

    settings = ServeConfig(**LIMITS, max_waiting=2, timeout_s=2)
    app = Endpoint(settings, Bearer(SECRET), {"step": 7}, predict)
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
    "not-json": (400, "Invalid JSON", b"{texts"),
    "not-utf-8": (400, "Invalid JSON", b'{"texts": ["\xff\xfe"]}'),
    "nested-deep": (400, "recursion limit", b'{"texts": ' + b"[" * 9000 + b"]" * 9000 + b"}"),
    "lone-surrogate": (400, "Invalid JSON", b'{"texts": ["\\ud800"]}'),
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


def check_closed_without_token(port: int) -> None:
    """401 on every path and method, where no byte of the announced body is sent."""
    for values in WRONG_TOKENS.values():
        for path in ("/", "/predict", "/docs", "/openapi.json", "/-/routes", "/-/healthz", "/x"):
            for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"):
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


def test_paths_methods_and_types(door: int) -> None:
    refused(ask(door, question("a"), path="/other"), 404, "no other paths")
    refused(ask(door, method="GET"), 405, "takes POST")
    refused(ask(door, path="/"), 405, "takes GET")
    refused(ask(door, question("a"), {**AUTHORISED, "Content-Type": "text/plain"}), 415, "JSON")
    assert ask(door, method="GET", path="/")[1] == {"step": 7}
    assert ask(door, question("a"))[1] == {
        "step": 7,
        "predictions": [[{"label": 0, "text": "a", "score": 5.0}]],
    }


def test_an_internal_failure_shows_nothing(door: int) -> None:
    refused(ask(door, question("fail")), 500, "the service failed")
    still_answers(door)


def test_a_late_answer_is_given_up(door: int) -> None:
    refused(ask(door, question("wait")), 504, "no answer within 2 s")
    still_answers(door)


def test_too_many_at_once_are_refused(door: int) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: ask(door, question("wait")), range(4)))
    assert sorted(status for status, *_ in found) == [503, 503, 504, 504]
    for answer in found:
        if answer[0] == 503:
            refused(answer, 503, "try again later")
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
    assert "no-such-run is not a run" in capsys.readouterr().err


def test_a_request_fits_a_batch() -> None:
    with pytest.raises(ConfigError, match="raise max_batch_size"):
        make_config(ServeConfig, {"max_texts": 9, "max_batch_size": 8})


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


# ------------------------------------------------------------------------------ the whole service


class Service:
    def __init__(self, run: str) -> None:
        settings = [f"{key}={value}" for key, value in LIMITS.items()]
        self.process = start(
            "serve", run, "port=0", "num_shards=2", "max_waiting=3", "timeout_s=6", "threads=1",
            "max_batch_size=8", *settings, "--json", env={TOKEN: SECRET},
        )  # fmt: skip
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        self.facts = json.loads(line)
        self.port = int(self.facts["url"].rpartition(":")[2])


@pytest.fixture(scope="module")
def service(trained: Run) -> Iterator[Service]:
    made = Service(trained.path)
    yield made
    end(made.process)


@pytest.mark.slow
def test_equals_predict(service: Service, source: Path, raw_predictions: Path) -> None:
    lines = (source / "tst_X.txt").read_text(encoding="utf-8").splitlines()[:24]
    expected = pads.dataset(raw_predictions).to_table().slice(0, len(lines)).to_pylist()

    def rows(first: int) -> list[list[dict[str, Any]]]:
        # Requests of different k, at once, so that they share batches.
        k = 20 if first % 8 else 7
        status, answer, _ = ask(service.port, question(*lines[first : first + 4], k=k))
        assert status == 200 and answer["step"] == service.facts["step"]
        return answer["predictions"]

    with ThreadPoolExecutor(2) as pool:
        found = [row for group in pool.map(rows, range(0, 24, 4)) for row in group]
    assert {len(row) for row in found} == {7, 20}
    for row, wanted in zip(found, expected, strict=True):
        n = len(row)
        assert [each["label"] for each in row] == wanted["label_ids"][:n]
        assert [each["text"] for each in row] == wanted["label_texts"][:n]
        scores = [each["score"] for each in row]
        assert scores == pytest.approx(wanted["scores"][:n], rel=1e-5, abs=1e-5)


@pytest.mark.slow
def test_the_door_of_the_service(service: Service) -> None:
    check_closed_without_token(service.port)
    for status, words, body in HOSTILE.values():
        refused(ask(service.port, body), status, words)
    still_answers(service.port)


@pytest.mark.slow
def test_a_shard_that_stands_still(service: Service) -> None:
    family = descendants(service.process.pid)
    shard = next(
        pid for pid, name in family.items() if "ServeReplica" in name and "shard-1" in name
    )
    os.kill(shard, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(5) as pool:
            found = list(pool.map(lambda _: ask(service.port, question("a")), range(5)))
    finally:
        os.kill(shard, signal.SIGCONT)
    assert sorted(status for status, *_ in found) == [503, 503, 504, 504, 504]
    deadline = time.monotonic() + 60
    while ask(service.port, question("a"))[0] != 200:
        assert time.monotonic() < deadline
    still_answers(service.port)


@pytest.mark.slow
def test_listens_on_loopback_and_shows_no_token_and_ends(service: Service) -> None:
    process, family = service.process, descendants(service.process.pid)
    pids = {process.pid, *family}
    found = listening(pids)
    assert found and found <= LOOPBACK, found
    assert not any(SECRET in name for name in family.values())
    inherited = [
        Path(f"/proc/{pid}/environ").read_bytes()
        for pid in family
        if os.path.exists(f"/proc/{pid}")
    ]
    assert inherited and not any(SECRET.encode() in each for each in inherited)
    links = [link for pid in family for link in Path(f"/proc/{pid}/fd").glob("*")]
    opened = {os.readlink(link) for link in links if link.is_symlink()}
    directory = next(Path(*Path(name).parts[:4]) for name in opened if "/ray/session_" in name)
    logs = [path for path in directory.rglob("*") if path.is_file() and "logs" in path.parts]
    assert logs and not any(SECRET.encode() in path.read_bytes() for path in logs)

    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "") and SECRET not in error
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in family):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    with pytest.raises(OSError):
        ask(service.port, question("a"))
