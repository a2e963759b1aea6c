"""Each guard deleted in turn: which of them does no test miss?

    python benchmarks/guards.py

A guard is a ``raise`` of an error of ours in what reads and writes caches, or a ``ValueError`` there, of which an
error of ours is made further up. First the whole suite runs once over a copy of the project in which each guard
notes who reached it. Then each guard is deleted in a copy of its own (``pass`` stands in its place) and the tests
that reached it run, the fastest first: five, and where these miss nothing, all others. A survivor is a guard whose
deletion none of them noticed.

A guard that no test can reach, since it needs a race for example, says so on its lines: ``# guard: <reason>``.

With ``--state FOLDER`` a run goes on where an earlier one stopped, and guards that were missed before are not tried
again. ``--only`` tries those alone whose place or text holds a pattern.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = "ensemble_distill"
PLACES = ("store", "cache", "formats", "recording", "fingerprint.py", "training/checkpoint.py")
KINDS = {
    "UsageError", "Mismatch", "Corrupt", "Unsafe", "StorageError", "InvalidOutput", "OutOfMemory", "Interrupted",
    "ValueError",
}  # fmt: skip
FEW = 5
SECONDS = 300
REACHED, TIMES = "ENSEMBLE_DISTILL_GUARDS_REACHED", "ENSEMBLE_DISTILL_GUARDS_TIMES"
NOTE = f'__import__("{PACKAGE}.guards", fromlist=["guards"]).reached'
REASON = re.compile(r"# guard: (.+)")


# What runs inside of the copies: this file stands in them as a module of the package ------------------


def reached(number: int) -> None:
    """A guard is about to raise: note its number and the test that runs, whichever process this is."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
    with contextlib.suppress(KeyError, OSError):
        handle = os.open(os.environ[REACHED], os.O_WRONLY | os.O_APPEND)
        os.write(handle, f"{number} {test}\n".encode())
        os.close(handle)


def pytest_runtest_logreport(report: Any) -> None:
    """A hook of pytest: note how a test ended and how long it took."""
    if TIMES in os.environ:
        line = json.dumps([report.nodeid, report.when, report.outcome, report.duration])
        with Path(os.environ[TIMES]).open("a") as file:
            file.write(f"{line}\n")


# The guards ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Guard:
    """A ``raise``: its file below the root, its lines, its place in the file's bytes, what it raises, for which reason
    it is exempted (or "")."""

    file: str
    line: int
    start: int
    end: int
    text: str
    inside: str
    reason: str
    same: int = 0

    @property
    def key(self) -> str:
        """What names it also when lines above it came or went; ``same`` counts its likes before it."""
        return f"{self.file} {self.inside} {self.text}{self.same or ''}"

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"

    def replaced(self, source: bytes, by: str) -> bytes:
        """The source with something else in its place, all other lines where they were."""
        lines = source[self.start : self.end].count(b"\n")
        return source[: self.start] + by.encode() + b"\n" * lines + source[self.end :]


def guards() -> list[Guard]:
    files: list[Path] = []
    for place in PLACES:
        path = ROOT / PACKAGE / place
        files += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    trees = {file: ast.parse(file.read_bytes()) for file in files}
    raisers = KINDS | {name for tree in trees.values() for name in _makers(tree)}
    found: dict[str, Guard] = {}
    for guard in (guard for file, tree in trees.items() for guard in _guards(file, tree, raisers)):
        while guard.key in found:
            guard = replace(guard, same=guard.same + 1)
        found[guard.key] = guard
    return list(found.values())


def _makers(tree: ast.Module) -> Iterator[str]:
    """The functions that make an error for others to raise."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and isinstance(node.returns, ast.Name) and node.returns.id in KINDS:
            yield node.name


def _guards(file: Path, tree: ast.Module, raisers: set[str]) -> Iterator[Guard]:
    source = file.read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for inside, node in _raises(tree, ""):
        call = _call(node, raisers)
        if call is None:
            continue
        start = starts[node.lineno - 1] + node.col_offset
        assert node.end_lineno is not None and node.end_col_offset is not None
        end = starts[node.end_lineno - 1] + node.end_col_offset
        rest_of_line = source[end : starts[node.end_lineno]]
        reason = REASON.search((source[start:end] + rest_of_line).decode())
        yield Guard(
            str(file.relative_to(ROOT)), node.lineno, start, end, _short(call), inside, reason[1] if reason else ""
        )


def _raises(node: ast.AST, inside: str) -> Iterator[tuple[str, ast.Raise]]:
    """Each ``raise`` and the class and function that it stands in, in the order of the file."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Raise):
            yield inside, child
        named = isinstance(child, ast.ClassDef | ast.FunctionDef)
        yield from _raises(child, f"{inside}.{child.name}".strip(".") if named else inside)


