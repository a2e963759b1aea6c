"""Temperatures and shares fitted to labels, against what is known of the best ones."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import Cli, flip, load_module, shard_of
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from ensemble_distill import open_cache
from ensemble_distill.calibration import COLDEST, HOTTEST, fit_shares, fit_temperature, mixture_nll
from ensemble_distill.recording.capture import Recorder
from ensemble_distill.recording.planning import prepare
from ensemble_distill.store.leases import Leases, lease_storage
from ensemble_distill.store.store import open_store


def drawn(seed: int, rows: int = 400, classes: int = 7, sharpness: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and labels drawn from them: calibrated as they are, but for chance."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = torch.log_softmax(sharpness * torch.randn(rows, classes, generator=generator), 1)
    return logprobs, torch.multinomial(logprobs.exp(), 1, generator=generator)[:, 0]


def nll(logprobs: torch.Tensor, labels: torch.Tensor, temperature: float) -> float:
    scaled = logprobs.double().numpy() / temperature
    normaliser = np.log(np.exp(scaled - scaled.max(1, keepdims=True)).sum(1)) + scaled.max(1)
    return float(np.mean(normaliser - scaled[np.arange(len(labels)), labels.numpy()]))


@given(st.integers(0, 50), st.floats(0.3, 4))
def test_no_other_temperature_is_better(seed: int, factor: float) -> None:
    logprobs, labels = drawn(seed)
    overconfident = torch.log_softmax(logprobs * factor, 1)
    best = fit_temperature(overconfident, labels)
    reached = nll(overconfident, labels, best)
    for other in (0.9 * best, 0.999 * best, 1.001 * best, 1.1 * best):
        assert reached <= nll(overconfident, labels, other) + 1e-12


def test_an_overconfident_member_is_cooled_by_what_it_was_heated_with() -> None:
    logprobs, labels = drawn(0, rows=20_000)
    one = fit_temperature(logprobs, labels)
    assert one == pytest.approx(1, abs=0.03)
    assert fit_temperature(torch.log_softmax(3 * logprobs, 1), labels) == pytest.approx(3 * one, rel=1e-4)


def test_temperatures_have_ends() -> None:
    certain = torch.log_softmax(torch.eye(5) * 3, 1)
    assert fit_temperature(certain, torch.arange(5)) == COLDEST
    assert fit_temperature(certain, (torch.arange(5) + 1) % 5) == HOTTEST


def test_a_label_called_impossible_does_not_make_it_infinite() -> None:
    logprobs = torch.tensor([[0.0, -torch.inf], [-0.1, -2.3]])
    assert COLDEST <= fit_temperature(logprobs, torch.tensor([1, 0])) <= HOTTEST


@given(st.integers(0, 50), st.integers(2, 5))
def test_no_other_shares_are_better(seed: int, members: int) -> None:
    generator = np.random.default_rng(seed)
    label = torch.from_numpy(np.log(generator.uniform(0.01, 1, (200, members))))
    found = fit_shares(label)
    assert sum(found.shares) == pytest.approx(1) and min(found.shares) >= 0
    assert found.nll == pytest.approx(mixture_nll(label, torch.tensor(found.shares)))
    for other in [*np.eye(members), *generator.dirichlet(np.ones(members), 50)]:
        p = np.exp(label.numpy()) @ other
        assert found.nll <= -np.log(np.maximum(p, 1e-300)).mean() + found.gap + 1e-9


def test_of_copies_any_shares_are_best_and_a_useless_member_gets_none() -> None:
    label = torch.log(torch.rand(300, 1, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.4)
    assert fit_shares(label.expand(-1, 3)).shares == pytest.approx((1 / 3,) * 3)
    worse = torch.cat([label, label - 2.0], 1)
    assert fit_shares(worse).shares == pytest.approx((1, 0), abs=1e-5)


# At capture -----------------------------------------------------------------------------------------

CALIBRATE = ("cache", "digits.py", "--out", "tuned", "--set", "calibrate=held_out")


def test_a_capture_is_calibrated_before_its_plan(cli: Cli) -> None:
    cli(*CALIBRATE)
    cache = open_cache(cli.folder / "tuned")
    record, reading = cache.calibration(), cache.plan.reading
    assert (record.temperature_before, record.temperature_after) == (
        reading.temperature_before, reading.temperature_after
    )  # fmt: skip
    assert len(set(record.temperature_before)) == 3 and 1 not in record.temperature_before
    for worth in record.worth.values():
        assert worth.nll[1] < worth.nll[0]
    shown = cli("inspect", "tuned").stdout
    assert "calibrated on 200 rows of held_out" in shown
    assert json.loads(cli("inspect", "tuned", "--json").stdout)["calibration"]["on"]["rows"] == 200


def test_captured_rows_have_the_fitted_temperatures(cli: Cli) -> None:
    cli(*CALIBRATE)
    cache = open_cache(cli.folder / "tuned")
    pipeline, rows = load_module(cli.folder / "digits.py"), np.arange(64)
    images = torch.from_numpy(pipeline.arrays()[0][rows])
    parts = []
    for member, t in zip(pipeline.cache().members, cache.plan.reading.temperature_before, strict=True):
        net = member.build()
        net.load_state_dict(load_file(cli.folder / f"{member.name}.safetensors"))
        z = net(images).detach().double() / t
        parts.append(torch.softmax(z, 1))
    mixed = torch.stack(parts).mean(0).log() / cache.plan.reading.temperature_after
    found = cache.targets_at(rows).logprobs
    assert torch.allclose(found.double().exp(), torch.softmax(mixed, 1), atol=1e-3)


def test_a_resumed_capture_keeps_its_calibration(cli: Cli) -> None:
    cli(*CALIBRATE, "--units", "0:1")
    before = sorted((cli.folder / "tuned" / "calibrations").iterdir())
    stamp = before[0].stat().st_mtime_ns
    cli(*CALIBRATE)
    after = sorted((cli.folder / "tuned" / "calibrations").iterdir())
    assert after == before and after[0].stat().st_mtime_ns == stamp
    cli("verify", "tuned")


def test_two_planners_agree_on_the_first_ones_temperatures(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second measures others, as another device might: the plan that was committed first decides."""
    pipeline = load_module(cli.folder / "digits.py")
    data, config = pipeline.data(), pipeline.cache().model_copy(update={"calibrate": "held_out"})
    cpu, recorders = [torch.device("cpu")], []
    store = open_store(cli.folder / "tuned", create=True)
    fit = fit_temperature
    for factor in (1.0, 1.001):
        monkeypatch.setattr(
            "ensemble_distill.recording.calibrate.fit_temperature", lambda p, y, factor=factor: factor * fit(p, y)
        )
        leases = Leases(lease_storage(store.storage))
        plan, ensemble = prepare(data, config, data.sources, store, leases, cpu)
        recorders.append(Recorder(plan, ensemble, data.sources, store, leases))
    assert recorders[0].plan != recorders[1].plan
    assert recorders[0].run(span=range(1)) is None
    assert recorders[1].run() is not None
    assert recorders[0].plan == recorders[1].plan
    assert recorders[1].ensemble.temperatures == recorders[0].plan.reading.temperature_before


