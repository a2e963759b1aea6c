"""``verify --deep``: each shard as other people's tools would read it, parsed by a child that may die."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading

from ensemble_distill.cache.groups import Group
from ensemble_distill.errors import Unsafe
from ensemble_distill.store.records import Commit

MEMORY = 1 << 30
SECONDS = 60.0


class Parser:
    """Hands shards to a child process: ``memory`` bytes it may use beyond its libraries, ``seconds`` a shard."""

    def __init__(self, format: str, memory: int = MEMORY, seconds: float = SECONDS) -> None:
        self._format, self._memory, self._seconds = format, memory, seconds
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def __call__(self, data: bytes, commit: Commit, group: Group, where: str) -> None:
        """Unsafe if the shard is not what its commit says, or if its library crashes, hangs or starves on it."""
        asked = {
            "format": self._format,
            "dtype": [(f.name, f.dtype, f.shape) for f in group.fields],
            "token": [(f.name, f.dtype, f.shape) for f in group.token_fields],
            "rows": commit.rows,
            "segments": [segment.model_dump() for segment in commit.segments],
            "size": len(data),
        }
        with self._lock:
            problem = self._ask(json.dumps(asked).encode() + b"\n", data)
        if problem:
            raise Unsafe(f"{where}: {problem}", hint="do not give this file to other programs")

    def close(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def _ask(self, request: bytes, data: bytes) -> str:
        child = self._child = self._child or subprocess.Popen(
            [sys.executable, "-m", "ensemble_distill.formats.child", str(self._memory)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            # Arrow's own pool would reserve more address space than the limit leaves.
            env=os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system"},
        )  # fmt: skip
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(request)
            child.stdin.write(data)
            child.stdin.flush()
            if not select.select([child.stdout], [], [], self._seconds)[0]:
                self.close()
                return f"its library was still at work on it after {self._seconds:.0f} s"
            answer = child.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if not answer:
            code = child.wait()
            self.close()
            return f"its library crashed on it (exit {code})"
        return str(json.loads(answer)["problem"])
