"""Train students of the Fashion-MNIST pipeline over several seeds and write docs/results.md.

    python pipelines/results.py --cache runs/quickstart/cache --out runs/results

What is finished already is reused, so the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PIPELINE = os.path.relpath(Path(__file__).with_name("fashion_mnist.py"))
METRICS = ("accuracy", "nll", "ece", "agreement")

# variant: (title, seeds)
STUDENTS = {
    "separable": ("other architecture, distilled", 1),
    "alone": ("student alone", 3),
    "train": ("student distilled", 3),
    "cool": ("student distilled, T = 1, soft targets only", 1),
}


def command(*args: object, threads: int | None = None) -> str:
    """What a command of ours prints; CalledProcessError if it fails."""
    env = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    line = [sys.executable, "-m", "ensemble_distill", *map(str, args)]
    return subprocess.run(line, check=True, stdout=subprocess.PIPE, env=env, text=True).stdout


def train(variant: str, seed: int, cache: Path, out: Path, threads: int) -> dict[str, Any]:
    """One run; its test scores and the step it ended at."""
    run = out / f"{variant}-{seed}"
    command = [
        *(sys.executable, "-m", "ensemble_distill", "train", f"{PIPELINE}:{variant}", "--cache", str(cache)),
        *("--out", str(run), "--set", f"seed={seed}"),
    ]
    log = out / f"{variant}-{seed}.log"
    with log.open("w") as file:
        subprocess.run(command, check=True, stdout=file, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    print(f"{variant}, seed {seed}: {log.read_text().splitlines()[-2]}", flush=True)
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def spread(values: list[float], percent: bool) -> str:
    scale, digits = (100, 2) if percent else (1, 4)
    mean = f"{scale * statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {scale * statistics.stdev(values):.{digits}f}"


def lines(name: str, seeds: int | str, scores: dict[str, list[float]]) -> str:
    figures = [spread(scores[m], m in ("accuracy", "agreement")) for m in METRICS]
    return f"| {name} | {seeds} | " + " | ".join(figures) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("runs/quickstart/cache"))
    parser.add_argument("--out", type=Path, default=Path("runs/results"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    jobs = [(variant, seed) for variant, (_, seeds) in STUDENTS.items() for seed in range(seeds)]
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    with ThreadPoolExecutor(args.jobs) as pool:
        done = list(pool.map(lambda job: train(*job, args.cache, args.out, threads), jobs))
    tests = {job: line["test"] for job, line in zip(jobs, done, strict=True)}
    path = Path("docs/results.md")
    _, heading, rest = path.read_text().partition("\n## ") if path.exists() else ("", "", "")
    path.write_text(
        page(args, tests, done[jobs.index(("train", 0))]["step"]) + heading + rest
    )  # other scripts' sections
    print("docs/results.md")


def page(args: argparse.Namespace, tests: dict[tuple[str, int], dict[str, float]], steps: int) -> str:
    held = json.loads(
        subprocess.run(
            [sys.executable, "-m", "ensemble_distill", "inspect", str(args.cache), "--json"],
            check=True, capture_output=True, text=True,
        ).stdout
    )  # fmt: skip
    predictors = held["statistics"]["test"]["predictors"]
    rows = [lines(f"member {n}", "", {m: [s[m]] for m in METRICS}) for n, s in predictors.items() if n != "ensemble"]
    rows.append(lines("**ensemble**", "", {m: [predictors["ensemble"][m]] for m in METRICS}))
    for variant, (title, seeds) in STUDENTS.items():
        scores = {m: [tests[variant, seed][m] for seed in range(seeds)] for m in METRICS}
        rows.append(lines(title, seeds, scores))
    gains = [tests["train", s]["accuracy"] - tests["alone", s]["accuracy"] for s in range(3)]
    gap = predictors["ensemble"]["accuracy"] - statistics.mean(tests["train", s]["accuracy"] for s in range(3))
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores ({cpu()})"
    views = held["plan"]["splits"]["train"]["views"]
    return f"""# Results

Fashion-MNIST, test split (10,000 images), written by

    python pipelines/results.py --cache {args.cache} --out {args.out}

on {machine}, Python {platform.python_version()}, torch {version("torch")}. Accuracy and agreement with the ensemble in
percent, NLL in nats; mean ± standard deviation over the seeds. The student alone and the student distilled take
{steps:,} steps of one size on the same {views} view(s) of each sample, the others 13 epochs; a seed gives the alone and
the distilled student the same start and the same order. What was tried on the way, and where the test images had a
say in it, stands in [the log](log.md).

| | seeds | accuracy | NLL | ECE | agreement |
|---|---|---|---|---|---|
{chr(10).join(rows)}

Distilled minus alone, paired by seed: {", ".join(f"{100 * g:+.2f}" for g in gains)}; mean
{100 * statistics.mean(gains):+.2f} points. The distilled student is {100 * gap:.2f} points below the ensemble.
"""


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if x.startswith("model name")] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor() or "unknown"


def version(distribution: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(distribution)


if __name__ == "__main__":
    main()
