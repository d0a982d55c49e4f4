"""Three replicas on the CPU with the demo model: answers, streams, and what happens when a server or an actor is killed.

    LOWBIT_BINARY=target/release/lowbit pytest deploy/ray/test_app.py

The application is asked over the loopback address alone, and every wait has an end. (Ray's own processes talk to each
other on ports of the machine while the test runs.)
"""

import asyncio
import json
import os
import pathlib
import shutil
import signal
import socket
import sys
import tempfile
import time

import aiohttp
import pytest

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MODEL = ROOT / "assets" / "books-6m-gptq"
BINARY = os.environ.get("LOWBIT_BINARY") or str(ROOT / "target" / "release" / "lowbit")
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    PORT = probe.getsockname()[1]
URL = f"http://127.0.0.1:{PORT}"
KEY = "key-of-the-test"
REPLICAS = 3
# Names the servers of this run among all processes of the machine.
NAME = f"books-{os.getpid()}"
HEADERS = {"authorization": f"Bearer {KEY}"}

sys.path.insert(0, str(HERE))
if not shutil.which(BINARY):
    pytest.skip(f"no binary at {BINARY}: build it, or name one in LOWBIT_BINARY", allow_module_level=True)

import app  # noqa: E402
import ray  # noqa: E402
from ray import serve  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def application():
    # Replicas are processes of Ray's, which take over what is here.
    os.environ.update(PYTHONPATH=str(HERE), LOWBIT_API_KEY=KEY, RAYON_NUM_THREADS="1")
    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=100 << 20,
        log_to_driver=bool(os.environ.get("LOWBIT_TEST_VERBOSE")),
    )
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    settings = app.Settings(
        model=str(MODEL),
        binary=BINARY,
        serve_args=f"--served-model-name {NAME} --device cpu --kv-cache-memory-bytes 64M --access-log off",
        min_replicas=REPLICAS,
        max_replicas=REPLICAS,
        gpus=0,
        cpus=0,
        startup_timeout=120,
        shutdown_timeout=60,
    )
    serve.run(app.build(settings), name="lowbit")
    yield
    serve.shutdown()
    ray.shutdown()
    assert servers() == {}, "servers outlived the application"


def servers() -> dict[str, int]:
    """Name and process of every server that runs."""
    found = {}
    for proc in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            words = (proc / "cmdline").read_text().split("\0")
            dead = "\nState:\tZ" in (proc / "status").read_text()
        except OSError:
            continue
        if NAME in words and words[0] == BINARY and not dead:
            found[pathlib.Path(words[words.index("--uds") + 1]).parent.name] = int(proc.name)
    return found


def actor_of(server: int) -> int:
    """Process of the replica that started a server."""
    status = pathlib.Path(f"/proc/{server}/status").read_text()
    return int(status.split("PPid:\t")[1].split("\n")[0])


async def wait_for(what: str, condition, seconds: float):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.1)
    return value


def session(seconds: float = 120) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(force_close=True)
    return aiohttp.ClientSession(URL, headers=HEADERS, connector=connector, timeout=aiohttp.ClientTimeout(total=seconds))


def body(max_tokens: int, **more) -> dict:
    prompt = "It was a dark night, and the old man"
    return {"model": NAME, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **more}


class Stream:
    """A streamed completion: where it ran, when its pieces came, and how it ended."""

    def __init__(self):
        self.server = None
        self.status = None
        self.texts: list[str] = []
        self.times: list[float] = []
        self.done = False
        self.error = None
        self.started = time.monotonic()

    async def run(self, http: aiohttp.ClientSession, max_tokens: int) -> "Stream":
        try:
            async with http.post("/v1/completions", json=body(max_tokens, stream=True)) as response:
                self.status, self.server = response.status, response.headers.get("x-served-by")
                async for line in response.content:
                    if not line.startswith(b"data: "):
                        continue
                    data = line.removeprefix(b"data: ").strip()
                    if data == b"[DONE]":
                        self.done = True
                        break
                    event = json.loads(data)
                    if error := event.get("error"):
                        self.error = error["code"]
                        break
                    self.times.append(time.monotonic())
                    self.texts.append(event["choices"][0]["text"])
        except aiohttp.ClientError as error:
            self.error = type(error).__name__
        return self


def test_answers_are_those_of_one_server():
    async def ask():
        async with session() as http:
            answers = await asyncio.gather(*(one(http) for _ in range(8)))
            stream = await Stream().run(http, 32)
            async with http.post("/detokenize", json={"model": NAME, "tokens": greedy}) as response:
                return answers, stream, (await response.json())["prompt"]

    async def one(http):
        async with http.post("/v1/completions", json=body(32)) as response:
            assert response.status == 200, await response.text()
            answer = await response.json()
            assert answer["usage"]["completion_tokens"] == 32
            return answer["choices"][0]["text"], response.headers["x-served-by"]

    # The tokens that another implementation gives (golden.json beside the model).
    golden = json.loads((MODEL / "golden.json").read_text())["prompts"][0]
    assert golden["prompt"] == body(1)["prompt"]
    greedy = golden["greedy_ids"][:32]
    answers, stream, expected = asyncio.run(ask())
    assert {server for _, server in answers} <= set(servers())
    assert len({server for _, server in answers}) > 1, "all eight went to one replica"
    assert {text for text, _ in answers} == {expected}
    assert stream.done and "".join(stream.texts) == expected


