"""What takes long says how far it is: the library to whoever listens, the commands on a terminal and never in JSON."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import Cli, load_module
from hypothesis import given
from hypothesis import strategies as st

from ensemble_distill import Cache, open_cache
from ensemble_distill.cli import console as ui
from ensemble_distill.ensemble.ensemble import Ensemble
from ensemble_distill.ensemble.members import load_member
from ensemble_distill.evaluation import fit_weights as fitting
from ensemble_distill.phase import Phase, silent
from ensemble_distill.recording.audit import audit
from ensemble_distill.recording.capture import Recorder
from ensemble_distill.recording.planning import prepare
from ensemble_distill.recording.prices import price_list
from ensemble_distill.recording.probe import spread
from ensemble_distill.store.leases import Leases
from ensemble_distill.store.store import open_store

MEMBERS = 'codec={"name":"members"}'
CPU = [torch.device("cpu")]
TERMINAL = {"FORCE_COLOR": "1", "TERM": "xterm"}  # by which rich takes a file for a terminal
DONE = {
    "cache": "fitting temperatures  4/4 fits",
    "audit": "comparing  30/30 rows",
    "fit-weights": "fitting  3/3 fits",
    "plan": "measuring  148/148 rows",
}


class Heard:
    """A report that writes down what it is told: by phase, its unit, its total and what was done each time."""

    def __init__(self) -> None:
        self.phases: dict[str, tuple[str, int, list[int]]] = {}

    def __call__(self, phase: Phase) -> None:
        unit, total, done = self.phases.setdefault(phase.name, (phase.unit, phase.total, []))
        assert (unit, total) == (phase.unit, phase.total)
        done.append(phase.done)

    def steps(self, name: str, unit: str = "rows") -> list[int]:
        """What each batch added, once it is sure that the phase began at nothing and ended at its total."""
        said, total, done = self.phases[name]
        assert said == unit and done[0] == 0 and done[-1] == total
        return [after - before for before, after in itertools.pairwise(done)]


@pytest.fixture(scope="module")
def folder(teachers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline's folder with a cache of all members in ``members``."""
    folder = tmp_path_factory.mktemp("phases") / "work"
    shutil.copytree(teachers, folder)
    Cli(folder)("cache", "digits.py", "--out", "members", "--set", MEMBERS, "--views", 2)
    return folder


@pytest.fixture
def cache(folder: Path) -> Cache:
    return open_cache(folder / "members")


# A phase ----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 1000), min_size=1), st.floats(0.01, 1e4))
def test_pace_and_time_left_are_those_of_what_is_done(parts: list[int], seconds: float) -> None:
    heard = Heard()
    with pytest.MonkeyPatch.context() as patch:
        now = [5.0]
        patch.setattr("ensemble_distill.phase.time", SimpleNamespace(perf_counter=lambda: now[0]))
        phase = Phase("reading", sum(parts), heard, started=5.0)
        assert phase.share == 0 and phase.per_second == 0 and phase.seconds_left == math.inf
        for number, part in enumerate(parts, 1):
            now[0] = 5.0 + number * seconds
            phase.add(part)
            assert phase.per_second == pytest.approx(phase.done / (number * seconds))
            rest = phase.total - phase.done
            assert phase.seconds_left == pytest.approx(rest * number * seconds / phase.done)
    assert heard.steps("reading") == parts and phase.share == 1 and phase.seconds_left == 0


def test_a_phase_of_nothing_has_a_share() -> None:
    assert Phase("reading", 0, silent).share == 0


# The library ------------------------------------------------------------------------------------------


def test_a_calibration_tells_of_every_batch_and_every_fit(folder: Path, tmp_path: Path) -> None:
    pipeline = load_module(folder / "digits.py")
    data, config = pipeline.data(), pipeline.cache().model_copy(update={"calibrate": "held_out"})
    store = open_store(tmp_path / "cache", create=True)
    leases, heard = Leases(store.storage), Heard()
    plan, ensemble = prepare(data, config, data.sources, store, leases, CPU, report=heard)
    assert list(heard.phases) == ["reading held_out", "running the members on held_out", "fitting temperatures"]
    assert heard.steps("reading held_out") == [200]
    assert heard.steps("running the members on held_out") == [64, 64, 64, 8]
    assert heard.steps("fitting temperatures", "fits") == [1] * 4
    Recorder(plan, ensemble, data.sources, store, leases).run(span=range(1))
    again = Heard()
    prepare(data, config, data.sources, store, leases, CPU, report=again)
    assert list(again.phases) == ["reading held_out"]  # what was fitted is taken from the cache


