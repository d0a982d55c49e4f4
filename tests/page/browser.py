"""A headless Chromium, spoken to in its DevTools protocol over a pipe: no driver, no library."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time

TIMEOUT_S = 15

# What a page's own listeners would not tell: violations of its content security policy.
WATCH_POLICY = """addEventListener('securitypolicyviolation', (event) =>
  console.error(`policy: ${event.violatedDirective} of ${event.blockedURI} in ${event.sourceFile}:${event.lineNumber}`));"""


class Browser:
    """One browser with one page. `complaints` are its errors and warnings on the console."""

    def __init__(self, binary):
        self.profile = tempfile.mkdtemp(prefix="lowbit-page-")
        to_browser, self.write_end = (fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in os.pipe())
        self.read_end, from_browser = (fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in os.pipe())

        def place_pipes():
            os.dup2(to_browser, 3)
            os.dup2(from_browser, 4)

        flags = ["--headless=new", "--remote-debugging-pipe", f"--user-data-dir={self.profile}", "--no-first-run", "--disable-gpu"]
        if os.geteuid() == 0:
            flags.append("--no-sandbox")
        self.process = subprocess.Popen([binary, *flags], preexec_fn=place_pipes, pass_fds=(3, 4), stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        self.answers, self.complaints, self.session, self.last_id = {}, [], None, 0
        self.changed = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.addScriptToEvaluateOnNewDocument", source=WATCH_POLICY)

    def _read(self):
        rest = b""
        while data := os.read(self.read_end, 1 << 16):
            *messages, rest = (rest + data).split(b"\0")
            for message in map(json.loads, messages):
                with self.changed:
                    self._take(message)
                    self.changed.notify_all()

    def _take(self, message):
        if "id" in message:
            self.answers[message["id"]] = message
            return
        method, params = message["method"], message.get("params", {})
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(" ".join(str(arg.get("value", arg.get("description"))) for arg in params["args"]))
        elif method == "Log.entryAdded":
            entry = params["entry"]
            # A response that is an error is listed too, which the tests ask for.
            if entry["level"] in ("error", "warning") and entry["source"] != "network":
                self.complaints.append(entry["text"])

    def call(self, method, **params):
        """The result of a command."""
        self.last_id += 1
        message = {"id": self.last_id, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        with self.changed:
            if not self.changed.wait_for(lambda: message["id"] in self.answers, TIMEOUT_S):
                raise TimeoutError(f"{method}: no answer")
            answer = self.answers.pop(message["id"])
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def run(self, expression):
        """The value of a JavaScript expression in the page; promises are waited for."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails']['exception'].get('description')}")
        return result["result"].get("value")

    def wait(self, expression, timeout=TIMEOUT_S):
        """Waits until an expression is true, and returns its value."""
        end = time.monotonic() + timeout
        while True:
            if value := self.run(expression):
                return value
            if time.monotonic() > end:
                raise AssertionError(f"did not come true: {expression}\n{self.run('document.body.innerText')}")
            time.sleep(0.03)

    def open(self, url):
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def key(self, key, shift=False):
        """Presses a key, as Enter, Escape, Tab, ArrowRight."""
        codes = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowLeft": 37, "ArrowRight": 39}
        event = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key], "modifiers": 8 if shift else 0}
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **event, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def type(self, selector, text):
        """Puts text in a field as a keyboard would."""
        self.run(f"(() => {{ const field = document.querySelector({json.dumps(selector)}); field.focus(); field.select(); }})()")
        self.call("Input.insertText", text=text)

    def click(self, selector, text=""):
        """Clicks the last element of a selector that contains the text."""
        found = f"[...document.querySelectorAll({json.dumps(selector)})].findLast((e) => e.textContent.includes({json.dumps(text)}))"
        self.wait(f"Boolean({found})")
        self.run(f"{found}.click()")

    def hover(self, selector):
        """Moves the mouse to the first element of a selector."""
        box = self.run(f"(() => {{ const box = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
                       " return [box.x + box.width / 2, box.y + box.height / 2]; })()")
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])

    def resize(self, width, height):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def scheme(self, name):
        """Prefers `light` or `dark`."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def screenshot(self, path):
        data = self.call("Page.captureScreenshot", format="png")["data"]
        with open(path, "wb") as file:
            file.write(base64.b64decode(data))

    def close(self):
        self.process.terminate()
        self.process.wait()
        shutil.rmtree(self.profile, ignore_errors=True)
