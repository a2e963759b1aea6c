"""Shared fixtures: a pipeline on digits in a folder of its own, the real command line, a finished cache."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import hypothesis
import pytest
from forked import Forked, Server

# Timings are no test's business: the machine may be busy.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.load_profile("default")

HERE = Path(__file__).parent
PIPELINE = HERE / "pipelines" / "digits.py"


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment(**extra: str) -> dict[str, str]:
    # One thread a process: results do not depend on the machine, and test processes do not fight.
    return os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"} | extra


def flip(path: Path, at: float = 0.5, mask: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= mask
    path.write_bytes(data)


def shard_of(cache: Path, unit: str) -> Path:
    """The file that holds a unit's rows."""
    commit = json.loads((cache / "commits" / f"{unit}.json").read_bytes().partition(b"\n")[2])
    return cache / "objects" / commit["object"]


class Cli:
    """Runs the command in a folder and returns the finished process."""

    server: ClassVar[Server | None] = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *args: object, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*args, **env)
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == code, f"exit {process.returncode}\n{stdout}\n{stderr}"
        assert "Traceback" not in stderr
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def start(self, *args: object, **env: str) -> subprocess.Popen[str] | Forked:
        if any(name.startswith("PYTHON") for name in env):  # what Python reads when it starts
            return subprocess.Popen(
                [sys.executable, "-m", "ensemble_distill", *map(str, args)],
                cwd=self.folder, env=environment(**env), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
        Cli.server = Cli.server or Server(environment())
        return Cli.server.start(list(map(str, args)), self.folder, environment(**env))

    def change(self, old: str, new: str, name: str = "digits.py", to: str | None = None) -> None:
        """Edit a file of the folder as a user would (or write the edited text under another name)."""
        text = (self.folder / name).read_text()
        assert old in text, f"{name} has no {old!r}"
        (self.folder / (to or name)).write_text(text.replace(old, new))


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pipeline and its three trained teachers."""
    folder = tmp_path_factory.mktemp("teachers")
    shutil.copy(PIPELINE, folder)
    load_module(PIPELINE).prepare(folder)
    return folder


@pytest.fixture(scope="session")
def captured(teachers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a finished cache in ``cache``: copy it before you change anything."""
    folder = tmp_path_factory.mktemp("captured") / "work"
    shutil.copytree(teachers, folder)
    Cli(folder)("cache", "digits.py", "--out", "cache")
    return folder


@pytest.fixture
def cli(teachers: Path, tmp_path: Path) -> Cli:
    """The command line in a fresh folder with pipeline and teachers, but no cache."""
    return Cli(shutil.copytree(teachers, tmp_path / "work"))


@pytest.fixture
def cached(captured: Path, tmp_path: Path) -> Cli:
    """The command line in a fresh folder with pipeline, teachers and a finished cache."""
    return Cli(shutil.copytree(captured, tmp_path / "work"))


@pytest.fixture(scope="session")
def captured_taps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tapped") / "work"
    folder.mkdir()
    shutil.copy(HERE / "pipelines" / "tapped.py", folder)
    for format in ("hdf5", "parquet"):
        Cli(folder)("cache", "tapped.py", "--out", format, "--format", format)
    return folder


@pytest.fixture
def tapped(captured_taps: Path, tmp_path: Path) -> Cli:
    return Cli(shutil.copytree(captured_taps, tmp_path / "work"))
