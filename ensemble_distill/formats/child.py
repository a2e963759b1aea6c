"""Looks inside shards for ``verify --deep``, in a process of its own: what it parses may have been made to harm.

Reads requests from stdin and answers each with a line of JSON. Once the libraries are loaded it can open no file
any more (an external link leads nowhere), and its memory is limited.

    request: one line of JSON {format, dtype, token, rows, segments, size}, then ``size`` bytes
    answer:  {"problem": ""} or what is wrong
"""

from __future__ import annotations

import importlib
import json
import resource
import sys

import numpy as np

from ensemble_distill.formats.layout import Segment

MODULES = ("hdf5", "parquet")


def main(memory: int) -> None:
    modules = {name: importlib.import_module(f"ensemble_distill.formats.{name}") for name in MODULES}
    in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()  # noqa: SIM115, PTH123
    resource.setrlimit(resource.RLIMIT_AS, (in_use + memory, in_use + memory))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    stream = sys.stdin.buffer
    while line := stream.readline():
        asked = json.loads(line)
        data = stream.read(asked["size"])
        dtype, token = (
            np.dtype([(n, d, tuple(s)) for n, d, s in asked[kind]], align=True) if asked[kind] else None
            for kind in ("dtype", "token")
        )
        segments = [Segment(**segment) for segment in asked["segments"]]
        try:
            problem = modules[asked["format"]].check(data, dtype, asked["rows"], segments, token)
        except Exception as error:  # whatever the library makes of it
            problem = f"{type(error).__name__}: {str(error)[:300]}"
        print(json.dumps({"problem": problem}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
