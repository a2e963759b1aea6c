"""What each loss brings to a student, alone and with soft targets: a section of docs/results.md.

    python pipelines/objectives.py --out runs/objectives

One cache of the first 20,000 training images serves all students. First each loss gets its weight: of three, a factor
of five apart, the one whose student does best on the held-out images, with a seed that is in no table. Then every
student is trained with each seed. What is finished already is reused, so the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

import ensemble_distill as ed
from results import METRICS, command, cpu, lines, version

HERE = Path(os.path.relpath(Path(__file__).parent))
PAGE, HEADING = Path("docs/results.md"), "## Objectives"
ROWS, EPOCHS, PILOT_SEED, FACTORS = 20_000, 12, 100, (0.2, 1.0, 5.0)
ALONE = ("objective.soft.weight=0", "objective.hard.weight=1")
RESIDUAL, TRANSFORMER = "residual network", "vision transformer"


@dataclass(frozen=True)
class Student:
    """A row of the table. ``weights``: of the terms that the pilot scales. ``alone``: without soft targets."""

    title: str
    pipeline: str
    weights: tuple[tuple[str, float], ...] = ()
    alone: bool = False
    factor: float = 1.0

    def settings(self) -> tuple[str, ...]:
        scaled = tuple(f"objective.{term}.weight={weight * self.factor:g}" for term, weight in self.weights)
        return (ALONE if self.alone else ()) + scaled


METHODS = {
    "hint": Student("hint (FitNets)", "hints.py:train", (("hint", 0.01),)),
    "at": Student("attention transfer", "attention_transfer.py:train", (("middle", 1000), ("last", 1000))),
    "rkd": Student("relations (RKD)", "relational.py:train", (("relations", 25),)),
    "sp": Student("similarity-preserving (SP)", "relational.py:similarity", (("similarity", 3000),)),
    "dkd": Student("decoupled (DKD)", "compose.py:decoupled", (("decoupled", 0.2),)),
    "dist": Student("DIST", "compose.py:dist", (("dist", 1),)),
    "crd": Student("contrastive (CRD)", "relational.py:contrastive", (("contrastive", 0.1),)),
}
HEADS = Student("attention transfer (heads)", "attention_transfer.py:vit", (("heads", 1),))
COMPOSED = {
    "at-rkd": Student("attention and relations", "compose.py:train"),
    "at-rkd-hint": Student("attention, relations, hint", "compose.py:hinted"),
}


class Runner:
    def __init__(self, out: Path, jobs: int) -> None:
        self.out, self.jobs = out, jobs
        self.cache = out / "cache"

    def capture(self) -> None:
        where = ("--out", self.cache, "--limit", ROWS)
        command("cache", HERE / "compose.py", *where, "--set", "precision=bf16")

    def train(self, name: str, student: Student, seed: int) -> dict[str, Any]:
        """The last line of a run's metrics: the best epoch on the held-out images, and the scores on the test images.

        A seed gives all students of one network the same start and the same order.
        """
        run = self.out / f"{name}-{seed}"
        settings = (*student.settings(), f"seed={seed}", f"epochs={EPOCHS}", "precision=fp32")
        chosen = [part for setting in settings for part in ("--set", setting)]
        where = ("--cache", self.cache, "--out", run, "--limit", ROWS)
        command("train", HERE / student.pipeline, *where, *chosen, threads=1)
        line: dict[str, Any] = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        print(f"{name}, seed {seed}: held out {line['best']['accuracy']:.2%}", flush=True)
        return line

    def all(self, jobs: Sequence[tuple[str, Student, int]]) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(self.jobs) as pool:
            return list(pool.map(lambda job: self.train(*job), jobs))

    def two_stages(self, seeds: int) -> list[dict[str, Any]]:
        """The hint alone for a quarter of the epochs, then soft targets from these weights."""

        def both(seed: int) -> dict[str, Any]:
            first, second = self.out / f"stage1-{seed}", self.out / f"stage2-{seed}"
            where = ("--cache", self.cache, "--limit", ROWS, "--set", f"seed={seed}", "--set", "precision=fp32")
            command("train", HERE / "hints.py:first", "--out", first, *where, threads=1)
            from_it = ("--set", f"start={first}")
            command("train", HERE / "hints.py:second", "--out", second, *where, *from_it, threads=1)
            print(f"two stages, seed {seed}", flush=True)
            line: dict[str, Any] = json.loads((second / "metrics.jsonl").read_text().splitlines()[-1])
            return line

        with ThreadPoolExecutor(self.jobs) as pool:
            return list(pool.map(both, range(seeds)))


def better(line: dict[str, Any]) -> tuple[float, float]:
    return line["best"]["accuracy"], -line["best"]["nll"]


def piloted(runner: Runner) -> dict[str, Student]:
    """Each method at the factor whose student did best on the held-out images; and of the compositions the best one."""
    jobs = [
        (f"pilot-{name}-{factor:g}", _scaled(method, factor), PILOT_SEED)
        for name, method in {**METHODS, "vit-heads": HEADS}.items()
        for factor in FACTORS
    ]
    ranks = {name: better(line) for (name, *_), line in zip(jobs, runner.all(jobs), strict=True)}
    chosen = {
        name: _scaled(method, max(FACTORS, key=lambda f: ranks[f"pilot-{name}-{f:g}"]))
        for name, method in {**METHODS, "vit-heads": HEADS}.items()
    }
    weights = {term: weight * s.factor for s in chosen.values() for term, weight in s.weights}
    terms = {"at-rkd": ("middle", "last", "relations"), "at-rkd-hint": ("middle", "last", "relations", "hint")}
    sums = {
        name: Student(s.title, s.pipeline, tuple((t, weights[t]) for t in terms[name])) for name, s in COMPOSED.items()
    }
    trials = [(f"pilot-{name}", student, PILOT_SEED) for name, student in sums.items()]
    ranks = {name: better(line) for (name, *_), line in zip(trials, runner.all(trials), strict=True)}
    best = max(sums, key=lambda name: ranks[f"pilot-{name}"])
    return chosen | {"composed": sums[best]}


def _scaled(student: Student, factor: float) -> Student:
    return Student(student.title, student.pipeline, student.weights, student.alone, factor)


def students(chosen: dict[str, Student]) -> dict[str, Student]:
    """All rows in the order of the table: residual networks, then transformers."""
    rows = {
        "alone": Student("student alone", "compose.py:soft", alone=True),
        "soft": Student("soft targets", "compose.py:soft"),
    }
    for name in METHODS:
        s = chosen[name]
        rows[name] = Student(s.title, s.pipeline, s.weights, True, s.factor)
        rows[f"{name}-soft"] = Student(f"{s.title}, with soft targets", s.pipeline, s.weights, False, s.factor)
    hint, heads, composed = chosen["hint"], chosen["vit-heads"], chosen["composed"]
    int8 = "hint from int8 features, with soft targets"
    rows["hint8-soft"] = Student(int8, "hints.py:int8", hint.weights, False, hint.factor)
    rows["composed"] = Student(f"best composition: soft targets, {composed.title}", composed.pipeline, composed.weights)
    rows["vit-alone"] = Student("student alone", "attention_transfer.py:vit_soft", alone=True)
    rows["vit-soft"] = Student("soft targets", "attention_transfer.py:vit_soft")
    rows["vit-heads"] = Student(heads.title, heads.pipeline, heads.weights, True, heads.factor)
    title = f"{heads.title}, with soft targets"
    rows["vit-heads-soft"] = Student(title, heads.pipeline, heads.weights, False, heads.factor)
    return rows


# The page -------------------------------------------------------------------------------------------


def section(rows: dict[str, Student], scores: dict[str, list[dict[str, float]]], bytes_of: dict[str, int]) -> str:
    seeds = len(scores["soft"])
    networks = [name for name in scores if not name.startswith("vit-")]
    vits = [name for name in scores if name.startswith("vit-")]
    chosen = [s for name, s in rows.items() if name in (*METHODS, "vit-heads")]
    weights = "; ".join(f"{s.title} {', '.join(f'{w * s.factor:g}' for _, w in s.weights)}" for s in chosen)
    return f"""{HEADING}

