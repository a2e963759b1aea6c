"""What a million units cost: planning, resuming, sealing and opening, on simulated shards. Prints a table.

    python benchmarks/scale.py --units 100000 1000000 --write docs/scale.md

The commits are made by the tool's own records, but kept in memory instead of a directory: what is measured is the
tool, not the file system. Memory is the growth of the process beyond the simulated storage.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from small import a_plan

from ensemble_distill.cache.commits import Commits, committed_units, held_plan
from ensemble_distill.cache.plan import Plan
from ensemble_distill.fingerprint import sha256
from ensemble_distill.metrics import Tally
from ensemble_distill.recording.seal import seal
from ensemble_distill.store import records
from ensemble_distill.store.records import Commit
from ensemble_distill.store.store import Store


class Simulated:
    """A storage whose commits and key pages are made up when they are read; the rest is kept in memory."""

    root = "simulated"

    def __init__(self, plan: Plan, present: int) -> None:
        self.plan, self.present = plan, present
        self.files: dict[str, bytes] = {}
        self.requests: dict[str, int] = {}
        self.keys = bytes(16)
        self.plan_digest = ""
        tally = Tally.empty(["a", "b", "ensemble"]).state()
        self._template = Commit(
            plan="P", unit="U", object="0" * 64 + ".h5", size=1000, rows=1, segments=(), blocks=("0" * 64,),
            content="0" * 64, keys=sha256(self.keys), statistics=tally, provenance={"time": "2026", "device": "cpu"},
        )  # fmt: skip
        self._body = records.dump(self._template).decode()
        self._plain = records.dump(self._template.model_copy(update={"statistics": None})).decode()

    def _count(self, name: str) -> None:
        kind = name.partition("/")[0]
        self.requests[kind] = self.requests.get(kind, 0) + 1

    def create(self, name: str, *parts: bytes | memoryview) -> bool:
        self._count("create")
        data = b"".join(parts)
        return self.files.setdefault(name, data) is data

    def replace(self, name: str, data: bytes) -> None:
        self.files[name] = data

    def read(self, name: str, at_most: int = 0) -> bytes:
        self._count("read")
        if name.startswith("commits/"):
            unit = name.removeprefix("commits/").removesuffix(".json")
            text = self._body if unit.endswith(".targets") else self._plain  # as in a capture
            body = text.replace('"U"', f'"{unit}"').replace('"P"', f'"{self.plan_digest}"').encode()
            return records.sealed(body)
        return self.keys if name.startswith("keys/") else self.files[name]

    def size(self, name: str) -> int | None:
        return len(self.files[name]) if name in self.files else None

    def list(self, folder: str) -> Iterator[str]:
        self._count("list of 1000")
        for n in range(self.present if folder == "commits" else 0):
            yield f"commits/{self.plan.unit_name(n)}.json"

    def remove(self, name: str) -> None:
        self.files.pop(name, None)

    def free(self) -> None:
        return None


def resident() -> float:
    """Megabytes in use now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def measure(units: int) -> dict[str, float | str]:
    views = 10
    rows = units // views // 2
    result: dict[str, float | str] = {"units": f"{units:,}"}

    def timed(name: str, call: Callable[[], object]) -> object:
        start = time.perf_counter()
        value = call()
        result[f"{name}, s"] = round(time.perf_counter() - start, 2)
        return value

    plan = timed("plan", lambda: plan_and_count(rows, views))
    assert isinstance(plan, Plan) and plan.units == units
    storage = Simulated(plan, units - 2)
    store = Store(storage)
    storage.plan_digest = store.put_plan(plan)
    before = resident()
    done = timed("resume", lambda: committed_units(store, plan))
    assert isinstance(done, np.ndarray) and int(done.sum()) == units - 2
    storage.present = units
    storage.requests.clear()
    digest = timed("seal", lambda: seal(plan, storage.plan_digest, store))
    result["MB beyond what is stored"] = round(
        resident() - before - sum(len(data) for data in storage.files.values()) / 1e6
    )
    result["reads"] = f"{storage.requests['read']:,}"
    result["creates"] = f"{storage.requests['create']:,}"

    def first_row() -> object:
        held = held_plan(store)
        commits = Commits(store, held, store.manifest(str(digest)))
        return commits._page(0)

    timed("open and touch a unit", first_row)
    return result


def plan_and_count(rows: int, views: int) -> Plan:
    plan = a_plan(rows=rows, unit_rows=1, views=views)
    assert sum(1 for _ in plan.items()) == plan.item_count
    return plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--units", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    table = [measure(units) for units in args.units]
    lines = [
        "| " + " | ".join(table[0]) + " |",
        "|" + "---|" * len(table[0]),
        *("| " + " | ".join(map(str, row.values())) + " |" for row in table),
    ]
    print("\n".join(lines))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(f"peak of the whole process {peak:.0f} MB, torch included")
    if args.write:
        args.write.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
