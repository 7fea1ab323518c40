"""A real browser for tests: headless Chromium through chromedriver, spoken to over HTTP with the standard library."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tolerances import PATIENCE

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
)
MISSING = None if CHROMIUM and DRIVER else "needs chromium and chromedriver on the PATH"
# Without a browser these tests are skipped, but not where CI promises one: there `browser` fails.
needs_browser = pytest.mark.skipif(MISSING is not None and not os.environ.get("CI"), reason=str(MISSING))


class Browser:
    """One window."""

    def __init__(self, address: str, profile: Path) -> None:
        self._address = address
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self._send("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._address += f"/session/{session['sessionId']}"

    def open(self, page: Path) -> None:
        """Loads a file, and waits for its script."""
        self.visit(page.resolve().as_uri())

    def visit(self, address: str) -> None:
        """Loads a page of ours from anywhere, and waits for its script."""
        self._send("POST", "/url", {"url": address})
        self.wait("return document.documentElement.dataset.ready === 'yes'")

    def run(self, script: str, *arguments: object) -> Any:
        """What a script returns; it may be a promise."""
        return self._send("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def wait(self, script: str, *arguments: object) -> Any:
        """What a script returns as soon as that is true."""
        end = time.monotonic() + PATIENCE
        while not (found := self.run(script, *arguments)):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.02)
        return found

    def emulate(self, width: int, *, dark: bool = False) -> None:
        """The width of the window in CSS pixels, and the preferred colours."""
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.devtools("Emulation.setEmulatedMedia", {"media": "", "features": features})

    def press(self, key: str, *, control: bool = False) -> None:
        """A key, as a user presses it: a letter or Enter."""
        enter = {"windowsVirtualKeyCode": 13} if key == "Enter" else {}
        what = {"key": key, "modifiers": 2 * control, **enter}
        self.devtools("Input.dispatchKeyEvent", {"type": "keyDown", **what, "text": "\r" if enter else key})
        self.devtools("Input.dispatchKeyEvent", {"type": "keyUp", **what})

    def messages(self) -> list[str]:
        """What was written to the console since the last time: errors, violated policies, what scripts say."""
        return [entry["message"] for entry in self._send("POST", "/se/log", {"type": "browser"})]

    def devtools(self, command: str, parameters: dict[str, Any]) -> Any:
        """One command of the DevTools protocol."""
        return self._send("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def close(self) -> None:
        """Ends the browser."""
        self._send("DELETE", "")

    def _send(self, method: str, path: str, content: dict[str, Any] | None = None) -> Any:
        data = None if content is None else json.dumps(content).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._address + path, data=data, method=method, headers=headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never by way of a proxy
        try:
            with opener.open(request, timeout=PATIENCE) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with a fresh profile, gone at the end of the block."""
    assert MISSING is None, MISSING
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    driver = subprocess.Popen([str(DRIVER), f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert driver.poll() is None and time.monotonic() < end, "chromedriver does not start"
                time.sleep(0.05)
        window = Browser(f"http://127.0.0.1:{port}", profile)
        try:
            yield window
        finally:
            window.close()
    finally:
        driver.terminate()
        driver.wait(timeout=PATIENCE)
