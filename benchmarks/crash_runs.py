"""What a capture loses when it is killed, when its disk fails, when the power goes, and when a file is damaged.

    python benchmarks/crash_runs.py

The driver, the faulty systems and the model of a power loss are those of tests/test_crash.py, in full figures:
kills before every call, every errno at every call, thousands of disks that POSIX allows after a power loss,
a thousand flipped bits of each kind of file. No torch, no GPU, no real power switch.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import test_crash as rig
from faulty import CALLS, WithoutDirectorySync, WithoutSync

from ensemble_distill.store.local import LocalStorage


class Table:
    """Rows of the page: what was done, how often, and how often it was not as it should be."""

    def __init__(self) -> None:
        self.rows: list[str] = []
        self.problems: list[str] = []
        self._start = time.perf_counter()

    def add(self, what: str, runs: int, bad: list[str], control: bool = False) -> None:
        seconds, self._start = time.perf_counter() - self._start, time.perf_counter()
        expected = "many (a control)" if control else "0"
        self.rows.append(f"| {what} | {runs:,} | {len(bad):,} | {expected} | {seconds:.0f} |")
        if bool(bad) != control:
            self.problems += bad or [f"{what}: the control found nothing"]
        print(self.rows[-1], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000, help="disks after a power loss, in all")
    parser.add_argument("--flips", type=int, default=1000, help="flipped bits for each kind of file")
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write a page of the figures here")
    args = parser.parse_args()
    table = Table()
    memory = Path("/dev/shm")
    place = tempfile.TemporaryDirectory(prefix="crash-runs-", dir=memory if memory.is_dir() else None)
    with place as name:
        for number, run in enumerate((kills, failures, power_losses, damages)):
            folder = Path(name) / str(number)
            folder.mkdir()
            run(table, folder, args)
            shutil.rmtree(folder)
    text = page(table, args)
    print(text)
    for problem in table.problems[:20]:
        print("!", problem[:300])
    if args.write:
        args.write.write_text(text)
    sys.exit(1 if table.problems else 0)


def fresh(folder: Path, name: str) -> Path:
    path = folder / name
    path.mkdir()
    return path


def kills(table: Table, folder: Path, args: argparse.Namespace) -> None:
    for format in rig.FORMATS:
        results = list(rig.kills(rig.a_plan(format), fresh(folder, format), CALLS))
        table.add(f"SIGKILL before each call, {format}", len(results), [found[0] for found in results if found])


def failures(table: Table, folder: Path, args: argparse.Namespace) -> None:
    for format in rig.FORMATS:
        every = rig.failures(rig.a_plan(format), fresh(folder, format), lambda name, call: rig.FAULTS)
        results = list(every)
        what = f"ENOSPC, EDQUOT, EIO, EINTR or a short write at each call, {format}"
        table.add(what, len(results), [found[0] for _, found in results if found])


def power_losses(table: Table, folder: Path, args: argparse.Namespace) -> None:
    for format in rig.FORMATS:
        plan, place = rig.a_plan(format), fresh(folder, format)
        found = rig.images_with_losses(rig.recorded(plan, place), plan, place, -(-args.images // 2), resume=10)
        table.add(f"power loss, {format}; every tenth gone on with", -(-args.images // 2), first(found))
    plan = rig.a_plan("hdf5", rows=4)
    results = list(rig.kills_and_power_losses(plan, fresh(folder, "killed")))
    what = "killed before each call, gone on with, then power loss"
    table.add(what, len(results), [found[0] for found in results if found])
    for what, kind in (("files", WithoutSync), ("directories", WithoutDirectorySync)):
        plan, place = rig.a_plan("hdf5"), fresh(folder, what)
        found = rig.images_with_losses(rig.recorded(plan, place, kind), plan, place, args.images // 10)
        table.add(f"power loss, were {what} not synced", args.images // 10, first(found), control=True)


def first(found: dict[int, list[str]]) -> list[str]:
    return [texts[0] for texts in found.values()]


def damages(table: Table, folder: Path, args: argparse.Namespace) -> None:
    for format in rig.FORMATS:
        root = folder / format
        rig.capture(LocalStorage(root, rig.FaultySystem()), rig.a_plan(format, groups=2))
        rng = np.random.default_rng(0)
        kinds = rig.files_by_kind(root)
        tried, missed = 0, []
        for kind, files in kinds.items():
            count, bad = rig.unseen(root, kind, partial(rig.flips, rng=rng, count=-(-args.flips // len(files))))
            tried, missed = tried + count, missed + bad
        table.add(f"flipped bits of {len(kinds)} kinds of file, {format}: not reported", tried, missed)
        results = [rig.unseen(root, kind, rig.cuts) for kind in kinds]
        missed = [text for _, bad in results for text in bad]
        table.add(f"truncations and additions of each file, {format}: not reported", sum(n for n, _ in results), missed)


def page(table: Table, args: argparse.Namespace) -> str:
    command = f"python benchmarks/crash_runs.py --images {args.images} --flips {args.flips}"
    return f"""# Crash runs

A small capture (4 units, sealed) on systems that fail. After each run, everything acknowledged before must be
there and whole, `verify` must report nothing, a failing disk must have been one sentence and exit code 6, and
going on must end with the content of an undisturbed capture. Written by

    {command} --write docs/crash-runs.md

on {cpu()}, Python {platform.python_version()}, {platform.system()} {platform.release()}.

| | runs | losses | expected | seconds |
|---|---|---|---|---|
{chr(10).join(table.rows)}

- *power loss*: directories as POSIX allows them after a crash between any two system calls: what was not synced
  is lost, torn, zero-filled or there, each file and each change of a directory for itself.
- *controls*: the same check on a system that leaves the syncs out must find losses.
"""


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if x.startswith("model name")] if info.exists() else []
    return f"{names[0].split(':')[1].strip() if names else platform.processor()} ({platform.machine()})"


if __name__ == "__main__":
    main()
