"""Tables of statistics and scores, shared by commands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ensemble_distill.cache.plan import Calibration
from ensemble_distill.cli.console import Console, table
from ensemble_distill.codec import Features
from ensemble_distill.reduction import title

if TYPE_CHECKING:
    from ensemble_distill.cache.plan import Capture, Plan
# Of each predictor: the column's head and how a figure is shown.
COLUMNS = {
    "accuracy": ("accuracy", "{:.2%}"),
    "nll": ("NLL", "{:.4f}"),
    "ece": ("ECE", "{:.4f}"),
    "brier": ("Brier", "{:.4f}"),
    "entropy": ("entropy", "{:.4f}"),
    "agreement": ("agreement", "{:.2%}"),
}


def show_statistics(console: Console, statistics: Mapping[str, Any]) -> None:
    """The predictors' figures on the splits without augmentation, or on all there is, and what the codec lost."""
    splits = {n: s for n, s in statistics.items() if n != "train"} or dict(statistics)
    for split, figures in splits.items():
        title = f"{split}: {figures['rows']:,} rows, members disagree on {figures['disagreement']:.2%}"
        predictors = sorted(figures.get("predictors", {}).items(), key=lambda kv: kv[0] == "ensemble")
        if predictors and "accuracy" in predictors[0][1]:
            columns = [name for name in COLUMNS if name in predictors[0][1]]
            rows = [[name, *(COLUMNS[c][1].format(v[c]) for c in columns)] for name, v in predictors]
            console.table(table(title, ["", *(COLUMNS[c][0] for c in columns)], rows))
        else:
            console.say(f"{title} (no labels)")
        if together := _together(figures):
            console.say(together)
    _show_fidelity(console, statistics)


def section(statistics: Mapping[str, Any], name: str) -> dict[str, Any]:
    """For scripts, by split: ``fidelity``, or the figures of the ``ensemble`` and of its members together."""
    if name == "fidelity":
        return {split: figures["fidelity"] for split, figures in statistics.items() if "fidelity" in figures}
    together = ("disagreement", "mutual_information", "oracle", "leave_one_out")
    return {
        split: {key: value for key, value in figures["predictors"]["ensemble"].items() if key in COLUMNS}
        | {key: figures[key] for key in together if key in figures}
        for split, figures in statistics.items()
        if "ensemble" in figures.get("predictors", {})
    }


def _together(figures: Mapping[str, Any]) -> str:
    """What the members are together: ``mutual information 0.03 nats …``."""
    parts = [f"mutual information {figures['mutual_information']:.4f} nats"] if "mutual_information" in figures else []
    if "oracle" in figures:
        parts.append(f"some member is right on {figures['oracle']:.2%}")
    if (without := figures.get("leave_one_out")) and len(without) <= 12:
        parts.append("NLL without " + ", ".join(f"{name} {nll:.4f}" for name, nll in without.items()))
    return "; ".join(parts)


def _show_fidelity(console: Console, statistics: Mapping[str, Any]) -> None:
    rows = [
        [
            split,
            f"{f['rows']:,}",
            _figure(f["kl"], ".2g"),
            _figure(f["total_variation"], ".2g"),
            _figure(f["top1_agreement"], ".2%"),
            _figure(f["angle"], ".2f"),
            _figure(f["mean_angle"], ".2f"),
        ]
        for split, f in ((split, figures.get("fidelity")) for split, figures in statistics.items())
        if f
    ]
    columns = ["", "rows", "KL, nats", "total variation", "same top class", "angle, °", "of the mean, °"]
    if rows:
        console.table(table("fidelity of the codec, on a sample", columns, rows))


def _figure(value: float | None, kind: str) -> str:
    return "–" if value is None else format(value, kind)


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


def taught_by(taught: Mapping[str, Any]) -> str:
    """Whose predictions, tempered and averaged in which order: ``mean_probs of a .5 at T 1, b .5 at T 1.2, then …``."""
    members = ", ".join(
        f"{name} {share:.3g} at T {taught['temperatures'][name]:.4g}" for name, share in taught["shares"].items()
    )
    return f"{taught['combine']} of {members}; then T {taught['temperature']:.4g} after averaging"


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


def show_taps(console: Console, plan: Plan) -> None:
    """How each tap is taken and kept, where that is more than a mean in float16."""
    for group in plan.groups:
        for field, codec in group.codecs.items():
            if isinstance(codec, Features) and (codec.take or codec.project or codec.values != "fp16"):
                console.say(f"tap       {field}: {_taken(codec, plan.capture.distortions.get(field))}")


def _taken(codec: Features, distortion: float | None) -> str:
    parts = [f"{title(codec.take.reduction)} of {codec.take.what}"] if codec.take else []
    if codec.mask is not None:
        parts.append(f"the real ones by {codec.mask!r}")
    if codec.project:
        parts.append(f"projected to {codec.project.dim} ({codec.project.kind}, seed {codec.project.seed})")
    if distortion is not None:
        parts.append(f"squared distances change by {distortion:.1%} on average")
    return ", ".join([*parts, codec.values])


def scores(values: Mapping[str, float]) -> str:
    """``accuracy 92.3%  nll 0.221 …``."""
    shown = []
    for name, value in values.items():
        percent = name in ("accuracy", "agreement")
        shown.append(f"{name} {value:.2%}" if percent else f"{name} {value:.4f}")
    return "  ".join(shown)
