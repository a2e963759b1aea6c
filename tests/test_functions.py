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
THRESHOLD, OTHER, WORDS = {threshold}, {threshold}, {{"a", "b", "c", "d"}}

def helper(x, most={most}):
    '''{doc}'''
    return x.clamp(max=most)  # {doc}

def make(share):
    return lambda rows: share * helper(rows.entropy) {sign} (max(WORDS) if rows in {{"a", "b", "c"}} else THRESHOLD)

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


READS = """
import functools, numpy as np, torch

G = {value}
G.append(G) if isinstance(G, list) else None

def reads(rows):
    return [G for _ in rows]

def keeps(kept):
    return lambda rows: kept

def names(rows):
    return rows.G
"""


@pytest.mark.parametrize(
    ("value", "other"),
    [
        ("(1.0, 2.0)", "(2.0, 1.0)"), ("[1, (2, [3])]", "[1, (2, [4])]"), ("{0: 1.0, 1: 2.0}", "{0: 1.0, 1: 3.0}"),
        ("{'a', 'b'}", "{'a', 'c'}"), ("np.arange(3)", "np.arange(3.0)"), ("np.arange(3)", "np.arange(3) ** 2"),
        ("np.float32(1)", "np.float32(2)"), ("np.array([{1: 2}, None])", "np.array([{1: 3}, None])"),
        ("torch.ones(3, 1)", "torch.ones(1, 3)"), ("torch.ones(3)", "-torch.ones(3)"),
        ("{'a': [torch.zeros(2), np.ones(2)]}", "{'a': [torch.zeros(2), np.zeros(2)]}"),
        ("functools.partial(print, sep=' ')", "functools.partial(print, sep='')"),
    ],
)  # fmt: skip
def test_the_tables_arrays_and_tensors_that_a_function_reads_are_part_of_it(value: str, other: str) -> None:
    one, same, changed = ({}, {}, {})
    for names, text in ((one, value), (same, value), (changed, other)):
        exec(READS.format(value=text), names)
    assert digest(one["reads"]) == digest(same["reads"]) != digest(changed["reads"])
    kept = [digest(names["keeps"](names["G"])) for names in (one, same, changed)]
    assert kept[0] == kept[1] != kept[2]
    assert digest(one["names"]) == digest(changed["names"]), "an attribute is no global of that name"


def test_what_does_not_leaves_it() -> None:
    assert digest(made(doc="two")) == digest(made())
    assert not digests(ed.TrainConfig(student=dict, objective={"soft": ed.SoftTargets()}), without="student")
    ask = f"names = {{}}; exec({MADE.format(**SAME)!r}, names); print(_Said().of(names['weight']))"
    said = [
        subprocess.run(
            [sys.executable, "-c", f"from ensemble_distill.training.functions import _Said; {ask}"],
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