def test_an_audit_tells_of_every_batch(folder: Path, cache: Cache) -> None:
    pipeline, heard = load_module(folder / "digits.py"), Heard()
    data, config = pipeline.data(), pipeline.cache()
    members = [load_member(member) for member in config.members]
    ensemble = Ensemble(members, config, len(data.classes), CPU, "fp32")
    result = audit(cache, ensemble, data, data.sources, 40, 0, batch_size=16, report=heard)
    steps = heard.steps("comparing")
    assert sum(steps) == sum(result.rows.values()) == 120
    assert max(steps) <= 16 and len(steps) >= 3 + 3 + 4  # held_out, test, and train in two views


@pytest.mark.parametrize("temperatures", [False, True])
def test_fitting_weights_tells_of_every_batch_and_every_fit(
    folder: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch, temperatures: bool
) -> None:
    monkeypatch.setattr(fitting, "BATCH", 64)
    source, fits = load_module(folder / "digits.py").data().sources["held_out"], 5 if temperatures else 1
    heard = Heard()
    found = fitting.fit_weights(cache, source, "held_out", temperatures=temperatures, report=heard)
    assert list(heard.phases) == ["reading", "fitting"]
    assert heard.steps("reading") == [50] * 16  # the mixture and three members, four batches each
    assert heard.steps("fitting", "fits") == [1] * 3 * fits  # all rows, and either half
    assert found == fitting.fit_weights(cache, source, "held_out", temperatures=temperatures)


def test_a_probe_tells_of_every_batch(folder: Path) -> None:
    pipeline, heard = load_module(folder / "digits.py"), Heard()
    data, config = pipeline.data(), pipeline.cache()
    found = price_list(data, config, data.sources, CPU, [2], 3, report=heard)
    sizes = [len(index) for _, index in spread(found.plan, 3)]
    assert heard.steps("measuring") == [sizes[0], *sizes]  # one to warm up


# The commands -----------------------------------------------------------------------------------------


def command(name: str, *more: object) -> list[object]:
    if name == "cache":
        return ["cache", "digits.py", "--out", "tuned", "--limit", 20, "--set", "calibrate=held_out", *more]
    options: dict[str, list[object]] = {
        "audit": ["--cache", "members", "--rows", 10],
        "fit-weights": ["--cache", "members"],
        "plan": ["--batches", 2],
    }
    return [name, "digits.py", *options[name], *more]


@pytest.fixture
def cli(folder: Path, tmp_path: Path) -> Cli:
    return Cli(shutil.copytree(folder, tmp_path / "work"))


@pytest.mark.parametrize("name", list(DONE))
def test_a_terminal_is_shown_how_far_it_is(cli: Cli, name: str) -> None:
    shown = cli(*command(name), **TERMINAL)
    assert DONE[name] in shown.stdout and "/s  0:00 left" in shown.stdout and "━" in shown.stdout
    assert shown.stderr == ""


@pytest.mark.parametrize("name", ["audit", "fit-weights", "plan"])
def test_with_json_it_is_shown_beside_it(cli: Cli, name: str) -> None:
    shown = cli(*command(name, "--json"), **TERMINAL)
    assert isinstance(json.loads(shown.stdout), dict) and DONE[name] in shown.stderr
    silent = cli(*command(name, "--json", "--quiet"), **TERMINAL)
    assert json.loads(silent.stdout).keys() == json.loads(shown.stdout).keys() and silent.stderr == ""


@pytest.mark.parametrize("name", list(DONE))
def test_what_is_no_terminal_gets_no_bar(cli: Cli, name: str) -> None:
    shown = cli(*command(name))
    assert "━" not in shown.stdout and "left" not in shown.stdout and shown.stderr == ""
    shutil.rmtree(cli.folder / "tuned", ignore_errors=True)
    assert cli(*command(name, "--quiet"), **TERMINAL).stdout == ""


PLAIN = ["reading  0/4 rows", "reading  3/4 rows  1.5 rows/s  0:01 left", "reading  4/4 rows  2 rows/s  0:00 left"]


@pytest.mark.parametrize(("every", "lines"), [(0.0, PLAIN), (1e9, [])])
def test_what_is_no_terminal_gets_a_plain_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], every: float, lines: list[str]
) -> None:
    monkeypatch.setattr(ui.logging, "basicConfig", lambda **_: None)
    monkeypatch.setattr(ui, "PLAIN_SECONDS", every)
    monkeypatch.setattr("ensemble_distill.phase.time", SimpleNamespace(perf_counter=lambda: 2.0))
    console = ui.Console(aside=True)
    with console.live():
        phase = Phase("reading", 4, console.phase, started=0.0)
        phase.add(3)
        phase.add(1)
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == lines
