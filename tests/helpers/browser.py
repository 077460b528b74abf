"""Look at pages in a headless Chromium, over its debugging pipe: no port, no driver, no network."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers.requirements import skip_or_fail

_TIMEOUT_S = 120


class Browser:
    """One page of a browser.

    Attributes:
        events: what the browser has reported since `open`, in order.
    """

    def __init__(self, executable: str, profile: Path) -> None:
        command_end, self._commands = os.pipe()
        self._answers, answer_end = os.pipe()
        moves = (command_end, answer_end)
        script = f'exec 3<&{moves[0]} 4>&{moves[1]}; exec "$0" "$@"'
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
        arguments += [f"--user-data-dir={profile}", "--no-first-run", "--disable-background-networking", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", script, executable, *arguments],
            pass_fds=moves,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for end in moves:
            os.close(end)
        self._buffer, self._number = b"", 0
        self.events: list[dict[str, Any]] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, path: Path, *, width: int, scheme: str, height: int = 900) -> None:
        """Show a file as a window of this width and colour scheme would, and wait until it is loaded."""
        self.events.clear()
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._call("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._receive(time.monotonic() + _TIMEOUT_S)

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression of JavaScript in the page; the page's own policy does not bind it."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def take_screenshot(self, path: Path) -> None:
        """Write the whole page as a PNG."""
        image = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(image["data"]))

    def list_requests(self) -> list[str]:
        """Return the URLs that the page has asked for."""
        return [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]

    def list_complaints(self) -> list[str]:
        """Return what the browser complains of: violations of the page's policy, errors, dialogs."""
        complaints = [e["params"]["entry"]["text"] for e in self.events if e["method"] == "Log.entryAdded"]
        names = ("Page.javascriptDialogOpening", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
        return complaints + [json.dumps(e) for e in self.events if e["method"] in names]

    def close(self) -> None:
        """End the browser."""
        os.close(self._commands)
        os.close(self._answers)
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if hasattr(self, "_session"):
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        deadline_s = time.monotonic() + _TIMEOUT_S
        while True:
            answer = self._receive(deadline_s)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _receive(self, deadline_s: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            assert select.select([self._answers], [], [], max(0.0, deadline_s - time.monotonic()))[0], "no answer"
            data = os.read(self._answers, 1 << 20)
            assert data, "the browser has ended"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message


@contextmanager
def start_browser(profile: Path) -> Iterator[Browser]:
    """Start Debian's Chromium; without one skip with the reason, or fail if DPGEN_REQUIRE_CHROMIUM is set."""
    executable = shutil.which("chromium")
    if executable is None:
        skip_or_fail("chromium is not installed", "DPGEN_REQUIRE_CHROMIUM")
    browser = Browser(executable, profile)
    try:
        yield browser
    finally:
        browser.close()
