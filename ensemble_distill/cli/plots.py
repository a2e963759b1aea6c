"""`inspect --plot`: calibration, agreement, entropies and classes of one split, as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ensemble_distill.errors import StorageError, UsageError

# Okabe and Ito: told apart by people who see fewer colours.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00")
ENSEMBLE, GREY = "#000000", "#8a8f98"
MARKERS = "osD^vP"
NAMED_CLASSES = 30
NAMED_MEMBERS = 10


def plot(path: str, split: str, figures: Mapping[str, Any], classes: tuple[str, ...]) -> None:
    """Draw the statistics of a split into a file (png, pdf or svg, as its name says).

    UsageError where matplotlib or what it should draw is missing.
    """
    if Path(path).suffix not in (".png", ".pdf", ".svg"):
        raise UsageError(f"--plot {path}: expected a name that ends in .png, .pdf or .svg")
    if "names" not in figures:
        raise UsageError(f"this cache has no statistics of {split} to draw", hint="seal it again with this release")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("--plot needs matplotlib", hint="pip install 'ensemble-distill[plot]'") from error
    figure = Figure(figsize=(12, 9.5), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    figure.suptitle(f"{split}: {figures['rows']:,} rows", fontsize=14, x=0.01, ha="left", fontweight="bold")
    (reliability, agreement), (entropy, by_class) = figure.subplots(2, 2)
    _reliability(reliability, figures)
    _agreement(figure, agreement, figures)
    _entropy(entropy, figures, len(classes))
    _by_class(by_class, figures, classes)
    try:
        figure.savefig(path)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}") from error


def _titled(axes: Any, title: str, x: str = "", y: str = "") -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)


def _nothing(axes: Any, why: str) -> None:
    axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes, color=GREY)
    axes.set_xticks([])
    axes.set_yticks([])


def _styles(names: list[str]) -> dict[str, dict[str, Any]]:
    """How each predictor is drawn: the ensemble bold and black, members by colour and marker, or grey if many."""
    members = names[:-1]
    if len(members) > len(COLOURS):
        styles = {name: {"color": GREY, "linewidth": 0.8, "alpha": 0.6, "markersize": 0} for name in members}
    else:
        styles = {
            name: {"color": COLOURS[i], "marker": MARKERS[i], "linewidth": 1.4, "markersize": 4.5}
            for i, name in enumerate(members)
        }
    return styles | {names[-1]: {"color": ENSEMBLE, "linewidth": 2.4, "marker": "o", "markersize": 5.5}}


def _once(name: str, names: list[str]) -> str:
    """The label of a line where all members look alike."""
    return name if name == names[-1] else "members" if name == names[0] else "_"


def _reliability(axes: Any, figures: Mapping[str, Any]) -> None:
    least = min(10, figures["rows"] // 50)  # what a few rows say is noise
    left_out = f" (bins of fewer than {least} rows are left out)" if least > 1 else ""
    _titled(axes, "Reliability: is a confidence borne out?", f"confidence{left_out}", "accuracy at this confidence")
    predictors = figures["predictors"]
    if "reliability" not in predictors["ensemble"]:
        _nothing(axes, "no labels, or too many members")
        return
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", zorder=1)
    styles = _styles(figures["names"])
    for name, style in styles.items():
        bins = predictors[name]["reliability"]
        there = [i for i, n in enumerate(bins["rows"]) if n >= max(1, least)]
        label = f"{name} (ECE {predictors[name]['ece']:.3f})"
        if style.get("markersize") == 0:
            label = _once(name, figures["names"])
        xs, ys = ([bins[k][i] for i in there] for k in ("confidence", "accuracy"))
        axes.plot(xs, ys, label=label, zorder=3 if name == "ensemble" else 2, **style)
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
    axes.legend(loc="upper left", frameon=False, fontsize=9)


def _agreement(figure: Any, axes: Any, figures: Mapping[str, Any]) -> None:
    _titled(axes, "Agreement: rows with the same top class, %")
    if "pairs" not in figures:
        _nothing(axes, "too many members for a matrix")
        return
    names, matrix = figures["names"], 1 - np.array(figures["pairs"])
    apart = matrix[~np.eye(len(matrix), dtype=bool)]
    low, high = min(apart, default=0.0), max(apart, default=1.0)
    np.fill_diagonal(matrix, np.nan)  # with itself: 100% would leave no colours to tell the others apart
    axes.set_facecolor("#e3e5e8")
    image = axes.imshow(matrix, cmap="cividis", vmin=low, vmax=max(high, low + 1e-3))
    few = len(names) <= NAMED_MEMBERS
    ticks = range(len(names)) if few else [len(names) - 1]
    axes.set_xticks(ticks, [names[i] for i in ticks], rotation=30 if max(map(len, names)) > 6 and few else 0)
    axes.set_yticks(ticks, [names[i] for i in ticks])
    axes.spines[:].set_visible(False)
    for i, j in np.ndindex(matrix.shape) if few else ():
        colour = "black" if i == j or matrix[i, j] > (low + high) / 2 else "white"
        text = "–" if i == j else f"{100 * matrix[i, j]:.1f}"
        axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=9)
    if not few:
        bar = figure.colorbar(image, ax=axes, shrink=0.8)
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.1f}%")
        bar.outline.set_visible(False)


def _entropy(axes: Any, figures: Mapping[str, Any], classes: int) -> None:
    _titled(axes, f"Entropy of the ensemble (at most log {classes} = {math.log(max(2, classes)):.2f})", "nats", "rows")
    counts = figures["entropy_histogram"]
    edges = np.linspace(0, math.log(max(2, classes)), len(counts) + 1)
    axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=COLOURS[1], edgecolor="white")
    mean = figures["predictors"]["ensemble"]["entropy"]
    axes.axvline(mean, color=ENSEMBLE, linewidth=1.4, linestyle="--", label=f"mean {mean:.3f} nats")
    mutual = figures["mutual_information"]
    axes.axvline(mutual, color=COLOURS[5], linewidth=1.4, linestyle=":", label=f"mutual information {mutual:.3f} nats")
    axes.set_xlim(-0.01 * edges[-1], 1.01 * edges[-1])
    axes.set_yscale("symlog", linthresh=max(1, max(counts) / 1000))
    axes.set_ylim(0, 2 * max(1, *counts))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.legend(loc="upper right", frameon=False, fontsize=9)


def _by_class(axes: Any, figures: Mapping[str, Any], classes: tuple[str, ...]) -> None:
    _titled(axes, "Accuracy by class, worst first", "accuracy")
    held = figures.get("classes")
    if held is None:
        _nothing(axes, "no labels, or too many classes to be kept")
        return
    rows = np.array(held["rows"])
    there = np.flatnonzero(rows)
    accuracy = {name: np.array(held["correct"][name])[there] / rows[there] for name in figures["names"]}
    order = np.argsort(accuracy["ensemble"], kind="stable")
    if len(there) <= NAMED_CLASSES:
        _named_classes(axes, accuracy, order, [classes[i] for i in there], figures["names"])
    else:
        places = np.arange(len(order))
        for name, style in _styles(figures["names"]).items():
            plain = style | {"marker": "", "linewidth": 2.0 if name == "ensemble" else 0.7}
            axes.plot(places, accuracy[name][order], label=_once(name, figures["names"]), **plain)
        axes.set_xlabel(f"{len(order)} classes, in the order of the ensemble's accuracy")
        axes.set_ylabel("accuracy")
        axes.legend(loc="lower right", frameon=False, fontsize=9)


def _named_classes(
    axes: Any, accuracy: Mapping[str, np.ndarray], order: np.ndarray, classes: list[str], names: list[str]
) -> None:
    """A line a class: the ensemble's dot among those of the members."""
    places = np.arange(len(order))[::-1]
    members = np.stack([accuracy[name][order] for name in names[:-1]])
    axes.hlines(places, members.min(0), members.max(0), color="#c9ccd1", linewidth=5, zorder=1)
    for name, style in _styles(names).items():
        own = style | {"linewidth": 0, "markersize": 7 if name == "ensemble" else style["markersize"]}
        axes.plot(accuracy[name][order], places, label=name, zorder=3 if name == "ensemble" else 2, **own)
    labels = [text if len(text) <= 18 else f"{text[:17]}…" for text in (classes[i] for i in order)]
    axes.set_yticks(places, labels, fontsize=9 if len(order) <= 20 else 7, parse_math=False)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    axes.set_axisbelow(True)
    axes.grid(axis="x", color="#eceef1")
    if len(names) <= len(COLOURS) + 1:
        axes.legend(loc="lower left", frameon=False, fontsize=9)