def test_a_copy_has_the_calibration_and_gc_leaves_it(cli: Cli) -> None:
    cli(*CALIBRATE)
    cli("copy", "tuned", "copied")
    cli("gc", "copied", "--delete")
    assert open_cache(cli.folder / "copied").calibration() == open_cache(cli.folder / "tuned").calibration()
    flip(next((cli.folder / "copied" / "calibrations").iterdir()))
    assert "calibrations/" in cli("verify", "copied", code=4).stdout


def test_a_calibration_that_is_lost_is_the_file_to_restore(cli: Cli) -> None:
    """It cannot be mended, so nothing else is dropped before it is there again."""
    cli(*CALIBRATE)
    root = cli.folder / "tuned"
    path = next((root / "calibrations").iterdir())
    record = path.read_bytes()
    path.unlink()
    flip(shard_of(root, "test-v000000-00000001.targets"))
    before = sorted(file.name for file in root.rglob("*"))
    error = cli("repair", "tuned", "digits.py", "--set", "calibrate=held_out", code=4).stderr
    assert f"→ restore calibrations/{path.name} from a copy of the cache" in error and "PLAN" not in error
    assert sorted(file.name for file in root.rglob("*")) == before
    path.write_bytes(record)
    cli("repair", "tuned", "digits.py", *CALIBRATE[-2:])
    cli("verify", "tuned")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["calibrate=nope"], "there is no such split; there is"),
        (
            ["calibrate=held_out", "temperature=2"],
            "fits the temperature of the ensemble, which is stated too",
        ),
        (["calibrate=held_out", 'codec={"name":"members","inner":{"name":"topk","k":3}}'], "after averaging"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(cli: Cli, settings: list[str], message: str) -> None:
    options = [part for setting in reversed(settings) for part in ("--set", setting)]
    assert message in cli("cache", "digits.py", "--out", "tuned", *options, code=2).stderr
    assert not (cli.folder / "tuned" / "PLAN").exists()


def test_a_split_without_labels_calibrates_nothing(cli: Cli) -> None:
    cli.change('ed.ArraySource({"image": images[part]}, labels[part])', 'ed.ArraySource({"image": images[part]})')
    assert "it has no labels" in cli(*CALIBRATE, code=2).stderr
