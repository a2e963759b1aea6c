"""Many seeded mutations of each kind of file that a cache or a run holds; what each led to.

    python benchmarks/fuzz.py --mutations 20000

Half of them stand under hashes that were made right again. A finding is anything but the same data or an error of
ours: other data under hashes that are not theirs, another exception, a crash, ten seconds, 256 MiB.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests")]
import hostile  # noqa: E402
import torch  # noqa: E402


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if x.startswith("model name")] if info.exists() else []
    return names[0].split(":")[1].strip() if names else "unknown processor"


def row(kind: str, found: dict[str, Any], seconds: float) -> str:
    return (
        f"| {kind} | {found['mutations']:,} | {found['refused']:,} | {found['same']:,} | {found['other data']:,} "
        f"| {len(found['findings']):,} | {found['slowest']:.2f} | {found['growth'] / 2**20:.0f} | {seconds:.0f} |"
    )


def page(rows: list[str], findings: list[str], args: argparse.Namespace) -> str:
    heads = ("file", "mutations", "refused", "same data", "other data", "findings", "slowest, s", "most MiB", "seconds")
    lines = ["", "Findings, by what they say (the first seed of each):", "", *findings] if findings else []
    return f"""# Mutated files

Written by

    python benchmarks/fuzz.py {" ".join(sys.argv[1:])}

on {cpu()}, torch {torch.__version__}. *Other data* is what a stranger may say under hashes that he made right.

| {" | ".join(heads)} |
|---|{"---|" * (len(heads) - 1)}
{chr(10).join(rows + lines)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--mutations", type=int, default=20_000, help="of each kind")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop a kind after so long")
    parser.add_argument("--kinds", nargs="+", choices=hostile.KINDS, default=hostile.KINDS)
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write a page of the figures here")
    args = parser.parse_args()
    rows: list[str] = []
    findings: dict[str, str] = {}
    for kind in args.kinds:
        with tempfile.TemporaryDirectory() as folder:
            fuzz, start = hostile.Fuzz(kind, Path(folder)), time.monotonic()
            total: dict[str, Any] = {}
            last = args.first + args.mutations
            for first in range(args.first, last, 500):
                found = fuzz.run(range(first, min(first + 500, last)))
                total = {
                    name: max(total.get(name, 0), value) if name in ("slowest", "growth") else total[name] + value
                    for name, value in found.items()
                } if total else found  # fmt: skip
                if time.monotonic() - start > args.seconds:
                    break
        rows.append(row(kind, total, time.monotonic() - start))
        print(rows[-1], flush=True)
        for seed, what in total["findings"]:
            findings.setdefault(f"{kind}, {what[:90]}", f"- {kind} {seed}: {what[:300]}")
        if args.write:  # after each kind: a run that is stopped has said something
            args.write.write_text(page(rows, list(findings.values()), args))
    for text in findings.values():
        print(text)
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
