"""A real browser for tests: headless Chromium over the pipe of its DevTools protocol, which needs no other package.

with Browser() as browser:
    browser.open(path)
    assert browser.problems == []
"""

import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
OPTIONS += ["--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe"]
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, "Tab": 9}
REQUIRED = "LLMSHEARING_BROWSER"
SECONDS = 180


def program() -> str:
    """Chromium's path. Without it tests are skipped, saying so, or fail where the environment says `required`."""
    found = next((path for path in map(shutil.which, PROGRAMS) if path), None)
    if found is None:
        say = f"no Chromium here ({', '.join(PROGRAMS)}): apt-get install chromium"
        if os.environ.get(REQUIRED) == "required":
            pytest.fail(f"{say}; {REQUIRED}=required")
        pytest.skip(say)
    return found


class Browser:
    """One page. `problems`: what its console and the browser complained about; `requests`: what it asked for."""

    def __init__(self, width: int = 1200, height: int = 900) -> None:
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.profile = tempfile.mkdtemp()
        read, self.writing = os.pipe()
        self.reading, write = os.pipe()
        words = [program(), *OPTIONS, f"--user-data-dir={self.profile}", f"--window-size={width},{height}"]
        # The protocol wants the pipes as descriptors 3 and 4.
        shell = ["bash", "-c", f'exec "$@" 3<&{read} 4>&{write}', "bash", *words]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(shell, pass_fds=(read, write), stdin=quiet, stdout=quiet, stderr=quiet)
        os.close(read)
        os.close(write)
        self.number, self.buffer, self.session, self.seen = 0, b"", None, set()

    def __enter__(self):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *error) -> None:
        self.process.terminate()
        self.process.wait(30)
        os.close(self.writing)
        os.close(self.reading)
        shutil.rmtree(self.profile, ignore_errors=True)

    def call(self, method: str, **parameters):
        """One command of the protocol, and its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.writing, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self):
        end = time.monotonic() + SECONDS
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.reading], [], [], max(0.0, end - time.monotonic()))
            part = os.read(self.reading, 1 << 16) if ready else b""
            assert part, "the browser does not answer"
            self.buffer += part
        text, _, self.buffer = self.buffer.partition(b"\0")
        answer = json.loads(text)
        self._note(answer.get("method"), answer.get("params", {}))
        return answer

    def _note(self, event, told) -> None:
        self.seen.add(event)
        if event == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(told["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.problems.append(json.dumps(told["args"]))
        elif event == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.problems.append(json.dumps(told["entry"]))
        elif event == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])

    def open(self, path: Path) -> None:
        """Go to a file, and wait until all of it is there."""
        self.seen.discard("Page.loadEventFired")
        self.call("Page.navigate", url=path.resolve().as_uri())
        while "Page.loadEventFired" not in self.seen:
            self._next()

    def do(self, expression: str):
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def key(self, name: str) -> None:
        """Press a key, as a user does."""
        code = {"key": name, "code": name, "windowsVirtualKeyCode": KEYS[name]}
        for event in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=event, **code)

    def move(self, x: float, y: float) -> None:
        """Move the mouse there, in the window."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
