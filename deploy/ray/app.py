"""Replicas of `lowbit serve` under Ray Serve.

    serve run app:build model=/models/llama max_replicas=4

Each replica is an actor that runs the binary on a Unix socket of its own; an ingress in front of them passes requests
on and answers back, byte by byte as they come. Ray scales the replicas by the requests under way, routes each request to
the less busy of two, and replaces replicas that fail.

A request is sent again to another replica only while no server can have begun it: one that has made a server fail must
not take the next one down too.
"""

import asyncio
import json
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Collection, Iterable
from dataclasses import dataclass

import aiohttp
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

logger = logging.getLogger("ray.serve")

# Headers that belong to one connection.
HOP_BY_HOP = {
    "connection", "expect", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
    "transfer-encoding", "upgrade",
}  # fmt: skip

# Headers that Serve writes into every response.
FROM_SERVE = {"date", "server", "x-request-id"}


class Settings(BaseModel):
    """Arguments of the application, on the command line of `serve run` as KEY=VALUE or under `args` of a config file."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(min_length=1)
    """Model directory or hub id."""
    serve_args: str = ""
    """Further flags of `lowbit serve`, as in a shell."""
    binary: str = "lowbit"
    """Program, in PATH or with its path."""
    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(1, ge=1)
    target_ongoing_requests: float = Field(32, gt=0)
    """Requests under way on each replica that scaling aims at."""
    max_ongoing_requests: int = Field(256, ge=1)
    """Requests that a replica is given at once; best what --max-num-seqs is. Others wait where any replica can take them."""
    max_queued_requests: int = Field(1024, ge=-1)
    """Requests that may wait; what comes then is answered 429. -1 is without a limit."""
    max_body_mib: int = Field(16, ge=1, le=1024)
    """Largest body of a request in MiB."""
    ingress_replicas: int = Field(1, ge=1)
    gpus: float = Field(1, ge=0, le=1)
    """GPUs of each replica; 0 is the CPU. One server uses one GPU."""
    cpus: float = Field(1, ge=0)
    """CPUs that Ray sets aside for each replica."""
    startup_timeout: float = Field(1800, gt=0)
    """Seconds for a model to load."""
    shutdown_timeout: int = Field(30, ge=0)
    """Seconds that requests have to end when a replica is stopped."""
    retry_timeout: float = Field(30, ge=0)
    """Seconds for which a request that no server has begun is offered to others."""

    @model_validator(mode="after")
    def check(self) -> "Settings":
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} exceeds max_replicas {self.max_replicas}")
        own = [flag for flag in ("--uds", "--host", "--port", "--shutdown-timeout", "--max-body-mib") if flag in self.flags()]
        if own:
            raise ValueError(f"serve_args: {', '.join(own)} is set by the application")
        return self

    def flags(self) -> list[str]:
        return [word.split("=", 1)[0] for word in shlex.split(self.serve_args)]


@dataclass
class Call:
    """An HTTP request on its way to a server."""

    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes


@dataclass
class Head:
    """How a response begins."""

    status: int
    headers: list[tuple[str, str]]


SENDING = "sending"  # From here on a server may have begun the request.
REFUSED = "refused"  # No server has begun it.


@serve.deployment
class Replica:
    """One server process, and the way to it."""

    async def __init__(self, settings: Settings):
        self._settings = settings
        self._dir = tempfile.mkdtemp(prefix="lowbit-")
        self._socket = os.path.join(self._dir, "socket")
        # The system ends the server when the replica dies without a word.
        command = ["setpriv", "--pdeathsig", "TERM", "--", settings.binary]
        command += ["serve", settings.model, *shlex.split(settings.serve_args)]
        command += ["--uds", self._socket, "--shutdown-timeout", str(settings.shutdown_timeout)]
        command += ["--max-body-mib", str(settings.max_body_mib)]
        self._server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        self._http = aiohttp.ClientSession(
            # A connection for each request: one that is kept may have ended when the next request is sent on it.
            connector=aiohttp.UnixConnector(self._socket, limit=0, force_close=True),
            # How long a request may take is the server's affair.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
            auto_decompress=False,
        )
        try:
            await self._wait_until_ready()
        except BaseException:
            await self._stop()
            raise
        self._watch = asyncio.create_task(self._leave_with_server())

    async def _wait_until_ready(self) -> None:
        end = time.monotonic() + self._settings.startup_timeout
        while await self._probe("/ready") != 200:
            if (status := self._server.poll()) is not None:
                raise RuntimeError(f"`{shlex.join(self._server.args)}` ended with status {status} before it was ready")
            if time.monotonic() > end:
                raise RuntimeError(f"the server was not ready within {self._settings.startup_timeout} s")
            await asyncio.sleep(0.1)

    async def _probe(self, path: str) -> int | None:
        """Status of a GET; None where nobody answers."""
        try:
            async with self._http.get(f"http://localhost{path}", timeout=aiohttp.ClientTimeout(total=10)) as response:
                return response.status
        except (aiohttp.ClientError, TimeoutError, OSError):
            return None

    async def _leave_with_server(self) -> None:
        """Ends the actor when its server has ended: an idle replica that refuses everything would attract all requests."""
        while self._server.poll() is None:
            await asyncio.sleep(0.05)
        logger.error("the server ended with status %s; the replica ends too", self._server.returncode)
        # Requests that were under way are still told so.
        await asyncio.sleep(0.5)
        shutil.rmtree(self._dir, ignore_errors=True)
        os._exit(1)

    async def check_health(self) -> None:
        if (status := await self._probe("/health")) != 200:
            raise RuntimeError(f"GET /health: {status or 'no answer'}")

    async def forward(self, call: Call) -> AsyncIterator[str | Head | bytes]:
        """Yields SENDING, then REFUSED or the response: its head and its body in pieces, as they come."""
        yield SENDING
        if self._server.poll() is not None:
            yield REFUSED
            return
        try:
            response = await self._http.request(
                call.method, f"http://localhost{call.path}", headers=call.headers, data=call.body or None, allow_redirects=False
            )
        except aiohttp.ClientConnectorError:
            yield REFUSED
            return
        async with response:
            headers = kept(response.headers.items(), but=FROM_SERVE)
            yield Head(response.status, [*headers, ("x-served-by", os.path.basename(self._dir))])
            async for piece in response.content.iter_any():
                yield piece

    async def _stop(self) -> None:
        """Lets the server finish what it has begun, then ends it."""
        await self._http.close()
        self._server.terminate()
        end = time.monotonic() + self._settings.shutdown_timeout + 5
        while self._server.poll() is None and time.monotonic() < end:
            await asyncio.sleep(0.05)
        self._server.kill()
        self._server.wait()
        shutil.rmtree(self._dir, ignore_errors=True)

    async def __del__(self):
        # Ray calls this when the replica has no requests any more, or at the end of its grace period.
        if watch := getattr(self, "_watch", None):
            watch.cancel()
            await self._stop()


@serve.deployment
class Ingress:
    """Takes requests and hands them to replicas."""

    def __init__(self, settings: Settings, replicas: DeploymentHandle):
        self._settings = settings
        self._replicas = replicas.options(method_name="forward", stream=True)

    async def __call__(self, request: Request) -> Response:
        path = request.url.path
        if path == "/metrics":
            return failure(
                404, "servers have metrics of their own, and Ray those of the application; see docs/scaling.md", "not_found"
            )
        if request.url.query:
            path += f"?{request.url.query}"
        if (body := await self._body(request)) is None:
            return failure(413, f"the body has more than {self._settings.max_body_mib} MiB", "too_large")
        call = Call(request.method, path, kept(request.headers.items()), body)
        end = time.monotonic() + self._settings.retry_timeout
        while True:
            items = self._replicas.remote(call)
            sending = False
            try:
                sending = await anext(items) == SENDING
                head = await anext(items)
            except BackPressureError:
                return failure(429, "too many requests are waiting; try again later", "queue_full")
            except (RayActorError, DeploymentUnavailableError) as error:
                if sending:
                    return failure(502, f"the replica that had the request failed: {type(error).__name__}", "replica_failed")
                head = REFUSED
            except aiohttp.ClientError as error:
                return failure(502, f"the server that had the request failed: {type(error).__name__}", "replica_failed")
            if isinstance(head, Head):
                return passed_on(head, items)
            if time.monotonic() > end:
                return failure(503, "no replica takes requests", "unavailable")
            await asyncio.sleep(0.1)

    async def _body(self, request: Request) -> bytes | None:
        """The body; None where it is too large."""
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > self._settings.max_body_mib << 20:
                return None
        return bytes(body)


def passed_on(head: Head, items: AsyncIterator[bytes]) -> Response:
    """The rest of a response, as it comes."""
    is_events = any(name.lower() == "content-type" and "text/event-stream" in value for name, value in head.headers)

    async def body() -> AsyncIterator[bytes]:
        try:
            async for piece in items:
                yield piece
        except (RayActorError, aiohttp.ClientError) as error:
            if not is_events:
                raise  # The connection breaks, so that nobody takes a part for the whole.
            text = error_object(f"the server that had the request failed: {type(error).__name__}", "replica_failed")
            yield f"\n\ndata: {json.dumps(text)}\n\n".encode()

    response = StreamingResponse(body(), status_code=head.status)
    response.raw_headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in head.headers]
    return response


def kept(headers: Iterable[tuple[str, str]], but: Collection[str] = ()) -> list[tuple[str, str]]:
    """Headers that go on to the next hop, without those named in `but`."""
    return [(name, value) for name, value in headers if name.lower() not in HOP_BY_HOP and name.lower() not in but]


def error_object(message: str, code: str) -> dict:
    return {"error": {"message": message, "type": "server_error", "param": None, "code": code}}


def failure(status: int, message: str, code: str) -> Response:
    return JSONResponse(error_object(message, code), status_code=status)


def build(settings: Settings) -> serve.Application:
    """The application."""
    replicas = Replica.options(
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        max_ongoing_requests=settings.max_ongoing_requests,
        max_queued_requests=settings.max_queued_requests,
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "initial_replicas": max(settings.min_replicas, 1),
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": settings.target_ongoing_requests,
        },
        health_check_period_s=5,
        health_check_timeout_s=15,
        # Once while requests end, once more for the server's own end.
        graceful_shutdown_timeout_s=2 * settings.shutdown_timeout + 10,
    ).bind(settings)
    ingress = Ingress.options(
        num_replicas=settings.ingress_replicas,
        ray_actor_options={"num_cpus": 0},
        # It only passes on; what limits is what the replicas take.
        max_ongoing_requests=100_000,
        graceful_shutdown_timeout_s=settings.shutdown_timeout + 10,
    )
    return ingress.bind(settings, replicas)