def _call(node: ast.Raise, raisers: set[str]) -> ast.Call | None:
    """The call that makes the error, if it is one of ours; of a choice between two, the first."""
    for found in ast.walk(node.exc) if node.exc is not None else ():
        if isinstance(found, ast.Call):
            name = found.func.attr if isinstance(found.func, ast.Attribute) else getattr(found.func, "id", "")
            if name in raisers:
                return found
    return None


def _short(call: ast.Call) -> str:
    text = ast.unparse(ast.Call(call.func, call.args, []))
    return text if len(text) <= 110 else text[:109] + "…"


# Copies and runs -------------------------------------------------------------------------------------


class Copy:
    """The project in a temporary folder: the package and the tests copied, all else linked."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "project"
        self.root.mkdir()
        for path in ROOT.iterdir():
            if path.name in (PACKAGE, "tests"):
                shutil.copytree(path, self.root / path.name, ignore=shutil.ignore_patterns("__pycache__"))
            elif not path.name.startswith("."):
                (self.root / path.name).symlink_to(path)
        shutil.copy(__file__, self.root / PACKAGE / "guards.py")

    def pytest(self, *args: str, seconds: float | None = None, **env: str) -> tuple[int | None, str]:
        """Exit code (None: it did not end in time) and output of a run in the copy."""
        command = [sys.executable, "-m", "pytest", "-p", f"{PACKAGE}.guards", "-p", "no:cacheprovider", *args]
        # Files are changed within a second of each other, which compiled files would not notice.
        more = {"PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                command,
                cwd=self.root,
                env=os.environ | more | env,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            code: int | None = None
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                pass
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # also what a test left behind
                process.wait()
            output.seek(0)
            return code, output.read().decode(errors="replace")

    def change(self, file: str, data: bytes) -> None:
        (self.root / file).write_bytes(data)


def first_run(copy: Copy, found: list[Guard], state: Path, args: argparse.Namespace) -> dict[str, list[str]]:
    """The tests that reached each guard (by key), fastest first, of those that pass."""
    for file in {guard.file for guard in found}:
        data = (ROOT / file).read_bytes()
        for number, guard in reversed(list(enumerate(found))):  # from the end, so that places before stay as they are
            if guard.file == file:
                statement = data[guard.start : guard.end].decode()
                data = data[: guard.start] + f"{NOTE}({number}); {statement}".encode() + data[guard.end :]
        copy.change(file, data)
    log, times = state / "reached", state / "times"
    log.write_bytes(b"")
    times.write_bytes(b"")
    workers = ("-n", str(args.workers)) if args.workers else ()
    code, output = copy.pytest(*args.tests, *workers, **{REACHED: str(log), TIMES: str(times)})
    print(output[-3000:] if code else output.splitlines()[-1], flush=True)
    seconds: dict[str, dict[str, float]] = {}
    failed: set[str] = set()
    for line in times.read_text().splitlines():
        test, when, outcome, duration = json.loads(line)
        seconds.setdefault(test, {})[when] = duration
        if outcome != "passed":
            failed.add(test)
    if not seconds:
        sys.exit("the first run has run no test")
    tests: dict[int, set[str]] = {}
    for line in log.read_text().splitlines():
        number, _, test = line.partition(" ")
        tests.setdefault(int(number), set()).add(test)
    result = {}
    for number, guard in enumerate(found):
        useful = [test for test in tests.get(number, ()) if test in seconds and test not in failed]
        result[guard.key] = sorted(useful, key=lambda test: (sum(seconds[test].values()), test))
    for file in {guard.file for guard in found}:
        copy.change(file, (ROOT / file).read_bytes())
    return result


def try_without(copy: Copy, guard: Guard, tests: list[str]) -> str:
    """What noticed that the guard is gone: the failed test, or "" for nothing."""
    source = (ROOT / guard.file).read_bytes()
    copy.change(guard.file, guard.replaced(source, "pass"))
    try:
        for part in (tests[:FEW], tests[FEW:]):
            if not part:
                continue
            code, output = copy.pytest("-x", "-rfE", *part, seconds=SECONDS)
            if code is None:
                return f"a run that did not end in {SECONDS} s: {', '.join(part[:FEW])}"
            if code not in (0, 1):
                sys.exit(f"{guard.place}: pytest ended with {code}\n{output[-3000:]}")
            if code == 1:
                failure = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
                return failure[1] if failure else part[0]
        return ""
    finally:
        copy.change(guard.file, source)


# The page --------------------------------------------------------------------------------------------


def page(found: list[Guard], verdicts: dict[str, dict[str, Any]], command: str) -> str:
    """The figures, file by file; then survivors and exemptions with their reasons."""
    states = {guard: _state(guard, verdicts) for guard in found}
    rows = []
    for file in [*dict.fromkeys(guard.file for guard in found), ""]:
        own = [state for guard, state in states.items() if file in ("", guard.file)]
        counts = [len(own), *map(own.count, ("noticed", "exempt", "survived"))]
        name = f"`{file.removeprefix(f'{PACKAGE}/')}`" if file else "all"
        rows.append(f"| {name} | {' | '.join(map(str, counts))} |")
    survived = [_row(g, verdicts[g.key]["why"]) for g, state in states.items() if state == "survived"]
    exempt = [_row(g, g.reason) for g, state in states.items() if state == "exempt"]
    head = ["| guard | what it says | why |", "|---|---|---|"]
    return f"""# Guards

