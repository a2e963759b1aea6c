"""What is chosen after the capture: members and their shares, the rule, temperatures, views, weights of rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Cli, load_module

from ensemble_distill import ArraySource, Cache, EnsembleConfig, open_cache
from ensemble_distill.errors import UsageError
from ensemble_distill.evaluation.fit_weights import fit_weights

MEMBERS = 'codec={"name":"members"}'
KEPT = 'codec={"name":"members","inner":{"name":"topk","k":4}}'
ROWS = np.arange(50)


@pytest.fixture(scope="module")
def members(captured: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline's folder with a cache of all members in ``members`` and one of four classes of each in ``kept``."""
    folder = tmp_path_factory.mktemp("members") / "work"
    shutil.copytree(captured, folder)
    for name, codec in (("members", MEMBERS), ("kept", KEPT)):
        Cli(folder)("cache", "digits.py", "--out", name, "--set", codec)
    return folder


@pytest.fixture
def cli(members: Path, tmp_path: Path) -> Cli:
    return Cli(shutil.copytree(members, tmp_path / "work"))


@pytest.fixture
def cache(members: Path) -> Cache:
    return open_cache(members / "members")


def single(cache: Cache, name: str, **more: object) -> np.ndarray:
    """What one member said, float64 [B, C]."""
    chosen = cache.mixed(EnsembleConfig(weights={name: 1.0}, **more))
    return chosen.targets_at(ROWS, 1).logprobs.double().numpy()


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(np.maximum(p, 1e-300))).sum(1)


def test_a_members_cache_says_what_a_mixture_cache_does(cache: Cache, captured: Path) -> None:
    found = cache.targets_at(ROWS, 1).logprobs
    expected = open_cache(captured / "cache").targets_at(ROWS, 1).logprobs
    assert torch.allclose(found, expected, rtol=2**-9, atol=1e-4)


def test_one_member_alone_is_that_member(cache: Cache, members: Path) -> None:
    pipeline = load_module(members / "digits.py")
    images = torch.from_numpy(pipeline.arrays()[0][ROWS])
    for member in pipeline.cache().members:
        net = member.build()
        from safetensors.torch import load_file

        net.load_state_dict(load_file(members / f"{member.name}.safetensors"))
        said = torch.log_softmax(net(images), 1)
        found = cache.mixed(EnsembleConfig(weights={member.name: 1.0})).targets_at(ROWS, 0).logprobs
        assert torch.allclose(found, said, atol=0.02, rtol=2e-3)


@pytest.mark.parametrize("combine", ["mean_probs", "mean_logits"])
def test_chosen_mixtures_equal_the_float64_oracle(cache: Cache, combine: str) -> None:
    a, c = (single(cache, name) for name in "ac")
    chosen = EnsembleConfig(
        weights={"a": 0.25, "c": 0.75}, combine=combine, temperatures={"a": 2.0}, temperature=1.5
    )  # fmt: skip
    targets = cache.mixed(chosen).targets_at(ROWS, 1)
    p, q = softmax(a / 2), softmax(c)
    mixed = np.log(0.25 * p + 0.75 * q) if combine == "mean_probs" else 0.25 * np.log(p) + 0.75 * np.log(q)
    expected = softmax(mixed / 1.5)
    assert np.abs(targets.logprobs.double().exp().numpy() - expected).max() < 1e-5
    assert np.allclose(targets.entropy.numpy(), entropy(expected), atol=1e-4)
    spread = entropy(0.25 * p + 0.75 * q) - 0.25 * entropy(p) - 0.75 * entropy(q)
    assert np.allclose(targets.mutual_information.numpy(), spread, atol=1e-4)
    assert targets.label_logprob is None  # that of the captured mixture would be another's


def test_a_share_of_zero_leaves_a_member_out(cache: Cache) -> None:
    with_zero = cache.mixed(EnsembleConfig(weights={"a": 1.0, "b": 0.0})).targets_at(ROWS)
    assert torch.equal(with_zero.logprobs, cache.mixed(EnsembleConfig(weights={"a": 1.0})).targets_at(ROWS).logprobs)


