"""What a member may be and say, how members share the mixture, and what is refused before anything is written."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Cli

import ensemble_distill as ed
from ensemble_distill.ensemble.identity import state_digest, structure_digest
from ensemble_distill.ensemble.members import load_members

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
        value = dict.fromkeys(NUMBERS, 1.0) | changes
        self.register_buffer("mean", torch.tensor([value["buffer"]]), persistent=False)
        self.register_buffer("sparse", torch.tensor([value["sparse"]]).to_sparse())
        self.scale, self.array = torch.tensor([value["tensor"]]), np.array([value["array"]], ">f4")
        self.table, self.nested = {"a": value["table"]}, [{"b": [value["nested"]]}]
        self.number, self.complex = np.float32(value["numpy scalar"]), complex(value["complex"])
        self._private, self._tables = value["private"], {"a": np.array([value["private table"]])}
        self.config = SimpleNamespace(scale=value["object"], inner=Settings(value["object in an object"]))
        self.parts = [filled(value["hidden weight"]), {"a": filled(1.0)}]
        self.parts[1]["a"].scale = value["hidden number"]
        self.trunk = filled(value["left out of the state"])
        self.one, self.other = torch.nn.functional.relu, partial(torch.mul, other=value["partial"])
        table = {"a": value["table in a cell"]}
        self.function = lambda x, by=value["default"]: x * by * table["a"]
        self.by_function = {torch.relu: 1, (lambda x: x): value["by a function"], Scaled: 2}
        self.some = {"a", "b", value["set"]}
        self.register_forward_pre_hook(hook(value["hook"]))
        self.extra = value["extra state"]
        self._path, self._clock = f"/home/{next(Settings.made)}", SimpleNamespace(now=next(Settings.made))

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, object]:
        state = super().state_dict(*args, **kwargs)
        return {name: tensor for name, tensor in state.items() if not name.startswith("trunk.")}

    def get_extra_state(self) -> object:
        return {"v": self.extra, "f": lambda: 0}

    def set_extra_state(self, state: object) -> None: ...


NUMBERS = (
    "buffer", "sparse", "tensor", "array", "table", "nested", "numpy scalar", "complex", "private", "private table",
    "object", "object in an object", "hidden weight", "hidden number", "left out of the state", "partial", "default",
    "table in a cell", "by a function", "set", "hook", "extra state",
)  # fmt: skip


class Settings:
    """Of which each instance knows when and from where it was made."""

    made = itertools.count()

    def __init__(self, scale: float) -> None:
        self.scale, self.path, self._number = scale, f"/home/{next(self.made)}", next(self.made)
        self.logger, self.again = logging.getLogger(self.path), self


def filled(value: float) -> torch.nn.Linear:
    part = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(part.weight, value)
    torch.nn.init.constant_(part.bias, 0)
    return part


def hook(by: float) -> Callable[..., object]:
    return lambda module, args: (args[0] * by,)


def who(module: torch.nn.Module) -> tuple[str, str]:
    return state_digest(module), structure_digest(module)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_is_no_weight_is_part_of_who_a_member_is(name: str) -> None:
    assert who(Scaled()) == who(Scaled())  # whose functions, objects and addresses are others
    assert who(Scaled(**{name: 2.0})) != who(Scaled())


def test_names_of_functions_are_part_of_who_a_member_is() -> None:
    one, other = Scaled(), Scaled()
    other.one = torch.nn.functional.gelu
    assert who(one) != who(other)


def test_a_set_has_no_order() -> None:
    one, other = torch.nn.Identity(), torch.nn.Identity()
    one.some, other.some = {0, 8}, {8, 0}
    assert list(one.some) != list(other.some) and who(one) == who(other)


class Prints(torch.nn.Module):
    def extra_repr(self) -> str:
        return f"act={hook(1.0)}"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "build",
    [
        Prints,
        lambda: torch.nn.Sequential(torch.nn.LSTM(2, 2), torch.nn.TransformerEncoderLayer(2, 1)),
        lambda: torch.compile(torch.nn.Linear(2, 2)),
        lambda: torch.fx.symbolic_trace(torch.nn.Linear(2, 2)),
    ],
)
def test_what_a_module_is_made_of_is_the_same_each_time(build: Callable[[], torch.nn.Module]) -> None:
    def seeded() -> tuple[str, str]:
        torch.manual_seed(0)
        return who(build())

    assert seeded() == seeded()


def test_plain_modules_are_who_they_have_always_been() -> None:
    part = torch.nn.Sequential(filled(1.0), torch.nn.ReLU())
    part.scale = 2
    assert [digest[:12] for digest in who(part)] == ["3921aefe1506", "a99fe45b06b0"]


def test_members_that_are_one_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """Each lambda of a loop builds what its last round named."""
    seeds = (1.0, 2.0, 3.0)
    load_members([ed.Member(name=f"m{seed:g}", build=lambda seed=seed: filled(seed)) for seed in seeds])
    assert not caplog.records
    late = [ed.Member(name=f"m{seed:g}", build=lambda: filled(seed)) for seed in seeds]  # noqa: B023
    load_members([*late, *[ed.Member(name=n, build=lambda: len, version="1") for n in "ab"]])
    assert [r.getMessage() for r in caplog.records] == [
        "members 'm1', 'm2', 'm3' have the same weights and structure (in a loop: lambda i=i: …)"
    ]
