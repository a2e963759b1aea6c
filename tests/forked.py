"""Starts commands by forking a process that has imported what they import: most of a command's second is torch.

What runs is the entry point as typed, in a process of its own with its own folder, environment, files and signals.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, Any

WIDTH = 16
SERVED = "ENSEMBLE_DISTILL_TEST_SOCKET"


class Forked:
    """A started command; the part of ``subprocess.Popen`` that tests use. Output goes to files, not through pipes."""

    def __init__(self, args: list[str], pid: int, status: int, files: tuple[IO[bytes], ...]) -> None:
        self.args, self.pid = args, pid
        self.returncode: int | None = None
        self._status, self._files = status, files

    def poll(self) -> int | None:
        return self._wait(0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._wait(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        texts = [Path(file.name).read_text() for file in self._files]
        return texts[0], texts[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def _wait(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            self.returncode = int(os.read(self._status, 64))
            os.close(self._status)
        return self.returncode


class Server:
    """The process that is forked. ``env``: the environment that its libraries are loaded under."""

    def __init__(self, env: dict[str, str]) -> None:
        self._socket, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=env | {SERVED: str(theirs.fileno())}, pass_fds=[theirs.fileno()]
        )
        theirs.close()

    def start(self, args: list[str], cwd: Path, env: dict[str, str]) -> Forked:
        files = tempfile.NamedTemporaryFile(), tempfile.NamedTemporaryFile()  # noqa: SIM115
        status, theirs = os.pipe()
        request = json.dumps({"args": args, "cwd": str(cwd), "env": env}).encode()
        handles = [files[0].fileno(), files[1].fileno(), theirs]
        socket.send_fds(self._socket, [len(request).to_bytes(4, "little")], handles)
        self._socket.sendall(request)
        os.close(theirs)
        pid = int(os.read(status, WIDTH))
        return Forked(args, pid, status, files)

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


def serve(connection: socket.socket) -> list[str]:
    """Fork at each request, for ever; returns in the forked process, which is then the command."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        head, handles, _, _ = socket.recv_fds(connection, 4, 3)
        if not head:
            os._exit(0)
        request, size = b"", int.from_bytes(head, "little")
        while len(request) < size:
            request += connection.recv(size - len(request))
        if os.fork() == 0:
            connection.close()
            asked = json.loads(request)
            keep(asked, list(handles))
            return list(asked["args"])
        for handle in handles:
            os.close(handle)


def keep(asked: dict[str, Any], handles: list[int]) -> None:
    """Fork the command itself and wait for it; returns in the command only."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    out, err, status = handles
    ready, go = os.pipe()
    pid = os.fork()
    if pid:
        # Of fixed width: a command may have ended, and its exit code been written, before the number is read.
        os.write(status, f"{pid:{WIDTH}}".encode())
        os.close(go)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.write(status, str(code).encode())
        os._exit(0)
    os.close(go)
    os.read(ready, 1)  # the number of this process has been told before anything else is
    os.close(ready)
    os.close(status)
    for theirs, mine in ((out, 1), (err, 2)):
        os.dup2(theirs, mine)
        os.close(theirs)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])


def main() -> None:
    # A pipeline that a test edits twice in a second would be taken from what was compiled before.
    sys.dont_write_bytecode = True
    connection = socket.socket(fileno=int(os.environ[SERVED]))

    import ensemble_distill.cli.recording
    import ensemble_distill.evaluation.evaluate
    import ensemble_distill.formats.hdf5
    import ensemble_distill.formats.parquet
    import ensemble_distill.training.run  # noqa: F401
    from ensemble_distill.cli.main import COMMANDS
    from ensemble_distill.cli.main import main as command

    for name in COMMANDS:
        importlib.import_module(f"ensemble_distill.cli.{name.replace('-', '_')}")
    sys.path[:] = [place for place in sys.path if place != str(Path(__file__).parent)]
    gc.freeze()  # the collector would copy every page that is shared with the processes forked from here
    sys.argv = ["ensemble-distill", *serve(connection)]
    sys.path.insert(0, "")
    code = 1
    try:
        command()
    except SystemExit as stop:
        code = int(stop.code or 0)
    # As at the end of a process, but for tearing down what was loaded, which takes half a second.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
