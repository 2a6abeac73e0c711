"""A headless Chromium, driven by its DevTools protocol over a pipe: enough to load a page, type, click and look."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

PAGE_LEFT = (
    -32000
)  # the code of "Inspected target navigated or closed", and of contexts that a navigation ended


class Navigated(Exception):
    """The page was left while an expression was evaluated in it."""


class Page:
    """One page of a browser. Messages end with a zero byte in both directions."""

    def __init__(self, reads: int, writes: int) -> None:
        self._reads, self._writes = reads, writes
        self._number, self._session, self._buffer = 0, "", b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        self.call("Page.enable")
        self.call("Runtime.enable")

    def call(self, method: str, **words: Any) -> dict[str, Any]:
        """One command of the protocol and its result; events that come before it are passed over."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": words}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writes, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                read = os.read(self._reads, 1 << 20)
                assert read, "the browser ended"
                self._buffer += read
            line, _, self._buffer = self._buffer.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self._number:
                if answer.get("error", {}).get("code") == PAGE_LEFT:
                    raise Navigated(answer["error"]["message"])
                assert "error" not in answer, answer["error"]
                return dict(answer["result"])

    def open(self, address: str) -> None:
        """Load a page and wait until it is complete."""
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of an expression of JavaScript in the page."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def reload(self) -> None:
        """Load the page again, with its storage as it is, and wait until the new page is complete."""
        self.run("window.isOld = true")
        self.call("Page.reload")
        self.wait("!window.isOld && document.readyState === 'complete'")

    def wait(self, script: str, seconds: float = 120.0) -> None:
        """Until an expression is true, of the page that is there then: one that is just left answers nothing."""
        ends, is_true = time.monotonic() + seconds, False
        while not is_true:
            assert time.monotonic() < ends, script
            with contextlib.suppress(Navigated):
                is_true = bool(self.run(script))
            if not is_true:
                time.sleep(0.1)

    def click(self, selector: str) -> None:
        """Press the middle of an element with the mouse."""
        x, y = self.middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def hover(self, selector: str) -> None:
        """Rest the pointer on an element."""
        x, y = self.middle(selector)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def middle(self, selector: str, seconds: float = 120.0) -> tuple[float, float]:
        """Where an element is, once it is scrolled into view and a pointer there would reach it.

        An element that a filter has not shown yet has no place, and one that still scrolls leaves its place: both are
        looked for again. Fails with what lies there instead.
        """
        script = (
            f"(async () => {{ const e = document.querySelector({json.dumps(selector)});"
            "if (!e) return null;"
            "e.scrollIntoView({block: 'center'});"
            "for (let i = 0; i < 2; i++) await new Promise(done => requestAnimationFrame(done));"
            "const r = e.getBoundingClientRect(), x = r.x + r.width / 2, y = r.y + r.height / 2;"
            "const there = r.width && r.height ? document.elementFromPoint(x, y) : null;"
            "return [x, y, e.contains(there), there ? there.outerHTML.slice(0, 80) : 'nothing'] })()"
        )
        ends, before, found = time.monotonic() + seconds, None, None
        while found is None or not found[2] or found != before:
            assert time.monotonic() < ends, f"{selector} cannot be reached: {found}"
            before, found = found, self.run(script)
        return float(found[0]), float(found[1])

    def size(self, width: int, height: int, dark: bool = False) -> None:
        """The size of the window, and whether its owner prefers dark pages."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path: Path) -> None:
        """Save what the window shows as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextlib.contextmanager
def browser() -> Iterator[Page]:
    """A page of a new Chromium without a profile; the browser ends with the block."""
    assert CHROMIUM is not None
    to_browser, from_browser = os.pipe(), os.pipe()
    ends = (to_browser[0], from_browser[1])  # the browser reads descriptor 3 and writes 4
    with tempfile.TemporaryDirectory() as folder:
        switches = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
        command = [CHROMIUM, *switches, f"--user-data-dir={folder}", "--remote-debugging-pipe"]
        script = f'exec 3<&{ends[0]} 4>&{ends[1]}; exec "$@"'
        process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command],
            pass_fds=ends,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in ends:
            os.close(end)
        try:
            yield Page(from_browser[0], to_browser[1])
        finally:
            process.terminate()
            process.wait(30)
            for end in (to_browser[1], from_browser[0]):
                os.close(end)
