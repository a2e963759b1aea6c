"""Where a result came from: recorded, shown, never compared."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import sys
from typing import Any

DISTRIBUTIONS = ("ensemble-distill", "torch", "numpy", "h5py", "pyarrow")

# What the provenance of a commit may take (bytes), and its time and command (characters); of a manifest, the distinct
# values that it lists of a field, and the bytes of all that it lists.
MAX_PROVENANCE, MAX_TIME, MAX_COMMAND = 16384, 64, 2000
MAX_VALUES, MAX_LISTED = 1000, 1 << 20


def provenance() -> dict[str, Any]:
    """Versions, machine, time (UTC) and command of this process."""
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in DISTRIBUTIONS},
        "machine": f"{platform.system()} {platform.machine()}",
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": _command(),
    }


def _command() -> str:
    """As it was typed, as far as it is text, without what is too long to be read."""
    text = os.fsencode(" ".join(["ensemble-distill", *sys.argv[1:]])).decode(errors="backslashreplace")
    return text if len(text) <= MAX_COMMAND else text[:MAX_COMMAND] + "…"


def version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
