"""Tables of statistics and scores, shared by commands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ensemble_distill.cache.plan import Calibration
from ensemble_distill.cli.console import Console, table

if TYPE_CHECKING:
    from ensemble_distill.cache.plan import Capture


def show_statistics(console: Console, statistics: Mapping[str, Any]) -> None:
    """Accuracy, NLL and ECE of members and ensemble on the splits without augmentation, or on all there is."""
    splits = {n: s for n, s in statistics.items() if n != "train"} or dict(statistics)
    for split, figures in splits.items():
        rows = [
            [name, f"{v['accuracy']:.2%}", f"{v['nll']:.4f}", f"{v['ece']:.4f}"]
            for name, v in sorted(figures.get("predictors", {}).items(), key=lambda kv: kv[0] == "ensemble")
        ]
        title = f"{split}: {figures['rows']:,} rows, members disagree on {figures['disagreement']:.2%}"
        if rows:
            console.table(table(title, ["", "accuracy", "NLL", "ECE"], rows))
        else:
            console.say(f"{title} (no labels)")


def show_calibration(console: Console, calibration: Calibration | None) -> None:
    """The temperatures that were fitted before a capture, and NLL and ECE of the rows that they were fitted on."""
    if calibration is None:
        return
    on, names = calibration.on, [*(member.name for member in calibration.on.members), "ensemble"]
    temperatures = [*calibration.temperature_before, calibration.temperature_after]
    rows = [
        [
            name,
            f"{t:.4f}",
            *(f"{a:.4f} → {b:.4f}" for a, b in (calibration.worth[name].nll, calibration.worth[name].ece)),
        ]
        for name, t in zip(names, temperatures, strict=True)
    ]
    console.table(table(f"calibrated on {on.rows:,} rows of {on.split}", ["", "temperature", "NLL", "ECE"], rows))


def show_tail(console: Console, capture: Capture) -> None:
    """What a capture with top-k members cannot say, or only assumes; nothing where all members gave all classes."""
    names = ", ".join(member.name for member in capture.members if member.gives == "topk")
    if capture.tail == "unknown":
        console.say(f"top-k     {names}: exact are the kept classes, and all others as one class; not known are the")
        console.say("          entropy, the mutual information and labels that were not listed (NaN in the rows)")
    if capture.tail == "uniform":
        console.say(f"top-k     {names}: classes not listed are taken as even, so no row is exactly what was said")
    if capture.tail:
        console.say("          accuracy, NLL and ECE take classes not listed as even")


def scores(values: Mapping[str, float]) -> str:
    """``accuracy 92.3%  nll 0.221 …``."""
    shown = []
    for name, value in values.items():
        percent = name in ("accuracy", "agreement")
        shown.append(f"{name} {value:.2%}" if percent else f"{name} {value:.4f}")
    return "  ".join(shown)
