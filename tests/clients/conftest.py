"""One server for all tests: the demo model on the CPU, with calls in the format of Hermes models."""

import contextlib
import os
import re
import signal
import subprocess
import time
import urllib.request

import pytest

MODEL = "assets/books-6m-gptq"


@contextlib.contextmanager
def served(*flags, opener=urllib.request.urlopen):
    """The URL of a server that ends with the block."""
    args = ["serve", MODEL, "--device", "cpu", "--port", "0", "--max-model-len", "1024", "--max-num-seqs", "8", *flags]
    env = {name: value for name, value in os.environ.items() if not name.startswith("LOWBIT_")}
    server = subprocess.Popen([os.environ["LOWBIT"], *args], stderr=subprocess.PIPE, text=True, env=env)
    try:
        url = re.fullmatch(r"listening on (\S+)", server.stderr.readline().strip()).group(1)
        # What follows is not waited for, so that the server never waits for us.
        subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while True:
            try:
                opener(url + "/ready", timeout=5)
                break
            except OSError:
                assert time.monotonic() < deadline, "it is never ready"
                time.sleep(0.1)
        yield url
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=30) == 0
    finally:
        server.kill()


@pytest.fixture(scope="session")
def base_url():
    flags = ["--api-key", "sesame", "--tool-call-parser", "hermes", "--served-model-name", "demo"]
    with served(*flags) as url:
        yield url
