"""The dashboard and the alerts against what a server tells: every name is there, none is left out, every panel shows something.

    LOWBIT_BINARY=target/release/lowbit pytest deploy/grafana

A server with the demo model answers a few requests; a Prometheus, where there is one in PATH, scrapes it and evaluates
every panel. Both listen on the loopback address alone, for less than a minute.
"""

import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request

import pytest

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BINARY = os.environ.get("LOWBIT_BINARY") or str(ROOT / "target" / "release" / "lowbit")
NAMES = re.compile(r"(?:lowbit:|\bhttp_)\w+")
DASHBOARD = json.loads((HERE / "dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def get(url: str, data: dict | None = None) -> str:
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(url, body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return response.read().decode()


def wait_for(url: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            get(url)
            return
        except OSError:
            assert time.monotonic() < end, f"{url}: no answer within {seconds} s"
            time.sleep(0.2)


@pytest.fixture(scope="module")
def server():
    if not shutil.which(BINARY):
        pytest.skip(f"no binary at {BINARY}: build it, or name one in LOWBIT_BINARY")
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [BINARY, "serve", str(ROOT / "assets" / "books-6m-gptq"), "--port", str(port), "--device", "cpu"]
    command += ["--kv-cache-memory-bytes", "64M", "--access-log", "off"]
    with subprocess.Popen(command, env=os.environ | {"RAYON_NUM_THREADS": "1"}) as process:
        try:
            wait_for(f"{url}/ready", 60)
            yield url
        finally:
            process.terminate()


def families(server: str) -> set[str]:
    text = get(f"{server}/metrics")
    return set(re.findall(r"^# TYPE (\S+)", text, re.M))


def family(name: str) -> str:
    return re.sub(r"_(total|bucket|sum|count)$", "", name)


def test_every_name_is_one_that_the_server_tells(server):
    # One request each of what has labels of its own.
    get(f"{server}/v1/completions", {"prompt": "It was", "max_tokens": 4})
    told = families(server)
    alerts = (HERE.parent / "prometheus" / "alerts.yml").read_text()
    for text in [*(expression for _, expression in EXPRESSIONS), *re.findall(r"expr: (.*(?:\n {10,}.*)*)", alerts)]:
        for name in NAMES.findall(text):
            assert family(name) in told, f"{name} in: {text}"


def test_every_family_is_on_the_dashboard(server):
    shown = {family(name) for _, text in EXPRESSIONS for name in NAMES.findall(text)}
    assert families(server) - shown == set()


def test_panels_do_not_overlap():
    cells = {}
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert cells.setdefault((x, y), panel["title"]) == panel["title"]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_every_panel_shows_something(server, tmp_path):
    if not (prometheus := shutil.which("prometheus")):
        pytest.skip("no prometheus in PATH")
    target = server.removeprefix("http://")
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(HERE.parent / "prometheus" / "alerts.yml")],
        "scrape_configs": [{"job_name": "lowbit", "static_configs": [{"targets": [target]}]}],
    }
    (tmp_path / "prometheus.yml").write_text(json.dumps(config))
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [prometheus, f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    with subprocess.Popen(command) as process:
        try:
            wait_for(f"{url}/-/ready", 30)
            for _ in range(6):
                get(f"{server}/v1/completions", {"prompt": "It was a dark night", "max_tokens": 16})
                time.sleep(1)
            # Queries take their time on a busy machine, and all look at the same moment.
            at = time.time()
            found = query(url, "up", at)
            assert [result["value"][1] for result in found] == ["1"], found
            for title, expression in EXPRESSIONS:
                text = expression.replace("$__rate_interval", "1m")
                text = re.sub(r'=~"\$\w+"', '=~".*"', text)
                values = [float(result["value"][1]) for result in query(url, text, at)]
                assert values and all(value == value for value in values), f"{title}: {text} gives {values}"
            rules = json.loads(get(f"{url}/api/v1/rules"))["data"]["groups"][0]["rules"]
            assert [(rule["name"], rule.get("lastError"), rule["health"]) for rule in rules if rule["health"] != "ok"] == []
        finally:
            process.terminate()


def query(url: str, expression: str, at: float) -> list:
    answer = json.loads(get(f"{url}/api/v1/query?{urllib.parse.urlencode({'query': expression, 'time': at})}"))
    assert answer["status"] == "success", expression
    return answer["data"]["result"]
