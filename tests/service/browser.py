"""Headless Chromium, driven by the DevTools protocol through its web socket."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

LIMIT_S = 60


class Page:
    """A tab. asked: the addresses that it has asked for."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._numbers = socket, itertools.count(1)
        self.asked: list[str] = []
        self.call("Network.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Sends a command and returns its result."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while (found := json.loads(self._socket.recv(timeout=LIMIT_S))).get("id") != number:
            if found["method"] == "Network.requestWillBeSent":
                url = found["params"]["request"]["url"]
                self.asked += [url] if not url.startswith("data:") else []
        assert "error" not in found, found
        return dict(found["result"])

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.until(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return found["result"].get("value")

    def until(self, expression: str) -> None:
        limit = time.monotonic() + LIMIT_S
        while not self.value(expression):
            assert time.monotonic() < limit, self.value("document.body.innerText")
            time.sleep(0.05)

    def type(self, text: str) -> None:
        """Replaces the text of what has the focus, and presses Enter."""
        self.value("document.activeElement.select()")
        self.call("Input.insertText", text=text)
        for kind in "keyDown", "keyUp":
            enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
            text = {"text": "\r"} if kind == "keyDown" else {}  # type: ignore[assignment]
            self.call("Input.dispatchKeyEvent", type=kind, **enter, **text)

    def picture(self, path: Path, scheme: str = "light") -> None:
        """Writes a screenshot of the whole page, in a colour scheme."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))


@contextlib.contextmanager
def browser(folder: Path, width: int) -> Iterator[Page]:
    """A tab of `width` pixels; its Chromium keeps its files in `folder`."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("needs Chromium")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
    process = subprocess.Popen(
        [program, *flags, f"--user-data-dir={folder}/chromium", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        port, limit = folder / "chromium" / "DevToolsActivePort", time.monotonic() + LIMIT_S
        while not port.exists() or not port.read_text().strip():
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.05)
        address = f"http://127.0.0.1:{port.read_text().split()[0]}/json"
        tabs = json.loads(urllib.request.urlopen(address).read())
        tab = next(each for each in tabs if each["type"] == "page")
        with connect(tab["webSocketDebuggerUrl"], max_size=None) as socket:
            page = Page(socket)
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
            page.call("Emulation.setDeviceMetricsOverride", **size)
            yield page
    finally:
        process.kill()
        process.wait()
