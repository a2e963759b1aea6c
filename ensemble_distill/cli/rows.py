"""Single samples of a cache, found by key or by how badly the ensemble did, as a person wants to see them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ensemble_distill.cache.cache import Cache
from ensemble_distill.cache.groups import MAIN, ROW
from ensemble_distill.cli import console as ui
from ensemble_distill.codec import Members
from ensemble_distill.codecs.heads import decode
from ensemble_distill.errors import Mismatch, UsageError, printable
from ensemble_distill.mixture import Mixture
from ensemble_distill.recording.fidelity import scattered

SHOWN = 5
BAR = 24
CHUNK = 1 << 14

Place = tuple[str, int]  # split and row


def find(held: Cache, keys: Iterable[str], splits: Sequence[str]) -> list[Place]:
    """The samples whose content keys begin with these hexadecimal digits, in these splits.

    Of equal samples the first. UsageError for what is no key or begins several, Mismatch for what is not there.
    """
    return [_find(held, key.lower(), splits) for key in keys]


def _find(held: Cache, prefix: str, splits: Sequence[str]) -> Place:
    if not re.fullmatch(r"[0-9a-f]{1,32}", prefix):
        raise UsageError(f"--rows {prefix}: expected 1 to 32 hexadecimal digits of a content key")
    found: dict[tuple[str, bytes], int] = {}
    for split in splits:
        keys = held.table(split).keys
        for row in np.flatnonzero(_begins(keys, prefix)):
            found.setdefault((split, keys[row].tobytes()), int(row))
            if len(found) > SHOWN:
                break
    if not found:
        raise Mismatch(
            f"{held.root} has no sample whose key begins with {prefix} in {', '.join(splits)}",
            hint="`inspect --worst 20` shows keys; other splits: --split",
        )
    if len(found) > 1:
        some = ", ".join(f"{key.hex()} ({split})" for split, key in list(found)[:SHOWN])
        raise UsageError(f"--rows {prefix}: several samples' keys begin with it: {some}", hint="give more digits")
    return next((split, row) for (split, _), row in found.items())


def _begins(keys: np.ndarray, prefix: str) -> np.ndarray:
    """Which keys (uint8 [N, 16]) begin with hexadecimal digits, bool [N]."""
    whole = np.frombuffer(bytes.fromhex(prefix[: len(prefix) // 2 * 2]), np.uint8)
    result: np.ndarray = (keys[:, : len(whole)] == whole).all(axis=1)
    if len(prefix) % 2:
        result &= keys[:, len(whole)] >> 4 == int(prefix[-1], 16)
    return result


def worst(held: Cache, split: str, view: int, count: int) -> tuple[list[Place], str]:
    """The rows with the lowest log-probability of their label, or, without labels, the highest mutual information.

    And in words which of the two it was.
    """
    group, rows = held.plan.said[-1], np.arange(len(held.table(split)))
    if ROW not in group.codecs:
        raise Mismatch(f"{held.root} holds no figures of rows", hint="give keys with --rows")
    parts = [rows[i : i + CHUNK] for i in range(0, len(rows), CHUNK)]
    arrays = [held.arrays_at(group, part, view, split)[ROW] for part in parts]
    label, information = (
        np.concatenate([a[name].float().numpy() for a in arrays]) for name in ("label_logprob", "mutual_information")
    )
    labelled = not np.isnan(label).all()
    order = np.argsort(np.nan_to_num(label, nan=math.inf) if labelled else -information, kind="stable")
    what = "lowest log-probability of the label" if labelled else "highest mutual information (there are no labels)"
    return [(split, int(rows[i])) for i in order[:count]], what


def sample(held: Cache, place: Place, view: int) -> dict[str, Any]:
    """One sample: key, place, figures in nats, the likeliest classes, and what each member said where it was kept."""
    split, row = place
    at = np.array([row])
    targets = held.targets_at(at, view, split=split)
    probabilities = scattered(targets)[0]
    best = probabilities.topk(min(SHOWN, int((probabilities > 0).sum()))).indices.tolist()
    members = {}
    if isinstance(codec := held.head, Members):
        arrays = held.said_at(at, view, split)[MAIN]
        for name in codec.members:
            alone = decode(codec, arrays, Mixture(((name, 1.0),), "mean_probs"))
            members[name] = scattered(alone)[0]
    names = held.plan.reading.classes
    figures = {name: getattr(targets, name) for name in ("label_logprob", "entropy", "mutual_information")}
    return {
        "split": split,
        "row": row,
        "view": view,
        "key": held.table(split).keys[row].tobytes().hex(),
        **{name: _number(value) for name, value in figures.items()},
        "kind": targets.kind,
        "classes": [
            {"name": names[i], "probability": float(probabilities[i])}
            | ({"members": {name: float(p[i]) for name, p in members.items()}} if members else {})
            for i in best
        ],
        "others": max(0.0, 1 - float(probabilities[best].sum())),
    }


def _number(value: Any) -> float | None:
    return None if value is None or math.isnan(float(value[0])) else float(value[0])


def show(console: ui.Console, shown: dict[str, Any]) -> None:
    """A sample as lines and a table with bars."""
    console.say(f"{shown['split']} row {shown['row']:,}, view {shown['view']}, key {shown['key']}")
    console.say("  " + "; ".join(_figures(shown)))
    members = list(shown["classes"][0].get("members", {}))[:8]
    rows = [
        [c["name"], f"{c['probability']:.4f}", bar(c["probability"]), *(f"{c['members'][m]:.4f}" for m in members)]
        for c in shown["classes"]
    ]
    rows.append(["all others", f"{shown['others']:.4f}", bar(shown["others"]), *("" for _ in members)])
    weight = "weight" if shown["kind"] == "unbiased" else "ensemble"
    table = ui.table("", ["  class", weight, "", *members], [[f"  {printable(r[0])}", *r[1:]] for r in rows])
    table.columns[2].justify = "left"
    console.table(table)


def _figures(shown: dict[str, Any]) -> list[str]:
    parts = []
    if (label := shown["label_logprob"]) is not None:
        parts.append(f"label's log-probability {label:.3f} (p = {math.exp(label):.2g})")
    for name in ("entropy", "mutual_information"):
        if shown[name] is not None:
            parts.append(f"{name.replace('_', ' ')} {shown[name]:.3f} nats")
    return parts


def bar(probability: float) -> str:
    """A bar of eighths of a character, BAR characters for 1."""
    eighths = round(min(1.0, max(0.0, probability)) * BAR * 8)
    return "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8].strip())
