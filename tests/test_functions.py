"""Functions of a configuration are known by what they do, not by their name."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from typing import Any

import pytest
from conftest import Cli

import ensemble_distill as ed
from ensemble_distill.training.functions import digests

MADE = """
THRESHOLD, OTHER = {threshold}, {threshold}

def helper(x, most={most}):
    '''{doc}'''
    return x.clamp(max=most)  # {doc}

def make(share):
    return lambda rows: share * helper(rows.entropy) {sign} (rows.top1() if rows in {{"a", "b", "c"}} else THRESHOLD)

weight = make({share})
"""
SAME = {"threshold": 1, "most": 2, "share": 3, "doc": "one", "sign": "<"}


def digest(weight: Any) -> str:
    objective = {"soft": ed.SoftTargets(rows=weight)}
    found = digests(ed.TrainConfig(student=dict, objective=objective, weight=weight), without="student")
    assert set(found) == {"weight", "objective.soft.rows", "python"}
    assert found["weight"] == found["objective.soft.rows"]
    return found["weight"]


def made(**changed: object) -> Any:
    names: dict[str, Any] = {}
    exec(MADE.format(**SAME | changed), names)
    return names["weight"]


@pytest.mark.parametrize("change", [{"threshold": 2}, {"most": 3}, {"share": 4}, {"sign": ">"}])
def test_what_changes_what_a_function_does_changes_its_digest(change: dict[str, object]) -> None:
    assert digest(made(**change)) != digest(made())
    assert digest(functools.partial(made(), 1)) not in (digest(functools.partial(made(), 2)), digest(made()))


def test_what_does_not_leaves_it() -> None:
    assert digest(made(doc="two")) == digest(made())
    assert not digests(ed.TrainConfig(student=dict, objective={"soft": ed.SoftTargets()}), without="student")
    ask = f"names = {{}}; exec({MADE.format(**SAME)!r}, names); print(_said(names['weight'], set()))"
    said = [
        subprocess.run(
            [sys.executable, "-c", f"from ensemble_distill.training.functions import _said; {ask}"],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert said[0] == said[1] != ""  # sets have another order in each process


def test_a_run_does_not_go_on_with_another_weight(cached: Cli) -> None:
    cached.change("objective={", "weight=lambda rows: rows.entropy * 2,\n        objective={")
    train = ["train", "digits.py", "--cache", "cache", "--out", "run", "--set", "epochs=1"]
    cached(*train)
    cached(*train)
    cached.change("rows.entropy * 2", "rows.entropy * 3")
    assert "another run: its functions.weight is" in cached(*train, code=3).stderr
    config = cached.folder / "run" / "config.json"
    said = json.loads(config.read_text())
    said["functions"]["python"] = "3.9"  # byte code that cannot be compared; the run's own guard sees the edit
    config.write_text(json.dumps(said))
    later = cached(*train, code=4).stderr
    assert "begun with another Python" in later and "config.json is damaged" in later