def test_streams_come_in_pieces():
    async def ask():
        async with session() as http:
            return await Stream().run(http, 400)

    stream = asyncio.run(ask())
    assert stream.done and stream.status == 200
    took = stream.times[-1] - stream.started
    assert len(set(stream.times)) > 50
    assert stream.times[0] - stream.started < took / 2, "the first piece came late: the stream was held back"


def test_a_client_that_leaves_ends_its_request():
    async def leave():
        async with session() as http:
            async with http.post("/v1/completions", json=body(1900, stream=True)) as response:
                await response.content.readany()
                server = response.headers["x-served-by"]
            async with asyncio.timeout(5):
                while await running(server) > 0:
                    await asyncio.sleep(0.05)

    before = asyncio.run(total_of_length())
    asyncio.run(leave())
    assert asyncio.run(total_of_length()) == before, "the request went on to its end"


async def metric(server: str, name: str, otherwise: float | None = None) -> float:
    path = str(pathlib.Path(tempfile.gettempdir(), server, "socket"))
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(path), headers=HEADERS) as http:
        async with http.get("http://localhost/metrics") as response:
            for line in (await response.text()).splitlines():
                if line.startswith(f"{name} "):
                    return float(line.rsplit(" ", 1)[1])
    assert otherwise is not None, f"no metric {name}"
    return otherwise


async def running(server: str) -> float:
    return await metric(server, 'lowbit:num_requests_running{model_name="%s"}' % NAME)


async def total_of_length() -> float:
    name = 'lowbit:request_success_total{model_name="%s",finished_reason="length"}' % NAME
    return sum([await metric(server, name, 0) for server in servers()])


@pytest.mark.parametrize("victim_is", ["server", "actor"])
def test_a_kill_under_load_costs_only_what_was_in_flight_there(victim_is):
    clients, rounds_after = 12, 3

    async def load(http, killed, streams, plain):
        """Asks again and again until the kill, then a few times more."""
        left = rounds_after
        while left > 0:
            left -= killed.is_set()
            started = time.monotonic()
            async with http.post("/v1/completions", json=body(8)) as response:
                plain.append((started, response.status))
            streams.append(Stream())
            await streams[-1].run(http, 64)

    async def kill(killed, streams):
        def open_at():
            found = [stream.server for stream in streams if stream.texts and not stream.done and not stream.error]
            return found if len(found) > clients // 2 else None

        found = await wait_for("streams under way", open_at, 60)
        # The one with the most to lose.
        victim = max(set(found), key=found.count)
        process = servers()[victim]
        os.kill(process if victim_is == "server" else actor_of(process), signal.SIGKILL)
        killed.set()
        return victim, time.monotonic()

    async def all_of_it():
        streams, plain, killed = [], [], asyncio.Event()
        async with session() as http, asyncio.timeout(120):
            work = [load(http, killed, streams, plain) for _ in range(clients)]
            (victim, at), *_ = await asyncio.gather(kill(killed, streams), *work)
        return streams, plain, victim, at

    asyncio.run(wait_for_replicas())
    streams, plain, victim, at = asyncio.run(all_of_it())
    failed = [stream for stream in streams if not (stream.done and stream.status == 200)]
    assert failed, "nothing was in flight where the kill was"
    for stream in failed:
        assert stream.started < at, f"began after the kill and failed: {vars(stream)}"
        # A stream that had not begun to answer does not know its server; Ray knows that the server had it.
        assert stream.server == victim or stream.status == 502, vars(stream)
        assert stream.server != victim or stream.error, "a stream that was cut ended as if it were whole"
    assert sum(stream.started > at for stream in streams) >= clients * (rounds_after - 1)
    for started, status in plain:
        assert status == 200 or (started < at and status == 502), (started - at, status)
    # Ray replaces what was lost, and nothing of it is left.
    now = asyncio.run(wait_for_replicas())
    assert victim not in now


async def wait_for_replicas():
    return await wait_for(f"{REPLICAS} servers", lambda: (found := servers()) and len(found) == REPLICAS and found, 240)


def test_refusals_of_the_server_come_through():
    async def ask():
        async with session() as http:
            for path, headers, status in [
                ("/v1/models", {}, 200),
                ("/v1/models", {"authorization": "Bearer wrong"}, 401),
                ("/nowhere", {}, 404),
                ("/metrics", {}, 404),
                ("/health", {}, 200),
            ]:
                async with http.get(path, headers=headers) as response:
                    assert response.status == status, (path, await response.text())
            async with http.post("/v1/completions", json=body(0)) as response:
                assert response.status == 400
                assert (await response.json())["error"]["param"] == "max_tokens"
            async with http.post("/v1/completions", data=b" " * ((16 << 20) + 1)) as response:
                assert response.status == 413

    asyncio.run(ask())


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": ""},
        {"model": "m", "min_replicas": 3, "max_replicas": 2},
        {"model": "m", "serve_args": "--uds /tmp/x"},
        {"model": "m", "serve_args": "--port=1"},
        {"model": "m", "gpus": 2},
        {"model": "m", "replicas": 2},
    ],
)
def test_settings_that_cannot_be(wrong):
    with pytest.raises(ValueError):
        app.Settings(**wrong)


def test_shutdown_lets_streams_end():
    """The last one: it takes the application down."""

    async def drain():
        async with session() as http:
            stream = Stream()
            work = asyncio.create_task(stream.run(http, 500))
            async with asyncio.timeout(30):
                while len(stream.times) < 10:
                    await asyncio.sleep(0.02)
            assert not stream.done
            await asyncio.to_thread(serve.delete, "lowbit")
            return await work

    asyncio.run(wait_for_replicas())
    stream = asyncio.run(drain())
    assert stream.done and not stream.error
    assert servers() == {}