def test_kept_classes_of_members_are_mixed_linearly(members: Path) -> None:
    kept = open_cache(members / "kept")
    parts = [kept.mixed(EnsembleConfig(weights={n: 1.0})).targets_at(ROWS) for n in "ab"]
    mixed = kept.mixed(EnsembleConfig(weights={"a": 0.1, "b": 0.9})).targets_at(ROWS)
    assert torch.allclose(mixed.logprobs.exp(), 0.1 * parts[0].logprobs.exp() + 0.9 * parts[1].logprobs.exp())
    assert torch.allclose(mixed.residual, 0.1 * parts[0].residual + 0.9 * parts[1].residual)


def test_what_a_cache_cannot_mix_is_refused(cache: Cache, members: Path, captured: Path) -> None:
    with pytest.raises(UsageError, match=r"has no member 'd'"):
        cache.mixed(EnsembleConfig(weights={"d": 1.0}))
    with pytest.raises(UsageError, match=r"keeps the members' mixture only"):
        open_cache(captured / "cache").mixed(EnsembleConfig(weights={"a": 1.0}))
    for choice in ({"combine": "mean_logits"}, {"temperature": 2.0}, {"temperatures": {"a": 2.0}}):
        with pytest.raises(UsageError, match=r"keeps 4 classes of each member"):
            open_cache(members / "kept").mixed(EnsembleConfig(**choice))


def test_students_of_one_cache_learn_from_ensembles_of_their_own(cli: Cli) -> None:
    train = ["train", "digits.py", "--cache", "members", "--set", "epochs=1"]
    first = cli(*train, "--out", "a", "--set", 'ensemble.weights={"a": 1}').stdout
    other = cli(
        *train, "--out", "b", "--set", 'ensemble.weights={"b": 0.5, "c": 0.5}', "--set", "ensemble.combine=mean_logits"
    )
    assert first.splitlines()[-2] != other.stdout.splitlines()[-2]
    # What a run is compared with is the ensemble that taught it.
    scores = json.loads(cli("evaluate", "digits.py", "--run", "a", "--json").stdout)
    line = json.loads((cli.folder / "a" / "metrics.jsonl").read_text().splitlines()[-1])
    assert scores["kl"] == pytest.approx(line["test"]["kl"], abs=1e-6)
    refused = cli(*train, "--out", "a", "--set", 'ensemble.weights={"b": 1}', code=3)
    assert "ensemble" in refused.stderr


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ('{"a": 0.5, "b": 0.4}', "the shares sum to 0.9, expected 1"),
        ('{"a": 1.5, "b": -0.5}', "greater than or equal to 0"),
        ('{"a": 1, "x": 0}', "has no member 'x'"),
        ("a", "valid dictionary"),
    ],
)
def test_shares_that_are_none_are_refused(cli: Cli, weights: str, message: str) -> None:
    stderr = cli(
        "train", "digits.py", "--cache", "members", "--out", "r", "--set", f"ensemble.weights={weights}", code=2
    ).stderr
    assert message in stderr
    assert not (cli.folder / "r").exists()


def test_views_of_a_cache_are_walked_as_far_as_asked(cli: Cli) -> None:
    cli("train", "digits.py", "--cache", "cache", "--out", "one", "--set", "views=1", "--set", "epochs=2")
    cli("cache", "digits.py", "--out", "single", "--views", "1")
    cli("train", "digits.py", "--cache", "single", "--out", "two", "--set", "epochs=2")
    one, two = (json.loads((cli.folder / r / "metrics.jsonl").read_text().splitlines()[1]) for r in ("one", "two"))
    assert one["train"] == two["train"]
    stderr = cli("train", "digits.py", "--cache", "cache", "--out", "r", "--set", "views=3", code=2).stderr
    assert "views=3" in stderr and "holds 2 view(s)" in stderr


WEIGHT = """

def careful():
    return train().model_copy(update={"weight": %s, "objective": {"soft": ed.SoftTargets()}})
"""


def weighted(cli: Cli, weight: str, code: int = 0) -> str:
    with (cli.folder / "digits.py").open("a") as file:
        file.write(WEIGHT % weight)
    done = cli("train", "digits.py:careful", "--cache", "cache", "--out", "w", "--set", "epochs=1", code=code)
    return done.stdout if code == 0 else done.stderr


def test_rows_are_weighted_by_a_function_of_their_figures(cli: Cli) -> None:
    assert weighted(cli, "lambda rows: 1 - rows.mutual_information.clamp(max=1)").count("epoch 1/1") == 1


