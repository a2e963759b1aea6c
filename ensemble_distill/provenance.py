"""Where a result came from: recorded, shown, never compared."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import sys
from typing import Any

DISTRIBUTIONS = ("ensemble-distill", "torch", "numpy", "h5py", "pyarrow")


def provenance() -> dict[str, Any]:
    """Versions, machine, time (UTC) and command of this process."""
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in DISTRIBUTIONS},
        "machine": f"{platform.system()} {platform.machine()}",
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["ensemble-distill", *sys.argv[1:]]),
    }


def version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
