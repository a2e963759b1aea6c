"""Options that several commands share reach them as one object."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import click
import pytest
from click.testing import CliRunner
from conftest import Cli, flip, load_module, shard_of

from ensemble_distill.cli import repair
from ensemble_distill.cli.options import Common, Reading, common, reading
from ensemble_distill.cli.pipeline import overridden

SHARED = {"common": common, "reading": reading}
DEFAULTS = {
    "common": Common(limit=None, batch_size=None, workers=1, device="auto", quiet=False),
    "reading": Reading(
        expect_digest=None, allow_partial=False, manifest=None, memory=None, copies=None, copies_size=10_000
    ),
}
GIVEN = {
    "common": Common(limit=1, batch_size=2, workers=3, device="cuda:0", quiet=True),
    "reading": Reading(
        expect_digest="ab", allow_partial=True, manifest="cd", memory=4, copies="here", copies_size=5
    ),
}  # fmt: skip


def called(*args: str) -> dict[str, Any]:
    """What a command with all shared options, and one of its own between them, is called with."""
    held: dict[str, Any] = {}

    @click.command()
    @reading
    @click.option("--own", default=0)
    @common
    def command(**options: Any) -> None:
        """What it does."""
        held.update(options)

    assert command.help == "What it does."
    result = CliRunner().invoke(command, args, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return held


def flags(shared: Any) -> list[str]:
    """As they are typed: a switch where it is on."""
    said = []
    for name, value in dataclasses.asdict(shared).items():
        said += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return said


def test_every_shared_option_reaches_its_field() -> None:
    assert called() == DEFAULTS | {"own": 0}
    assert called(*flags(GIVEN["common"]), "--own", "7", *flags(GIVEN["reading"])) == GIVEN | {"own": 7}


@pytest.mark.parametrize("name", list(SHARED))
def test_every_shared_option_has_a_field(name: str) -> None:
    @click.command()
    @SHARED[name]
    def command(**options: Any) -> None: ...

    exposed = [param.name for param in command.params if param.expose_value]
    assert exposed == [field.name for field in dataclasses.fields(DEFAULTS[name])]
    with pytest.raises(dataclasses.FrozenInstanceError):
        DEFAULTS[name].memory = 1


def test_what_set_says_comes_last(cli: Cli) -> None:
    config = load_module(cli.folder / "digits.py").cache()
    changed = overridden(config, ["batch_size=9", "views=4"], batch_size=7, unit_rows=50, format=None)
    assert (changed.batch_size, changed.views, changed.unit_rows, changed.format) == (9, 4, 50, config.format)
    assert overridden(config, []) == config


def test_repair_captures_with_the_options_that_it_is_given(cached: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(shard_of(cached.folder / "cache", "train-v000000-00000004.targets"))
    held: dict[str, list[Any]] = {}
    for name in ("prepared", "run"):
        monkeypatch.setattr(
            f"ensemble_distill.cli.recording.{name}", lambda *args, name=name, **_: held.update({name: args})
        )
    monkeypatch.setattr("ensemble_distill.cli.console.logging.basicConfig", lambda **_: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "pipeline", None)
    args = [str(cached.folder / "cache"), str(cached.folder / "digits.py"), "--workers", "3", "--batch-size", "5"]
    CliRunner().invoke(repair.command, args, catch_exceptions=False)
    assert held["prepared"][4] == dataclasses.replace(DEFAULTS["common"], workers=3, batch_size=5)
    assert held["prepared"][2].batch_size == 5 and held["run"][3] == 3
