"""What views, fitted shares and temperatures, and the combine rule bring to a student: a section of docs/results.md.

    python pipelines/choices.py --out runs/choices

One cache of all members and sixteen views, of the first 20,000 training images, serves all students; what they differ
in is chosen when they are trained. What is finished already is reused, so the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from results import METRICS, PIPELINE, command, cpu, lines, version

PAGE, HEADING = Path("docs/results.md"), "## Views, shares and rules"
SEEDS, VIEWS, ROWS, EPOCHS = 3, 16, 20_000, 16

# name: (title, variant of the pipeline, settings)
Students = dict[str, tuple[str, str, tuple[str, ...]]]


def students(fitted: Sequence[str]) -> Students:
    return {
        "views-1": ("distilled, 1 view", "train", ("views=1",)),
        "views-4": ("distilled, 4 views", "train", ("views=4",)),
        "views-16": ("distilled, 16 views", "train", ("views=16",)),
        "fitted-16": ("the same, shares and temperatures fitted on held-out labels", "train", ("views=16", *fitted)),
        "logits-16": ("the same, mean of logits", "train", ("views=16", "ensemble.combine=mean_logits")),
        "alone-1": ("student alone, 1 view", "alone", ("views=1",)),
        "alone-16": ("student alone, 16 views", "alone", ("views=16",)),
    }


def capture(out: Path) -> Path:
    cache = out / "cache"
    settings = ("--set", 'codec={"name":"members"}', "--set", "precision=bf16")
    command("cache", PIPELINE, "--out", cache, "--limit", ROWS, "--views", VIEWS, *settings)
    return cache


def train(name: str, variant: str, settings: Sequence[str], seed: int, out: Path, cache: Path) -> dict[str, Any]:
    run = out / f"{name}-{seed}"
    chosen = [part for s in (*settings, f"seed={seed}", f"epochs={EPOCHS}", "precision=fp32") for part in ("--set", s)]
    where = ("--cache", cache, "--out", run, "--limit", ROWS)
    print(
        command("train", f"{PIPELINE}:{variant}", *where, *chosen, threads=1).splitlines()[-2], name, seed, flush=True
    )
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["test"]


def section(scores: dict[str, list[dict[str, float]]], titles: dict[str, str], fitted: dict[str, Any]) -> str:
    rows = [lines(titles[name], len(s), {m: [x[m] for x in s] for m in METRICS}) for name, s in scores.items()]
    captured, after, elsewhere = (f"{fitted['nll'][name]:.4f}" for name in ("captured", "fitted", "elsewhere"))
    return f"""{HEADING}

Written by `python pipelines/choices.py` on {cpu()}, torch {version("torch")}: the same student
of the first {ROWS:,} training images, {EPOCHS} epochs each, from one cache of every member's own predictions in {VIEWS}
views. `fit-weights --temperatures` on the held-out split: NLL {captured} as captured, {after} fitted,
{elsewhere} on rows that it was not fitted on; `{" ".join(fitted["settings"])}`.
Agreement is with the ensemble that taught the student (with the captured one where none did).

| | seeds | accuracy | NLL | ECE | agreement |
|---|---|---|---|---|---|
{chr(10).join(rows)}

Accuracy in points, paired by seed: {"; ".join(differences(scores))}.
"""


def differences(scores: dict[str, list[dict[str, float]]]) -> list[str]:
    pairs = [
        ("alone-16", "alone-1"), ("views-4", "views-1"), ("views-16", "views-1"), ("views-16", "alone-16"),
        ("fitted-16", "views-16"), ("logits-16", "views-16"),
    ]  # fmt: skip
    found = []
    for name, other in pairs:
        gains = [100 * (a["accuracy"] - b["accuracy"]) for a, b in zip(scores[name], scores[other], strict=True)]
        found.append(
            f"{name} less {other} {', '.join(f'{g:+.2f}' for g in gains)} (mean {statistics.mean(gains):+.2f})"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/choices"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    cache = capture(args.out)
    fit = ("fit-weights", PIPELINE, "--cache", cache, "--limit", ROWS, "--temperatures", "--json")
    fitted = json.loads(command(*fit))
    chosen = students(fitted["settings"])
    jobs = [(name, seed) for name in chosen for seed in range(SEEDS)]
    with ThreadPoolExecutor(args.jobs) as pool:
        done = list(pool.map(lambda job: train(job[0], *chosen[job[0]][1:], job[1], args.out, cache), jobs))
    scores = {name: [s for (n, _), s in zip(jobs, done, strict=True) if n == name] for name in chosen}
    before = PAGE.read_text().partition(HEADING)[0].rstrip()
    PAGE.write_text(f"{before}\n\n{section(scores, {name: title for name, (title, *_) in chosen.items()}, fitted)}")
    print(PAGE)


if __name__ == "__main__":
    main()
