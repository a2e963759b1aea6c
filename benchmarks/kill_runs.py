"""Real commands and real workers, killed at random moments again and again; what was lost. Prints a table.

    python benchmarks/kill_runs.py --write docs/kill-runs.md

The command is forked from a process that has imported everything, then runs as typed: its own signals, its own files.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from small import a_plan, put_item  # noqa: E402

import ensemble_distill.cli.recording  # noqa: E402, F401  (what the command would import)
from ensemble_distill.cache.commits import committed_units, held_plan  # noqa: E402
from ensemble_distill.cache.verify import verify  # noqa: E402
from ensemble_distill.cli.main import main as command  # noqa: E402
from ensemble_distill.recording.seal import seal  # noqa: E402
from ensemble_distill.store.leases import Leases, lease_storage  # noqa: E402
from ensemble_distill.store.local import LocalStorage  # noqa: E402
from ensemble_distill.store.store import Store, open_store  # noqa: E402


def fork(run: Callable[[], object], quiet: bool = True) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if quiet:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
        run()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        os._exit(code)


def cli(folder: Path, *args: str) -> Callable[[], None]:
    def run() -> None:
        os.chdir(folder)
        sys.argv = ["ensemble-distill", *args]
        sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb"))
        command()

    return run


def wait(pid: int) -> int:
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def digest(cache: Path) -> str:
    store = open_store(cache)
    return store.manifest(str(store.current())).content_digest


def command_runs(folder: Path, number: signal.Signals, trials: int, chance: random.Random) -> dict[str, object]:
    """Captures of the digits, each asked to die ``number`` at a random moment until it is through."""
    undisturbed = folder / "undisturbed"
    if not undisturbed.exists():
        assert wait(fork(cli(folder, "cache", "digits.py", "--out", "undisturbed"))) == 0
    expected, cache = digest(undisturbed), folder / "killed"
    done, lost, captures, codes = 0, 0, 0, set()
    held: set[str] = set()
    while done < trials:
        pid = fork(cli(folder, "cache", "digits.py", "--out", "killed", "--grace", "0.1"))
        time.sleep(chance.random() * 0.6)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        code = wait(pid)
        if code == 0:
            captures += 1
            lost += not verify(open_store(cache)).ok or digest(cache) != expected
            shutil.rmtree(cache)
            held = set()
            continue
        codes.add(code)
        done += 1
        if cache.is_dir():
            now = {path.name for path in (cache / "commits").glob("*")}
            lost += len(held - now) + (len(now) > 0 and not verify(open_store(cache)).ok)
            held = now
    shutil.rmtree(cache, ignore_errors=True)
    return {
        "what": f"{number.name} at a random moment of `cache`", "runs": done, "finished captures": captures,
        "lost or wrong": lost, "exit codes": ", ".join(map(str, sorted(codes))), "wasted": "",
    }  # fmt: skip


def worker(root: Path, log: Path, ttl: float) -> Callable[[], None]:
    """What a capture does with leases, with a teacher of fifty milliseconds; notes whose commit was first."""

    def run() -> None:
        store = Store(LocalStorage(root))
        plan = held_plan(store)
        plan_digest = str(store.plan_digest())
        leases = Leases(lease_storage(store.storage), ttl=ttl)
        chance = random.Random(os.getpid())
        with leases.renewing():
            while not (done := committed_units(store, plan)).all():
                todo = [i for i in range(plan.item_count) if not done.reshape(-1, len(plan.groups))[i].all()]
                start = chance.randrange(len(todo))
                for number in todo[start:] + todo[:start]:
                    item = plan.item(number)
                    if not leases.claim(item.name):
                        continue
                    if not all(store.is_committed(item.unit(group)) for group in plan.groups):
                        time.sleep(0.05)
                        first_to_come = all(put_item(store, plan, plan_digest, item, str(os.getpid())))
                        with log.open("a") as file:
                            file.write("first\n" if first_to_come else "late\n")
                    leases.release(item.name)
                time.sleep(0.02)

    return run


def worker_runs(folder: Path, kills: int, sleepers: int, chance: random.Random) -> dict[str, object]:
    """Eight workers on a thousand units; they are killed and replaced, or stopped until their lease has gone."""
    root, log, ttl = folder / "workers", folder / "log", 0.4
    plan = a_plan(rows=2000, unit_rows=4, views=2, groups=1)
    store = Store(LocalStorage(root))
    plan_digest = store.put_plan(plan)
    log.touch()
    pids = [fork(worker(root, log, ttl)) for _ in range(8)]
    stopped: list[tuple[float, int]] = []
    killed = slept = 0
    while not committed_units(store, plan).all():
        time.sleep(0.02)
        now = time.monotonic()
        for until, pid in [s for s in stopped if s[0] < now]:
            os.kill(pid, signal.SIGCONT)
            stopped.remove((until, pid))
        victim = chance.choice(pids)
        if victim in [pid for _, pid in stopped]:
            continue
        if killed < kills and killed * sleepers <= slept * kills:
            os.kill(victim, signal.SIGKILL)
            wait(victim)
            pids[pids.index(victim)] = fork(worker(root, log, ttl))
            killed += 1
        elif slept < sleepers and len(stopped) < 4:
            os.kill(victim, signal.SIGSTOP)
            stopped.append((now + 3 * ttl, victim))
            slept += 1
    for _, pid in stopped:
        os.kill(pid, signal.SIGCONT)
    for pid in pids:
        wait(pid)
    seal(plan, plan_digest, store)
    late = log.read_text().split().count("late")
    wrong = 0 if verify(store).ok else 1
    undisturbed = Store(LocalStorage(folder / "alone"))
    other = undisturbed.put_plan(plan)
    for item in plan.items():
        put_item(undisturbed, plan, other, item)
    seal(plan, other, undisturbed)
    wrong += digest(root) != digest(folder / "alone")
    return {
        "what": f"8 workers, {plan.units} units: {killed} killed, {slept} asleep beyond their lease",
        "runs": killed + slept, "finished captures": 1, "lost or wrong": wrong, "exit codes": "",
        "wasted": f"{late / plan.item_count:.1%} of the units committed late",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--stops", type=int, default=100, help="of each of SIGTERM and SIGINT")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    chance = random.Random(args.seed)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(ROOT / "tests/pipelines/digits.py", folder)
        sys.path.insert(0, name)
        assert wait(fork(lambda: __import__("digits").prepare(folder))) == 0
        rows.append(worker_runs(folder, 200, 50, chance))
        print(json.dumps(rows[-1]), flush=True)
        for number, trials in ((signal.SIGKILL, args.kills), (signal.SIGTERM, args.stops), (signal.SIGINT, args.stops)):
            rows.append(command_runs(folder, number, trials, chance))
            print(json.dumps(rows[-1]), flush=True)
    lines = [
        "# Killed again and again", "",
        f"Written by `python benchmarks/kill_runs.py --kills {args.kills} --stops {args.stops} --seed {args.seed}` "
        f"on {os.cpu_count()} cores, {platform.system()} {platform.machine()}.", "",
        "| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0]),
        *("| " + " | ".join(map(str, row.values())) + " |" for row in rows),
    ]  # fmt: skip
    if args.write:
        args.write.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
