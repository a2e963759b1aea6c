"""A real S3 service on loopback (moto's server), and a proxy before it that misbehaves by a schedule."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BUCKET = "bucket"
KEYS = {"key": "test", "secret": "test"}

# What a proxy does with a request: (method, path, number of the request) -> one of FAULTS, or "".
Schedule = Callable[[str, str, int], str]
FAULTS = ("500 before", "503 before", "409 before", "500 after", "cut after")


@contextmanager
def s3_server() -> Iterator[int]:
    """The port of a fresh moto server with an empty bucket."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        port = server.get_host_and_port()[1]
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("POST", "/moto-api/reset")
        connection.getresponse().read()
        connection.request(
            "PUT",
            f"/{BUCKET}",
            headers={"Authorization": "AWS4-HMAC-SHA256 Credential=test/x/us-east-1/s3/aws4_request"},
        )
        connection.getresponse().read()
        yield port
    finally:
        server.stop()


class Proxy:
    """Forwards to the server; ``schedule`` says which requests fail, before or after they did their work."""

    def __init__(self, port: int, schedule: Schedule = lambda method, path, n: "") -> None:
        proxy = self
        self.schedule, self.requests, self._lock = schedule, 0, threading.Lock()
        self.faults = 0

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def handle_any(self) -> None:
                with proxy._lock:
                    proxy.requests += 1
                    fault = proxy.schedule(self.command, self.path, proxy.requests)
                    proxy.faults += bool(fault)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if fault.endswith("before"):
                    return self.fail(int(fault[:3]))
                connection = http.client.HTTPConnection("127.0.0.1", port)
                connection.request(self.command, self.path, body, dict(self.headers))
                response = connection.getresponse()
                data = response.read()
                if fault == "cut after":
                    self.close_connection = True
                    return None
                if fault.endswith("after"):
                    return self.fail(int(fault[:3]))
                self.send_response(response.status)
                for name, value in response.getheaders():
                    if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                        self.send_header(name, value)
                if "Content-Length" not in response.headers:
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)
                return None

            def fail(self, status: int) -> None:
                code = {409: "ConditionalRequestConflict", 503: "SlowDown"}.get(status, "InternalError")
                data = f"<Error><Code>{code}</Code><Message>scheduled</Message></Error>".encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def options(port: int) -> dict[str, Any]:
    """What s3fs is told: this server, no retries of its own beyond one."""
    return KEYS | {
        "client_kwargs": {"endpoint_url": f"http://127.0.0.1:{port}", "region_name": "us-east-1"},
        "config_kwargs": {"retries": {"max_attempts": 0}},
        "skip_instance_cache": True,
    }


def environment(port: int) -> dict[str, str]:
    """The same for a command."""
    return {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    }
