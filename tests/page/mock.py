"""A server that answers the page as `lowbit serve` would, by script: what the last message says decides."""

import http.server
import json
import math
import pathlib
import threading
import time

PAGE = pathlib.Path(__file__).parents[2] / "src/server/page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
KEY = "secret-key"

MARKDOWN = """# Title

Some **bold**, *italic* and `inline <b>code</b>` text with <script>alert(1)</script> in it, snake_case_name and 2 * 3 * 4.

1. First
   - inner one
   - inner two
2. Second, with code:

   ```rust
   fn main() {
       println!("1 < 2 && **not bold**");
   }
   ```

| name | bits |
| --- | --- |
| GPTQ | 4 |

> quoted
"""

WEATHER = '{"city": "Oslo", "days": 2}'


def logprob(probability):
    return math.log(probability)


class Mock(http.server.ThreadingHTTPServer):
    """`requests` are the bodies that came, `polls` how often metrics were read. With `needs_key`, routes need a key."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.polls, self.needs_key, self.has_template, self.refusals = [], 0, False, True, 0
        self.aborted = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def reply(self, status, kind, body, **headers):
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-security-policy", POLICY)
        self.send_header("x-content-type-options", "nosniff")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body.encode())

    def fail(self, status, message, param=None, **headers):
        error = {"message": message, "type": "invalid_request_error", "param": param, "code": None}
        self.reply(status, "application/json", json.dumps({"error": error}), **headers)

    def is_let_in(self):
        if not self.server.needs_key or self.headers["authorization"] == f"Bearer {KEY}":
            return True
        self.fail(401, "Incorrect API key provided, or none")
        return False

    def do_GET(self):
        file = PAGE / (self.path.lstrip("/") or "index.html")
        if file.is_file() and file.parent == PAGE:
            self.reply(200, TYPES[file.suffix], file.read_text())
        elif not self.is_let_in():
            return
        elif self.path == "/v1/models":
            card = {"id": "demo/model-4bit", "object": "model", "max_model_len": 4096}
            self.reply(200, "application/json", json.dumps({"object": "list", "data": [card]}))
        elif self.path == "/version":
            self.reply(200, "application/json", json.dumps({"version": "9.8.7"}))
        elif self.path == "/metrics":
            self.server.polls += 1
            self.reply(200, "application/openmetrics-text", metrics(self.server.polls))
        else:
            self.fail(404, "there is no such route")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not self.is_let_in():
            return
        self.server.requests.append((self.path, body))
        is_plain = self.path == "/v1/completions"
        last = body["prompt"] if is_plain else body["messages"][-1]["content"]
        if not is_plain and not self.server.has_template:
            self.fail(400, "messages: the model has no chat template; use /v1/completions with the text that it is to continue", "messages")
        elif last == "busy" and self.server.refusals == 0:
            self.server.refusals += 1
            self.fail(429, "There are too many requests.", retry_after="3")
        elif last == "wrong":
            self.fail(400, "temperature: expected 0 or more, got -1", "temperature")
        else:
            self.stream(body, last, is_plain)

    def stream(self, body, last, is_plain):
        self.reply(200, "text/event-stream", ": a comment\n\n")
        self.is_plain, self.sent = is_plain, 0
        if not is_plain:
            self.send({"role": "assistant", "content": ""})
        try:
            self.script(body, last)
        except OSError:
            self.server.aborted.set()
            return
        if last == "cut":
            return
        usage = {"prompt_tokens": 12, "completion_tokens": self.sent, "total_tokens": 12 + self.sent, "prompt_tokens_details": {"cached_tokens": 8}}
        self.event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def script(self, body, last):
        if last == "slow":
            for number in range(400):
                self.send({"content": f"word{number} "}, pause=0.05)
        elif last == "paced":
            for number in range(10):
                self.send({"content": f"{number} "}, pause=0.1)
        elif last == "markdown":
            # In pieces of seven characters, to be cut where it hurts.
            for at in range(0, len(MARKDOWN), 7):
                self.send({"content": MARKDOWN[at:at + 7]})
        elif last == "reason":
            for text in ("Let me ", "think."):
                self.send({"reasoning_content": text}, pause=0.2)
            self.send({"content": "Forty-two."})
        elif last == "tool":
            call = {"index": 0, "id": "call-1", "type": "function", "function": {"name": "get_weather", "arguments": ""}}
            self.send({"tool_calls": [call]})
            for at in range(0, len(WEATHER), 5):
                self.send({"tool_calls": [{"index": 0, "function": {"arguments": WEATHER[at:at + 5]}}]})
            self.send({}, finish="tool_calls")
            return
        elif last == "cut":
            self.send({"content": "Half an ans"})
            return
        elif last == "breaks":
            self.send({"content": "So far "})
            self.event({"error": {"message": "the model computed what is no number", "type": "internal_server_error"}})
            return
        elif body.get("logprobs"):
            self.tokens()
        else:
            for text in ("Hello", ", ", "wörld", " 👋."):
                self.send({"content": text}, pause=0.05)
        self.send({}, finish="length" if self.is_plain else "stop")

    def tokens(self):
        """Words of falling probability, and a character of two tokens, the first of which brings no text yet."""
        words = [("Dogs", "Dogs", 0.97), (" <b>chase</b>", " <b>chase</b>", 0.61), (" cats", " cats", 0.25), ("", "bytes:\\xf0\\x9f", 0.9), (" 🐕.", "bytes:\\x90\\x95", 0.8)]
        for text, token, probability in words:
            top = [(token, probability), ("Birds", 0.02), ("\n", 0.005)]
            if self.is_plain:
                logprobs = {"tokens": [token], "token_logprobs": [logprob(probability)], "top_logprobs": [{name: logprob(p) for name, p in top}]}
            else:
                named = [{"token": name, "logprob": logprob(p), "bytes": None} for name, p in top]
                logprobs = {"content": [{**named[0], "top_logprobs": named}]}
            self.send({"content": text} if text else {}, logprobs=logprobs)

    def send(self, delta, logprobs=None, finish=None, pause=0.0):
        choice = {"index": 0, "logprobs": logprobs, "finish_reason": finish}
        choice.update({"text": delta.get("content", "")} if self.is_plain else {"delta": delta})
        self.sent += bool(delta) and "role" not in delta
        self.event({"choices": [choice]})
        time.sleep(pause)

    def event(self, value):
        data = f"data: {json.dumps(value, ensure_ascii=False)}\r\n\r\n".encode()
        # Cut in the middle, perhaps of a character.
        for part in (data[:len(data) // 2], data[len(data) // 2:]):
            self.wfile.write(part)
            self.wfile.flush()


def metrics(step):
    """Metrics that move: of each reading, 30 tokens generated, and two first tokens, in 0.05 to 0.25 s and under 0.05 s."""
    label = 'model_name="demo, \\"4}bit\\""'
    lines = ["# TYPE lowbit:num_requests_running gauge"]
    values = {
        "num_requests_running": 1 + step % 3, "num_requests_waiting": step % 2, "kv_cache_usage_perc": 0.1 * (step % 9),
        "prefix_cache_queries_total": 100 * step, "prefix_cache_hits_total": 25 * step,
        "prompt_tokens_total": 100 * step, "generation_tokens_total": 30 * step, "num_preemptions_total": 3,
    }
    lines += [f"lowbit:{name}{{{label}}} {value}" for name, value in values.items()]
    for name, bounds in (("time_to_first_token_seconds", (0.05, 0.25)), ("inter_token_latency_seconds", (0.01, 0.02))):
        full = f"lowbit:{name}"
        lines += [f'{full}_bucket{{le="{bounds[0]}",{label}}} {step}', f'{full}_bucket{{le="{bounds[1]}",{label}}} {2 * step}',
                  f'{full}_bucket{{le="+Inf",{label}}} {2 * step}', f"{full}_sum{{{label}}} {step * bounds[1]}", f"{full}_count{{{label}}} {2 * step}"]
    return "\n".join([*lines, "# EOF", ""])