def test_a_weight_of_zero_leaves_rows_out(captured: Path) -> None:
    from ensemble_distill.losses import soft_targets

    targets = open_cache(captured / "cache").targets_at(ROWS)
    logits = torch.randn(50, 10, generator=torch.Generator().manual_seed(0))
    keep = targets.label_logprob > -0.1
    picked = open_cache(captured / "cache").targets_at(ROWS[keep.numpy()])
    assert torch.allclose(soft_targets(logits, targets, 1.0, keep.float()), soft_targets(logits[keep], picked))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ("lambda rows: 1.0", "weight() gave float, expected a tensor [20]"),
        ("lambda rows: rows.logprobs", "weight() gave shape [20, 10], expected a tensor [20]"),
        ("lambda rows: rows.entropy - 9", "weight() gave -"),
        ("lambda rows: rows.enthalpy", "no attribute 'enthalpy'"),
        ("lambda rows: rows.logprobs.exp_().amax(1)", "weight() writes into a tensor that it was given"),
    ],
)
def test_weights_that_are_none_are_refused_before_the_first_step(cli: Cli, weight: str, message: str) -> None:
    assert message in weighted(cli, weight, code=2)
    assert not (cli.folder / "w" / "checkpoint.json").exists()


def test_shares_are_fitted_to_held_out_labels(cli: Cli, cache: Cache) -> None:
    printed = cli("fit-weights", "digits.py", "--cache", "members").stdout
    report = json.loads(cli("fit-weights", "digits.py", "--cache", "members", "--json").stdout)
    nll = report["nll"]
    assert nll["fitted"] <= min(nll["captured"], nll["equal"], *(m["nll"] for m in report["members"].values())) + 1e-6
    assert nll["elsewhere"] >= nll["fitted"] - 1e-6
    assert sum(report["ensemble"]["weights"].values()) == pytest.approx(1, abs=1e-9)
    assert report["settings"][0] in printed
    settings = [part for setting in report["settings"] for part in ("--set", setting)]
    cli("train", "digits.py", "--cache", "members", "--out", "fitted", "--set", "epochs=1", *settings)


def test_temperatures_are_fitted_with_them(cli: Cli) -> None:
    fit = ["fit-weights", "digits.py", "--cache", "members", "--json"]
    plain = json.loads(cli(*fit).stdout)["nll"]
    report = json.loads(cli(*fit, "--temperatures").stdout)
    assert report["nll"]["fitted"] < plain["fitted"]
    settings = [part for setting in report["settings"] for part in ("--set", setting)]
    cli("train", "digits.py", "--cache", "members", "--out", "tempered", "--set", "epochs=1", *settings)
    assert "temperature after averaging" in cli(*fit[:-1], "--temperatures").stdout
    assert "keeps 4 classes" in cli("fit-weights", "digits.py", "--cache", "kept", "--temperatures", code=2).stderr


def label_nll(cache: Cache, source: ArraySource) -> float:
    """What the targets of a split's samples give to their labels, nats."""
    batch = next(iter(cache.loader(source, len(source), split="held_out", shuffle=False)))
    return -float(batch.targets.logprobs.gather(1, batch.labels[:, None]).mean())


@pytest.mark.parametrize("more", [["temperature=3", "combine=mean_logits"], ["calibrate=held_out"]])
def test_what_is_fitted_is_worth_what_is_said(cli: Cli, more: list[str]) -> None:
    """Also where the capture tempers members and their mixture: what is printed is absolute, as students take it."""
    if "calibrate=held_out" not in more:
        cli.change("build=lambda: Net(48), ", "build=lambda: Net(48), temperature=HOT[name], ")
        cli.change("VIEW_SEED = 3", 'VIEW_SEED = 3\nHOT = {"a": 4.0, "b": 0.5, "c": 1.0}')
    options = [part for setting in (MEMBERS, *more) for part in ("--set", setting)]
    cli("cache", "digits.py", "--out", "tempered", "--views", 1, *options)
    cache = open_cache(cli.folder / "tempered")
    source = load_module(cli.folder / "digits.py").data().sources["held_out"]
    for temperatures in (False, True):
        report = fit_weights(cache, source, "held_out", temperatures=temperatures)
        assert report["nll"]["captured"] == pytest.approx(label_nll(cache, source), abs=1e-5)
        fitted = cache.mixed(EnsembleConfig(**report["ensemble"]))
        assert report["nll"]["fitted"] == pytest.approx(label_nll(fitted, source), abs=1e-4)
        assert report["nll"]["fitted"] <= report["nll"]["equal"] + 1e-6
    said = cli("fit-weights", "digits.py", "--cache", "tempered").stdout
    assert "--set ensemble.temperature=1.0" in said.replace("'", "")


