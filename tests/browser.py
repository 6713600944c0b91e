"""A headless Chromium, driven over its DevTools socket: pages of this project are looked at."""

import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
FLAGS += ["--remote-debugging-port=0", "--hide-scrollbars"]
CODES = {"Space": (" ", 32), "ArrowLeft": ("ArrowLeft", 37), "ArrowUp": ("ArrowUp", 38)}
CODES |= {"ArrowRight": ("ArrowRight", 39), "ArrowDown": ("ArrowDown", 40)}


class Browser:
    """One tab. ``errors``: what its console complained of."""

    def __init__(self, socket):
        self.socket, self.count, self.errors = socket, 0, []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """-> the result of a DevTools method. Raises AssertionError."""
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv(timeout=60))
            if message.get("id") == self.count:
                assert "error" not in message, message["error"]
                return message["result"]
            self._note(message)

    def _note(self, message):
        params = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"])
        elif message.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])

    def open(self, url):
        self.call("Page.navigate", url=url)

    def eval(self, expression):
        """The value of a JavaScript expression, as JSON has it."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression, seconds=30):
        """Until ``expression`` is true. -> its value."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.eval(expression):
                return value
            time.sleep(0.05)
        raise AssertionError(f"never true: {expression}")

    def key(self, key, down=True, up=True):
        text, code = CODES.get(key, (key, ord(key[0].upper())))
        name = key if key in CODES else f"Key{key.upper()}"
        keys = {"key": text, "code": name, "windowsVirtualKeyCode": code}
        if down:
            self.call("Input.dispatchKeyEvent", type="keyDown", **keys)
        if up:
            self.call("Input.dispatchKeyEvent", type="keyUp", **keys)

    def size(self, width, height, dark=False):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path=None, whole=False):
        """PNG bytes of what is seen, or of the whole page."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        data = base64.b64decode(found["data"])
        if path:
            Path(path).write_bytes(data)
        return data


@contextlib.contextmanager
def browser():
    """A tab of a new browser; the test is skipped where there is none."""
    if not CHROMIUM:
        pytest.skip("there is no chromium: apt install chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        words = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = Path(folder) / "DevToolsActivePort"
            end = time.monotonic() + 60
            while not port.exists() or len(port.read_text().split()) < 2:
                assert process.poll() is None and time.monotonic() < end, "chromium did not start"
                time.sleep(0.1)
            number = port.read_text().split()[0]
            yield from tab(number)
        finally:
            process.terminate()
            process.wait(30)


def tab(port):
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=30) as reply:
        pages = [page for page in json.load(reply) if page["type"] == "page"]
    with connect(pages[0]["webSocketDebuggerUrl"], max_size=None, proxy=None) as socket:
        yield Browser(socket)
