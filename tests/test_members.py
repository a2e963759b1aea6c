"""What a member may be and say, how members share the mixture, and what is refused before anything is written."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from conftest import Cli

from ensemble_distill.ensemble.members import state_digest, structure_digest

CACHE = ("cache", "digits.py", "--out", "cache")
NAMED = 'ed.Member(name=name, build=lambda: Net(48), weights=HERE / f"{name}.safetensors") for name in ("a", "b", "c")'


def members(cli: Cli, stated: Sequence[str], names: Sequence[str] = ("a", "b", "c")) -> None:
    """Give the pipeline these members, with what is stated of each; without taps."""
    made = [
        f'ed.Member(name="{name}", build=lambda: Net(48), weights=HERE / "a.safetensors", {more})'
        for name, more in zip(names, stated, strict=True)
    ]
    cli.change(NAMED, f"m for m in ({', '.join(made)},)")
    cli.change('taps=(ed.Tap(member="a", module="pool"),),', "")


def refused(cli: Cli, *words: str, more: Sequence[str] = (), code: int = 2) -> None:
    """One sentence with these words, and nothing written."""
    error = cli(*CACHE, *more, code=code).stderr
    assert error.startswith("error: ") and all(word in error for word in words), error
    assert not (cli.folder / "cache" / "PLAN").exists()


# Shares, temperatures, names ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        (("share=0.5", "share=0.5", ""), ("'c' states no share",)),
        (("share=0.5", "share=0.25", "share=0.24"), ("sum to 0.99", "expected 1")),
        (("share=1", "share=1", "share=1"), ("sum to 3", "expected 1")),
        (("share=1.5", "share=-0.25", "share=-0.25"), ("digits.py", "share", "greater than 0")),
        (("share=1", "share=0", "share=0"), ("share", "greater than 0")),
        (("share=float('nan')", "share=0.5", "share=0.5"), ("share", "finite")),
        (("share=float('inf')", "share=0.5", "share=0.5"), ("share", "finite")),
        (("temperature=0", "", ""), ("temperature", "greater than 0")),
        (("temperature=-1", "", ""), ("temperature", "greater than 0")),
        (("temperature=float('inf')", "", ""), ("temperature", "finite")),
        (("temperature=float('nan')", "", ""), ("temperature", "finite")),
    ],
)
def test_shares_and_temperatures_that_mean_nothing_are_refused(
    cli: Cli, stated: Sequence[str], words: Sequence[str]
) -> None:
    members(cli, stated)
    refused(cli, *words)


@pytest.mark.parametrize("value", ["0", "-2", "inf", "-inf", "nan", "NaN", "Infinity", "1e999", "hot"])
def test_a_temperature_that_is_none_is_refused_on_the_command_line(cli: Cli, value: str) -> None:
    refused(cli, "--set temperature", more=("--set", f"temperature={value}"))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("a", "b", "a"), ("two members are named 'a'",)),
        (("a", "b", "A"), ("'a' and 'A'", "case")),
        (("a", "ensemble", "b"), ("'ensemble'", "statistics")),
        (("a", "b", "Ensemble"), ("'ensemble'", "statistics")),
        (("a", "b", "c.d"), ("pattern",)),
        (("a", "b", ""), ("pattern",)),
        (("a", "b", "n" * 101), ("100 characters",)),
    ],
)
def test_names_that_overlap_are_refused(cli: Cli, names: Sequence[str], words: Sequence[str]) -> None:
    members(cli, ("", "", ""), names)
    refused(cli, *words)


def test_a_tap_stands_once(cli: Cli) -> None:
    tap = 'ed.Tap(member="a", module="pool"),'
    cli.change(tap, tap + tap)
    refused(cli, "two taps", "'tap/a.pool'")


def plan(cli: Cli, name: str = "cache") -> dict:
    return json.loads(cli("inspect", name, "--json").stdout)["plan"]


def test_the_plan_holds_the_shares_that_add_up_to_one(cli: Cli) -> None:
    members(cli, ("share=0.5", "share=0.3", "share=0.2"))
    cli(*CACHE, "--limit", 20)
    assert [m["share"] for m in plan(cli)["capture"]["members"]] == [0.5, 0.3, 0.2]
    for stated in ("share=0.5", "share=0.3", "share=0.2"):
        cli.change(stated, "")
    cli("cache", "digits.py", "--out", "equal", "--limit", 20)
    assert [m["share"] for m in plan(cli, "equal")["capture"]["members"]] == [1 / 3] * 3


class Scaled(torch.nn.Module):
    """A member whose numbers stand in no weight: each of them decides what it says."""

    def __init__(self, **changes: float) -> None:
        super().__init__()
        value = {"buffer": 1.0, "tensor": 1.0, "array": 1.0, "table": 1.0, "nested": 1.0} | changes
        self.register_buffer("mean", torch.tensor([value["buffer"]]), persistent=False)
        self.scale, self.array = torch.tensor([value["tensor"]]), np.array([value["array"]])
        self.table, self.nested = {"a": value["table"]}, [{"b": [value["nested"]]}]


@pytest.mark.parametrize("name", ["buffer", "tensor", "array", "table", "nested"])
def test_a_number_that_is_no_weight_is_part_of_who_a_member_is(name: str) -> None:
    def who(module: torch.nn.Module) -> tuple[str, str]:
        return state_digest(module), structure_digest(module)

    assert who(Scaled()) == who(Scaled())
    assert who(Scaled(**{name: 2.0})) != who(Scaled())