Written by `python pipelines/objectives.py` on {cpu()}, torch {version("torch")}: students of the
first {ROWS:,} training images, {EPOCHS} epochs each in one view, {seeds} seeds, all from one cache of six members and
{len(bytes_of)} taps. With soft targets: 0.7 of them at T = 4, 0.3 of the labels, and the method; without: the labels at
weight 1, and the method. The weight of each method is that of three, a factor of five apart, whose student with soft
targets did best on the held-out images with a seed that is not in the table:
{weights}.
Agreement is with the ensemble that taught. The last columns are accuracy in points, paired by seed, with the 95%
interval of Student's t: an interval that holds 0 says that {seeds} seeds do not tell.

A small {RESIDUAL} ({parameters("resnet"):,} parameters) from four:

{table(rows, scores, networks, "soft", "alone")}

A small {TRANSFORMER} ({parameters("vit"):,} parameters) from two:

{table(rows, scores, vits, "vit-soft", "vit-alone")}

The hint's feature takes {bytes_of["tap/a.stage3_map"]:,} bytes a row as fp16 and
{bytes_of["tap/a.stage3_map_int8"]:,} as int8 with its scales. Its student in int8 less that in fp16, accuracy paired by
seed: {difference(scores["hint8-soft"], scores["hint-soft"])}.
"""


def bytes_per_row(arrays: dict[str, tuple[str, tuple[int, ...]]]) -> int:
    return sum(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in arrays.values())


def parameters(student: str) -> int:
    from parts import one_cache

    return sum(p.numel() for p in getattr(one_cache, student)().parameters())


def table(
    rows: dict[str, Student], scores: dict[str, list[dict[str, float]]], names: Iterable[str], soft: str, alone: str
) -> str:
    head = "| | seeds | accuracy | NLL | ECE | agreement | less soft targets | less alone |"
    body = ["|---|---|---|---|---|---|---|---|"]
    for name in names:
        found = scores[name]
        line = lines(rows[name].title, len(found), {m: [x[m] for x in found] for m in METRICS})
        gains = [difference(found, scores[other]) if name != other else "" for other in (soft, alone)]
        body.append(f"{line} {gains[0]} | {gains[1]} |")
    return "\n".join([head, *body])


def difference(scores: list[dict[str, float]], others: list[dict[str, float]]) -> str:
    """Mean of the paired differences of accuracy in points, with half the width of its 95% interval."""
    gains = [100 * (a["accuracy"] - b["accuracy"]) for a, b in zip(scores, others, strict=True)]
    if len(gains) < 2:
        return f"{gains[0]:+.2f}"
    half = stats.t.ppf(0.975, len(gains) - 1) * statistics.stdev(gains) / len(gains) ** 0.5
    return f"{statistics.mean(gains):+.2f} ± {half:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    runner = Runner(args.out, args.jobs)
    runner.capture()
    rows = students(piloted(runner))
    jobs = [(name, student, seed) for seed in range(args.seeds) for name, student in rows.items()]
    done = runner.all(jobs)
    scores = {name: [x["test"] for (n, *_), x in zip(jobs, done, strict=True) if n == name] for name in rows}
    rows["two-stages"] = Student("hint first, then soft targets", "hints.py:second")
    scores["two-stages"] = [line["test"] for line in runner.two_stages(args.seeds)]
    held = ed.open_cache(runner.cache)
    bytes_of = {tap: bytes_per_row(held.tap_codec(tap).arrays()) for tap in held.taps}
    before, _, after = PAGE.read_text().partition(HEADING)
    rest = after.partition("\n## ")
    PAGE.write_text(f"{before.rstrip()}\n\n{section(rows, scores, bytes_of)}{''.join(rest[1:])}")
    print(PAGE)


if __name__ == "__main__":
    main()
