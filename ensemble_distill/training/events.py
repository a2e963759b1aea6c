"""TensorBoard events of a run, where the extra is installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ensemble_distill.errors import UsageError


class Events:
    """Writes each epoch's figures to ``RUN/tensorboard``."""

    def __init__(self, run: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError(
                "--tensorboard needs tensorboard", hint="pip install 'ensemble-distill[tensorboard]'"
            ) from error
        self._path, self._make = Path(run) / "tensorboard", SummaryWriter

    def write(self, step: int, line: Mapping[str, Any]) -> None:
        with self._make(str(self._path), purge_step=step) as writer:
            for section in ("train", "held_out", "test"):
                for name, value in line.get(section, {}).items():
                    writer.add_scalar(f"{section}/{name}", value, step)
            if "lr" in line:
                writer.add_scalar("lr", line["lr"], step)