Each `raise` of an error of ours in what reads and writes caches (and each `ValueError` there, of which one is made) was
deleted in turn, and the tests that reach it were run: first the {FEW} fastest, then, where these noticed nothing, all
others. Written by

    {command}

on {cpu()}, Python {platform.python_version()}.

| file | guards | noticed by a test | exempt | survived |
|---|---|---|---|---|
{chr(10).join(rows)}

## Survivors

{chr(10).join(head + survived) if survived else "None."}

## Exempt

{chr(10).join(head + exempt) if exempt else "None."}
"""


def _row(guard: Guard, why: str) -> str:
    text = guard.text.replace("|", "\\|").replace("`", "'")
    return f"| `{guard.place}` | `{text}` | {why} |"


def _state(guard: Guard, verdicts: dict[str, dict[str, Any]]) -> str:
    if guard.reason:
        return "exempt"
    if guard.key not in verdicts:
        return "untried"
    return "noticed" if verdicts[guard.key]["by"] else "survived"


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if x.startswith("model name")] if info.exists() else []
    return f"{names[0].split(':')[1].strip() if names else platform.processor()} ({platform.machine()})"


# ------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", metavar="PATTERN", help="guards whose place or text this is found in")
    parser.add_argument("--tests", nargs="+", default=[], help="tests of the first run (default: the whole suite)")
    parser.add_argument("--workers", type=int, default=2, help="processes of the first run; 0: one, without xdist")
    parser.add_argument("--state", type=Path, metavar="FOLDER", help="keep verdicts here, and go on from them")
    parser.add_argument("--list", action="store_true", help="only print the guards")
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write a page of the figures here")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that no test outlives this
    found = guards()
    chosen = [g for g in found if re.search(args.only, f"{g.place} {g.text}") and not g.reason]
    if args.list:
        for guard in chosen:
            print(guard.place, guard.inside, guard.text)
        print(len(chosen), "guards")
        return
    with tempfile.TemporaryDirectory(prefix="guards-") as folder:
        state = args.state.absolute() if args.state else Path(folder)
        state.mkdir(parents=True, exist_ok=True)
        verdicts = examine(Copy(Path(folder)), found, chosen, state, args)
    survivors = [g for g in found if _state(g, verdicts) == "survived"]
    for guard in survivors:
        print(f"survived: {guard.place}  {guard.text}  ({verdicts[guard.key]['why']})")
    print(f"{len(found)} guards, {len(survivors)} survived, {sum(bool(g.reason) for g in found)} exempt")
    if args.write:
        args.write.write_text(page(found, verdicts, f"python benchmarks/guards.py {shlex.join(sys.argv[1:])}"))
    sys.exit(bool(survivors))


def examine(
    copy: Copy, found: list[Guard], chosen: list[Guard], state: Path, args: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """By the key of each guard what noticed its deletion, or why nothing did; kept as it comes."""
    kept = state / "verdicts.json"
    verdicts: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    chosen = [g for g in chosen if _state(g, verdicts) != "noticed"]
    if not chosen:
        return verdicts
    tests = first_run(copy, found, state, args)
    for n, guard in enumerate(chosen, 1):
        start, own = time.monotonic(), tests[guard.key]
        by = try_without(copy, guard, own)
        why = "" if by else f"tests that reach it and pass without it: {len(own)}" if own else "no test reaches it"
        verdicts[guard.key] = {"by": by, "why": why}
        kept.write_text(json.dumps(verdicts, indent=1))
        print(
            f"{n}/{len(chosen)} {guard.place} {'noticed by ' + by if by else 'SURVIVED: ' + why} "
            f"({len(own)} tests, {time.monotonic() - start:.0f} s)",
            flush=True,
        )
    return verdicts


if __name__ == "__main__":
    main()
