"""A headless Chromium for tests, controlled over its DevTools pipe: no driver, no further package."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import threading

import pytest

NAMES = ("google-chrome", "google-chrome-stable", "chromium", "chromium-browser")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe",
         "--no-first-run", "--disable-background-networking"]  # fmt: skip


class Page:
    """One tab. `problems` holds what its console reports, `requests` the addresses it loads."""

    def __init__(self, send, receive):
        self.send, self.receive, self.number, self.session = send, receive, 0, None
        self.problems, self.requests = [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """Result of a DevTools command."""
        self.number += 1
        number, session = self.number, {"sessionId": self.session} if self.session else {}
        self.send.write(json.dumps({"id": number, "method": method, "params": params, **session}).encode() + b"\0")
        self.send.flush()
        while (message := self.read()).get("id") != number:
            pass
        assert "error" not in message, message
        return message["result"]

    def read(self):
        """The browser's next message, an answer or an event. EOFError when it has ended."""
        data = bytearray()
        while not data.endswith(b"\0"):
            byte = self.receive.read(1)
            if not byte:
                raise EOFError("the browser has ended")
            data += byte
        message = json.loads(data[:-1])
        if message.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.problems.append(message["params"])
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        return message

    def open(self, url, width=1200, height=900):
        """Load `url` in a window of that size, CSS pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        for target in ("about:blank", url):  # from the same page a new fragment would load nothing
            self.call("Page.navigate", url=target)
            while self.read().get("method") != "Page.loadEventFired":
                pass

    def js(self, expression):
        """Value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def choose(self, control, value):
        """Set the <select> with the id `control` as a user does."""
        event = "new Event('change', {bubbles: true})"
        self.js(f"{{const c = document.getElementById('{control}'); c.value = '{value}'; c.dispatchEvent({event})}}")

    def point(self, x, y):
        """Move the mouse to (x, y)."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self):
        """PNG bytes of the visible part."""
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])


@contextlib.contextmanager
def open_page(profile, seconds=600):
    """A Page of a new browser with its profile in the folder `profile`. Skips the test where there is no browser."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None or os.name != "posix":
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    import fcntl

    # The browser reads descriptor 3 and writes 4. Descriptors from 10 on are not overwritten by that redirection.
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for pipe in (os.pipe(), os.pipe()) for end in pipe]
    commands, send, receive, answers = ends
    redirected = f'exec "$0" "$@" 3<&{commands} 4>&{answers}'
    process = subprocess.Popen(["bash", "-c", redirected, program, *FLAGS, f"--user-data-dir={profile}"],
                               pass_fds=(commands, answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env={**os.environ, "HOME": str(profile)})  # fmt: skip
    os.close(commands)
    os.close(answers)
    killer = threading.Timer(seconds, process.kill)
    killer.start()
    try:
        with os.fdopen(send, "wb") as send, os.fdopen(receive, "rb") as receive:
            try:
                page = Page(send, receive)
            except (EOFError, OSError):
                pytest.skip(f"no browser: {program} does not start here")
            yield page
            page.session = None
            page.call("Browser.close")
        process.wait()
    finally:
        killer.cancel()
        process.kill()
        process.wait()
