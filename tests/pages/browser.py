"""A headless Chromium, driven over two pipes by its own protocol: nothing else has to be installed."""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from contextlib import suppress

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def found():
    """The browser's program, or None; tools/environment-browser installs it."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One process; `open` gives pages."""

    def __init__(self):
        self._home = tempfile.mkdtemp(prefix="oftfx-browser-")
        to_read, self._to = os.pipe()
        self._of, to_write = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"]
        flags += ["--remote-debugging-pipe", f"--user-data-dir={self._home}", "--hide-scrollbars"]

        def as_3_and_4():  # both are copied first: either may have the number that the other is to get
            first, second = os.dup(to_read), os.dup(to_write)
            os.dup2(first, 3)
            os.dup2(second, 4)

        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(
            [found(), *flags, "about:blank"], preexec_fn=as_3_and_4, close_fds=False, **quiet
        )
        os.close(to_read)
        os.close(to_write)
        self._number, self._left, self.events, self._tab = 0, b"", [], None

    def close(self):
        """End it, and what it wrote."""
        with suppress(Exception):
            self.call("Browser.close", limit=5)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._to)
        os.close(self._of)
        shutil.rmtree(self._home, ignore_errors=True)

    def call(self, method, session=None, *, limit=30, **parameters):
        """Ask, and wait for the answer; what it tells meanwhile is kept in ``events``."""
        self._number += 1
        asked = {"id": self._number, "method": method, "params": parameters}
        os.write(self._to, json.dumps(asked | ({"sessionId": session} if session else {})).encode() + b"\0")
        for message in self._messages(limit):
            if message.get("id") == self._number:
                assert "error" not in message, (method, message["error"])
                return message["result"]
            self.events.append(message)
        raise TimeoutError(method)

    def _messages(self, limit):
        end = time.monotonic() + limit
        while time.monotonic() < end:
            while b"\0" in self._left:
                one, _, self._left = self._left.partition(b"\0")
                yield json.loads(one)
            if select.select([self._of], [], [], max(0.0, end - time.monotonic()))[0]:
                more = os.read(self._of, 1 << 20)
                assert more, "the browser has ended"
                self._left += more

    def open(self, file, **look):
        """A page in a tab of its own, once all of it is there; the one before is closed."""
        if self._tab is not None:
            self.call("Target.closeTarget", targetId=self._tab.target)
        self.events.clear()
        self._tab = Tab(self, file, **look)
        return self._tab


class Tab:
    """One page.

    Args:
        browser: which one.
        file: the page.
        width: in pixels.
        dark: the reader prefers dark colours.
        scripts: whether they run.
    """

    def __init__(self, browser, file, *, width=1200, dark=False, scripts=True):
        self._browser = browser
        self.target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = browser.call("Target.attachToTarget", targetId=self.target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        start = time.monotonic()
        self.call("Page.navigate", url=f"file://{file}")
        there = "document.documentElement?.dataset.ready === 'yes'" if scripts else "document.readyState === 'complete'"
        self.wait_for(f"location.protocol === 'file:' && {there}")
        self.seconds = time.monotonic() - start

    def call(self, method, **parameters):
        """Ask the page's part of the browser."""
        return self._browser.call(method, self._session, **parameters)

    def run(self, script):
        """The value of an expression in the page."""
        got = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in got, got["exceptionDetails"]
        return got["result"].get("value")

    def wait_for(self, condition):
        """Until an expression is true: what a key or a click does comes a moment later."""
        end = time.monotonic() + 10
        while not self.run(condition):
            assert time.monotonic() < end, condition
            time.sleep(0.02)

    def texts(self, selector):
        """What stands in all elements that are shown."""
        shown = f"[...document.querySelectorAll({json.dumps(selector)})].filter(e => e.checkVisibility())"
        return self.run(f"{shown}.map(e => e.textContent.trim())")

    def choose(self, label, value):
        """Set the control of that label, as a reader would."""
        finds = f"[...document.querySelectorAll('label')].find(l => l.firstChild.data === {json.dumps(label)}).control"
        event = "new Event(c.tagName === 'SELECT' ? 'change' : 'input', {bubbles: true})"
        found = "[...c.options].findIndex(o => o.text === v)"
        sets = f"if (c.tagName === 'SELECT') c.selectedIndex = {found}; else c.value = v;"
        self.run(f"((c, v) => {{ {sets} c.dispatchEvent({event}) }})({finds}, {json.dumps(value)})")

    def press(self, key):
        """Press a key."""
        text = {"Enter": "\r", " ": " "}.get(key, "")
        codes = {"Enter": 13, "Tab": 9, " ": 32}
        for kind in ("keyDown", "keyUp"):
            about = {"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
            self.call("Input.dispatchKeyEvent", **about, **({"text": text} if text and kind == "keyDown" else {}))

    def messages(self):
        """What the console said, and what failed."""
        names = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded", "Network.loadingFailed")
        return [
            e["params"] for e in self._browser.events if e.get("sessionId") == self._session and e["method"] in names
        ]

    def requests(self):
        """All addresses that the page asked for."""
        events = [e for e in self._browser.events if e.get("sessionId") == self._session]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def picture(self, file, *, whole=True):
        """A PNG of the page."""
        got = self.call("Page.captureScreenshot", captureBeyondViewport=whole, **({} if not whole else self._all()))
        file.write_bytes(base64.b64decode(got["data"]))

    def _all(self):
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}