def test_shares_can_be_fitted_to_kept_classes(cli: Cli) -> None:
    report = json.loads(cli("fit-weights", "digits.py", "--cache", "kept", "--json").stdout)
    assert report["nll"]["fitted"] <= report["nll"]["equal"] + 1e-6


def test_fitting_without_members_or_labels_is_refused(cli: Cli) -> None:
    assert "keeps the members' mixture only" in cli("fit-weights", "digits.py", "--cache", "cache", code=2).stderr
    assert "no split 'x'" in cli("fit-weights", "digits.py", "--cache", "members", "--split", "x", code=2).stderr


@pytest.mark.parametrize(("cache", "width"), [("kept", 12), ("kept", 9), ("members", 12)])
def test_a_student_of_more_or_fewer_outputs_than_classes_is_refused(cli: Cli, cache: str, width: int) -> None:
    cli.change("return Net(16)", f"net = Net(16)\n    net.head = nn.Linear(16, {width})\n    return net")
    soft = ["--set", "objective.soft.temperature=1"]
    said = cli("train", "digits.py", "--cache", cache, "--out", "r", *soft, code=2).stderr
    assert f"the student gives {width} logits for each sample, and the cache has 10 classes" in said
    assert not (cli.folder / "r").exists()


def test_views_without_transforms_are_draws(cli: Cli) -> None:
    """Of what no transform changes, a codec that draws gives each view a draw of its own."""
    cli.change("transforms=(ed.Crop(padding=1),), ", "")
    cli("cache", "digits.py", "--out", "draws", "--set", 'codec={"name":"varopt","k":3}')
    cache = open_cache(cli.folder / "draws")
    first, second = (cache.targets_at(np.arange(1000), view) for view in (0, 1))
    assert not torch.equal(first.ids, second.ids)
    cli(
        "train",
        "digits.py",
        "--cache",
        "draws",
        "--out",
        "r",
        "--set",
        "epochs=2",
        "--set",
        "objective.soft.temperature=1",
    )
    assert "only varopt and sampled draw anew" in cli("cache", "digits.py", "--out", "none", code=2).stderr


def test_reports_say_who_taught_and_in_which_order_it_was_tempered(cli: Cli, cache: Cache) -> None:
    taught = cache.mixed(EnsembleConfig(weights={"a": 0.25, "c": 0.75}, temperatures={"a": 2.0})).taught_by()
    assert taught == {
        "combine": "mean_probs",
        "shares": {"a": 0.25, "c": 0.75},
        "temperatures": {"a": 2.0, "c": 1.0},
        "temperature": 1.0,
    }
    chosen = ["--set", 'ensemble.weights={"a": 1}', "--set", "ensemble.temperature=2", "--set", "epochs=1"]
    printed = cli("train", "digits.py", "--cache", "members", "--out", "r", *chosen).stdout
    assert "targets: mean_probs of a 1 at T 1; then T 2 after averaging" in printed
    assert json.loads((cli.folder / "r" / "config.json").read_text())["taught_by"]["temperature"] == 2
    assert json.loads(cli("evaluate", "digits.py", "--run", "r", "--json").stdout)["taught_by"]["shares"] == {"a": 1.0}
    assert "then T 1 after averaging" in cli("inspect", "members").stdout


def test_temperatures_that_a_codec_cannot_give_are_refused_before_anything_is_written(cli: Cli) -> None:
    cli("cache", "digits.py", "--out", "draws", "--views", "1", "--set", 'codec={"name":"varopt","k":3}')
    cli("cache", "digits.py", "--out", "few", "--views", "1", "--set", 'codec={"name":"topk","k":1,"temperatures":[8]}')
    train = ["train", "digits.py", "--out", "r", "--set", "epochs=1"]
    refused = cli(*train, "--cache", "draws", code=2).stderr
    assert "temperature 2.0: a sample of classes cannot be tempered" in refused and "topk or dense" in refused
    assert (
        "can be tempered between 1 and 8"
        in cli(*train, "--cache", "few", "--set", "objective.soft.temperature=9", code=2).stderr
    )
    assert not (cli.folder / "r").exists()
    warned = cli(*train, "--cache", "few", "--set", "objective.soft.temperature=8").stderr
    assert "note: objective.soft: at temperature 8 the kept classes hold" in warned
