"""Cache the committed teachers, train one student with and one without them, and compare.

    python pipelines/quickstart.py --out runs/quickstart

Every step is a command that you can type; what is there already is reused. Leaves the cache, both runs,
``summary.json`` and ``compare.png`` in the folder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import nn

from ensemble_distill.device import place
from ensemble_distill.evaluation.evaluate import latency
from fashion_mnist import alone, cache, data, train

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PIPELINE = os.path.relpath(Path(__file__).with_name("fashion_mnist.py"))


def command(*args: object) -> None:
    """Run one command of ensemble-distill, shown as it could be typed."""
    print(f"\n$ ensemble-distill {' '.join(map(str, args))}", flush=True)
    subprocess.run([sys.executable, "-m", "ensemble_distill", *map(str, args)], check=True)


def side_by_side(commands: dict[str, tuple[object, ...]]) -> None:
    """Run several commands at once, the cores shared out, each line of output under its command's name.

    Networks as small as the student are no faster on two threads than on one.
    """
    threads = str(max(1, (os.cpu_count() or 1) // len(commands)))
    processes = {}
    for name, args in commands.items():
        print(f"\n$ ensemble-distill {' '.join(map(str, args))}    # as [{name}]", flush=True)
        processes[name] = subprocess.Popen(
            [sys.executable, "-m", "ensemble_distill", *map(str, args)],
            env=os.environ | {"OMP_NUM_THREADS": threads}, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def follow(name: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            print(f"[{name}] {line}", end="", flush=True)

    with ThreadPoolExecutor(len(processes)) as pool:
        list(pool.map(follow, processes, processes.values()))
    for name, process in processes.items():
        if process.wait() != 0:
            sys.exit(f"{name}: exit {process.returncode}")


def report(*args: object) -> dict[str, Any]:
    output = subprocess.run(
        [sys.executable, "-m", "ensemble_distill", *map(str, args)], check=True, capture_output=True, text=True
    ).stdout
    return json.loads(output)


class Mixture(nn.Module):
    """The ensemble as one module: what it would cost to deploy."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.softmax(member(images), 1) for member in self.members]).mean(0).log()


def teacher_rows(statistics: dict[str, Any]) -> list[dict[str, Any]]:
    """Members and ensemble: scores as captured on the test split, size and latency measured here."""
    modules = {}
    for member in cache().members:
        module = member.build()
        module.load_state_dict(load_file(member.weights))
        modules[member.name] = place(module.eval(), torch.device("cpu"))
    named = {name: (f"member {name}", module) for name, module in modules.items()}
    named["ensemble"] = (f"ensemble of {len(modules)}", Mixture(list(modules.values())))
    return [row(title, statistics["test"]["predictors"][name], module) for name, (title, module) in named.items()]


def row(name: str, scores: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    images = torch.from_numpy(data().sources["test"].load(torch.arange(64).numpy()).inputs["image"])
    cpu = torch.device("cpu")
    return {
        "name": name,
        "params": sum(p.numel() for p in module.parameters()),
        **{key: scores[key] for key in ("accuracy", "nll", "ece", "agreement")},
        "latency_ms_1": latency(module, {"image": images}, 1, cpu),
        "latency_ms_64": latency(module, {"image": images}, 64, cpu),
    }


def student_row(name: str, run: Path, scores: dict[str, Any], build: Any) -> dict[str, Any]:
    module = build()
    module.load_state_dict(load_file(run / "student.safetensors"))
    return row(name, scores, place(module.eval(), torch.device("cpu")))


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="Fashion-MNIST, test split", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for i, title in enumerate(["", "parameters", "accuracy", "NLL", "ECE", "agreement", "ms, batch 1", "ms, batch 64"]):
        table.add_column(title, justify="left" if i == 0 else "right", no_wrap=True)
    for r in rows:
        table.add_row(
            r["name"], f"{r['params']:,}", f"{r['accuracy']:.2%}", f"{r['nll']:.4f}", f"{r['ece']:.4f}",
            f"{r['agreement']:.2%}", f"{r['latency_ms_1']:.2f}", f"{r['latency_ms_64']:.1f}",
        )  # fmt: skip
    print()
    Console(width=120, highlight=False).print(table)


def draw(rows: list[dict[str, Any]], runs: dict[str, Path], path: Path) -> None:
    """Accuracy against parameters, and the students' learning curves on the held-out split."""
    colours = {"member": "#9aa5b1", "ensemble": "#1f3a5f", "student alone": "#d98032", "student distilled": "#2a8c6a"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for r in rows:
        colour = next(c for name, c in colours.items() if r["name"].startswith(name))
        left.scatter(r["params"], 100 * r["accuracy"], s=70, color=colour, zorder=3)
        if not r["name"].startswith("member"):
            left.annotate(
                f"{r['name']}\n{r['accuracy']:.2%}", (r["params"], 100 * r["accuracy"]), xytext=(0, 9),
                textcoords="offset points", ha="center", va="bottom", fontsize=9, color=colour,
            )  # fmt: skip
    members = [r for r in rows if r["name"].startswith("member")]
    left.annotate(
        "members", (min(r["params"] for r in members), 100 * min(r["accuracy"] for r in members)), xytext=(0, -12),
        textcoords="offset points", ha="center", va="top", fontsize=9, color="#6b7785",
    )  # fmt: skip
    left.set(xscale="log", xlabel="parameters", ylabel="test accuracy, %", title="Accuracy against size")
    left.margins(x=0.25, y=0.25)
    for name, run in runs.items():
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        curve = [(line["epoch"], 100 * line["held_out"]["accuracy"]) for line in lines if "held_out" in line]
        right.plot(*zip(*curve, strict=True), color=colours[name], label=name, linewidth=2)
    right.xaxis.get_major_locator().set_params(integer=True)
    right.set(xlabel="epoch", ylabel="held-out accuracy, %", title="Same student, same start, same steps")
    right.legend(frameon=False, loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    out: Path = parser.parse_args().out
    start = time.perf_counter()
    runs = {"student alone": out / "alone", "student distilled": out / "distilled"}
    command("cache", PIPELINE, "--out", out / "cache")
    side_by_side(
        {
            "alone": ("train", f"{PIPELINE}:alone", "--cache", out / "cache", "--out", runs["student alone"]),
            "distilled": ("train", PIPELINE, "--cache", out / "cache", "--out", runs["student distilled"]),
        }
    )

    rows = teacher_rows(report("inspect", out / "cache", "--json")["statistics"])
    for (name, run), config in zip(runs.items(), (alone(), train()), strict=True):
        scores = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["test"]
        rows.append(student_row(name, run, scores, config.student))
    show(rows)
    (out / "summary.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, runs, out / "compare.png")
    print(f"\n{out}/summary.json, {out}/compare.png, {out}/cache; {time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
