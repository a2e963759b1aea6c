"""Statistics of a capture and what its codec lost, held against float64; `inspect` and `audit` on the command line."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli
from hypothesis import given, settings
from hypothesis import strategies as st
from small import a_plan
from test_codecs import drawn, round_trip, said

import ensemble_distill as ed
from ensemble_distill.cache.plan import Capture, MemberIdentity, Plan
from ensemble_distill.cli.plots import plot
from ensemble_distill.codec import Dense, HeadCodec, Members, Sampled, TopK, VarOpt
from ensemble_distill.errors import UsageError
from ensemble_distill.fingerprint import canonical_json
from ensemble_distill.formats.layout import read_segments
from ensemble_distill.losses import soft_targets
from ensemble_distill.metrics import count
from ensemble_distill.mixture import Mixture, combine
from ensemble_distill.recording.fidelity import fidelity
from ensemble_distill.store.local import LocalStorage
from ensemble_distill.store.records import MAX_COMMIT, PAGE_UNITS
from ensemble_distill.store.store import Store
from ensemble_distill.tally import BINS, FIDELITY, MAX_NUMBERS, MAX_STATE_BYTES, Tally, report_bytes, state_bytes
from ensemble_distill.targets import Targets

# Statistics -----------------------------------------------------------------------------------------


def logs(p: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(p, 1e-300))


def mixed(members: np.ndarray, shares: list[float], rule: str, temperature: float) -> np.ndarray:
    """The ensemble of members [M, B, C], as probabilities."""
    w = np.array(shares) / sum(shares)
    z = logs(np.einsum("m,mbc->bc", w, members)) if rule == "mean_probs" else np.einsum("m,mbc->bc", w, logs(members))
    p = np.exp(z / temperature)
    return p / p.sum(1, keepdims=True)


def entropies(p: np.ndarray) -> np.ndarray:
    return -(p * logs(p)).sum(-1)


def oracle(members: np.ndarray, labels: np.ndarray, shares: list[float], rule: str, t: float) -> dict[str, Any]:
    """The report in plain numpy, float64."""
    rows, (count_, _, classes) = np.arange(len(labels)), members.shape
    together = mixed(members, shares, rule, t)
    everyone = np.concatenate([members, together[None]])
    guess, w = everyone.argmax(2), np.array(shares) / sum(shares)
    right = guess == labels
    at = everyone[:, rows, labels]
    hot = np.eye(classes)[labels]
    keep = [[i for i in range(count_) if i != m] for m in range(count_)]
    left = [mixed(members[k], [shares[i] for i in k], rule, t)[rows, labels] for k in keep]
    pairs = [[float((a != b).mean()) for b in guess] for a in guess]
    inner = [pairs[i][j] for i in range(count_) for j in range(count_) if i != j]
    own = np.histogram(entropies(together), bins=20, range=(0, math.log(classes)))[0]
    return {
        "accuracy": right.mean(1),
        "nll": -logs(at).mean(1),
        "brier": ((everyone - hot) ** 2).sum(2).mean(1),
        "entropy": entropies(everyone).mean(1),
        "pairs": pairs,
        "disagreement": np.mean(inner) if inner else 0.0,
        "mutual_information": (entropies(np.einsum("m,mbc->bc", w, members)) - w @ entropies(members)).mean(),
        "oracle": right[:-1].any(0).mean(),
        "leave_one_out": [-logs(p).mean() for p in left],
        "histogram": own.tolist(),
        "class_rows": np.bincount(labels, minlength=classes).tolist(),
        "class_correct": [[int((r & (labels == c)).sum()) for c in range(classes)] for r in right],
        "class_nll": [[float(-logs(a)[labels == c].sum()) for c in range(classes)] for a in at],
    }


@settings(max_examples=40)
@given(
    st.integers(1, 4), st.integers(2, 9), st.sampled_from(["mean_probs", "mean_logits"]), st.sampled_from([1.0, 2.5]),
    st.integers(0, 999),
)  # fmt: skip
def test_a_report_equals_a_float64_one(members: int, classes: int, rule: str, t: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logprobs = [drawn(60, classes, 2.0, seed * 7 + m) for m in range(members)]
    labels, shares = rng.integers(0, classes, 60), rng.uniform(0.2, 3, members).tolist()
    names = [f"m{i}" for i in range(members)]
    mixture = Mixture(tuple(zip(names, shares, strict=True)), rule, t)
    together = torch.log_softmax(combine(logprobs, shares, rule) / t, 1)
    tally = Tally.empty([*names, "ensemble"], classes)
    for part in (slice(0, 25), slice(25, 60)):
        count(tally, [*(p[part] for p in logprobs), together[part]], torch.from_numpy(labels[part]), mixture)
    report = tally.report()
    expected = oracle(torch.stack(logprobs).double().exp().numpy(), labels, shares, rule, t)
    for figure in ("accuracy", "nll", "brier", "entropy"):
        found = [report["predictors"][name][figure] for name in report["names"]]
        np.testing.assert_allclose(found, expected[figure], rtol=1e-5, atol=1e-6, err_msg=figure)
    for figure in ("pairs", "disagreement", "mutual_information", "oracle"):
        np.testing.assert_allclose(report[figure], expected[figure], rtol=1e-4, atol=2e-6, err_msg=figure)
    if members > 1:
        found = [report["leave_one_out"][name] for name in names]
        np.testing.assert_allclose(found, expected["leave_one_out"], rtol=1e-5, atol=1e-5)
    else:
        assert "leave_one_out" not in report
    assert report["entropy_histogram"] == expected["histogram"]
    by_class = report["classes"]
    assert by_class["rows"] == expected["class_rows"]
    assert [by_class["correct"][name] for name in report["names"]] == expected["class_correct"]
    np.testing.assert_allclose([by_class["nll"][n] for n in report["names"]], expected["class_nll"], rtol=1e-5)
    json.dumps(report, allow_nan=False)


def test_the_disagreement_of_many_members_is_counted_by_votes() -> None:
    parts = [drawn(20, 4, seed=m) for m in range(70)]
    tally = Tally.empty([*(f"m{i}" for i in range(70)), "ensemble"], 4)
    count(tally, [*parts, parts[0]], None)
    guess = torch.stack(parts).argmax(2).numpy()
    expected = np.mean([(guess[i] != guess[j]).mean() for i in range(70) for j in range(i)])
    assert not tally.holds("pairs") and tally.report()["disagreement"] == pytest.approx(expected)


def test_reliability_is_what_the_calibration_error_is_made_of() -> None:
    labels = torch.arange(400) % 5
    tally = Tally.empty(["a", "ensemble"], 5)
    count(tally, [drawn(400, 5)] * 2, labels)
    figures = tally.report()["predictors"]["a"]
    bins = figures["reliability"]
    held = [i for i in range(BINS) if bins["rows"][i]]
    error = sum(bins["rows"][i] * abs(bins["confidence"][i] - bins["accuracy"][i]) for i in held) / 400
    assert sum(bins["rows"]) == 400 and error == pytest.approx(figures["ece"])
    assert all(i / BINS < bins["confidence"][i] <= (i + 1) / BINS + 1e-9 for i in held)


def test_impossible_classes_and_labels_stay_finite() -> None:
    one_hot = torch.tensor([[0.0, -math.inf, -math.inf]])
    for rule, t in (("mean_probs", 1.0), ("mean_probs", 2.0), ("mean_logits", 1.0)):
        tally = Tally.empty(["a", "b", "ensemble"], 3)
        mixture = Mixture((("a", 1.0), ("b", 1.0)), rule, t)
        count(tally, [one_hot] * 3, torch.tensor([2]), mixture)
        report = tally.report()
        json.dumps(report, allow_nan=False)
        assert report["predictors"]["a"]["nll"] == 65504 and report["leave_one_out"]["b"] == 65504
        assert report["predictors"]["a"]["brier"] == 2 and report["mutual_information"] == 0


def test_merging_a_thousand_states_is_exact_and_refuses_other_shapes() -> None:
    tallies = []
    for seed in range(50):
        tally = Tally.empty(["a", "b", "ensemble"], 4)
        count(tally, [drawn(8, 4, seed=seed + i) for i in range(3)], torch.arange(8) % 4)
        tallies.append(tally)
    states = [json.loads(json.dumps(tally.state())) for tally in tallies]
    whole = Tally.empty(["a", "b", "ensemble"], 4)
    whole.merge(states)
    for name, held in whole.sums.items():
        exact = [math.fsum(t.sums[name].reshape(-1)[i] for t in tallies) for i in range(held.size)]
        np.testing.assert_allclose(held.reshape(-1), exact, rtol=1e-14, err_msg=name)
    shapes = ({"nll": [1.0]}, {"correct": [[1], [2], [3]]}, {"names": ["a"]}, {"rows": [0.5]}, {"rows": [""]})
    for lie in shapes:
        with pytest.raises(ValueError, match=r"expected|of the kind"):
            Tally.empty(["a", "b", "ensemble"], 4).merge([states[0] | lie])
    with pytest.raises(ValueError, match="expected the sums"):
        Tally.empty(["a", "b", "ensemble"], 4).merge([{"names": ["a", "b", "ensemble"]}])


# What a commit may take -----------------------------------------------------------------------------


def with_members(count: int, classes: int = 3) -> Plan:
    members = tuple(MemberIdentity(name=f"m{i:04d}", weights="", structure="", share=1.0) for i in range(count))
    plan = a_plan(groups=1)
    reading = plan.reading.model_copy(update={"classes": tuple(f"c{i}" for i in range(classes))})
    return plan.model_copy(
        update={"capture": Capture(members=members, precision="fp32", batch_size=4), "reading": reading}
    )


@pytest.mark.parametrize(("members", "classes"), [(1, 1000), (3, 500), (62, 1500), (63, 10), (400, 4), (4, 5000)])
def test_statistics_stay_within_what_the_plan_allows_a_commit(members: int, classes: int) -> None:
    plan = with_members(members, classes)
    tally = Tally.empty(plan.predictors, classes)
    for held in tally.sums.values():  # the longest numbers: 2^48 rows, and floats of 24 characters
        held += 10**14 if held.dtype == np.int64 else -1.2345678901234567e-100
    size = len(canonical_json(tally.state()))
    assert size <= plan.statistics_bytes
    assert plan.page_bytes(PAGE_UNITS) >= PAGE_UNITS * (size + plan.commit_bytes)
    assert plan.statistics_bytes < MAX_STATE_BYTES and plan.commit_bytes + MAX_STATE_BYTES < MAX_COMMIT
    predictors = members + 1
    assert tally.holds("class_rows") == (predictors * classes <= MAX_NUMBERS)
    assert tally.holds("pairs") == (predictors * (predictors - 1) // 2 <= MAX_NUMBERS)


@pytest.mark.parametrize(("members", "classes"), [(1, 1000), (3, 500), (62, 1500), (63, 10), (130, 4)])
@pytest.mark.parametrize("labelled", [0, 10**14])
def test_a_report_stays_within_what_a_manifest_is_planned_for(members: int, classes: int, labelled: int) -> None:
    plan, random = with_members(members, classes), np.random.default_rng(0)
    tally = Tally.empty(plan.predictors, classes)
    for name, held in tally.sums.items():  # as long as numbers become
        held += labelled if name in ("labelled", "bin_rows") else random.integers(10**13, 10**14, held.shape)
    for name in ("rows", "fidelity"):
        tally.sums[name] += 10**14
    size = len(canonical_json(tally.report()))
    assert size <= report_bytes(plan.predictors, classes) < plan.manifest_bytes
    assert labelled == 0 or size > report_bytes(plan.predictors, classes) / 3


def test_more_members_than_a_commit_can_describe_are_refused(cli: Cli) -> None:
    assert state_bytes(with_members(400).predictors, 3) < MAX_STATE_BYTES
    cli.change('for name in ("a", "b", "c")', 'for name in ("a", "b", "c")\n    ) + tuple(\n'
               '        ed.Member(name=f"n{i}", build=lambda: Net(1)) for i in range(1200)')  # fmt: skip
    error = cli("cache", "digits.py", "--out", "cache", code=2).stderr
    assert "1203 members" in error and "at most some 400" in error


# Fidelity -------------------------------------------------------------------------------------------


def figures(targets: Targets, logprobs: torch.Tensor) -> dict[str, float]:
    return dict(zip(FIDELITY, fidelity(targets, logprobs), strict=True))


def true_angles(targets: Targets, logprobs: torch.Tensor) -> np.ndarray:
    """Degrees between the gradients of the losses that students learn by, row by row and of the mean."""
    grads = []
    for held in (targets, Targets(logprobs)):
        logits = (logprobs / 2).clone().requires_grad_()
        (soft_targets(logits, held) * len(logits)).backward()
        grads.append(logits.grad.double().numpy())
    a, b = (np.concatenate([g, g.mean(0, keepdims=True)]) for g in grads)
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return np.degrees(np.arccos(cosine.clip(-1, 1)))


@pytest.mark.parametrize(
    "codec", [Dense(), Dense(bits=8), TopK(k=4), TopK(k=4, values=16), VarOpt(k=6), Sampled(n=20), Sampled(n=400)]
)
def test_the_angle_is_that_of_the_losses_gradients(codec: HeadCodec) -> None:
    logprobs = drawn(32, 60, 1.5)
    targets = round_trip(codec, said(logprobs))
    found, expected = figures(targets, logprobs), true_angles(targets, logprobs)
    assert found["rows"] == found["angle_rows"] == 32 and found["means"] == 1
    assert found["angle"] / 32 == pytest.approx(expected[:-1].mean(), abs=0.03)
    assert found["mean_angle"] == pytest.approx(expected[-1], abs=0.05)


def test_what_is_exact_loses_nothing_and_dense_next_to_nothing() -> None:
    logprobs = drawn(32, 10)
    exact = figures(Targets(logprobs, classes=10), logprobs)
    assert exact["agreement"] == exact["kl_rows"] == 32
    assert max(abs(exact[k]) for k in ("kl", "total_variation", "angle", "mean_angle")) < 1e-3
    dense = figures(round_trip(Dense(), said(logprobs)), logprobs)
    assert 0 < dense["angle"] / 32 < 0.1 and dense["total_variation"] / 32 < 1e-3


def test_the_figures_of_kept_classes_are_of_one_bucket_beside_them() -> None:
    logprobs = drawn(16, 50, 1.0)
    targets = round_trip(TopK(k=5), said(logprobs))
    found = figures(targets, logprobs)
    p, ids = logprobs.double().exp().numpy(), targets.ids.numpy()
    kept = np.take_along_axis(p, ids, 1)
    a = np.concatenate([kept, 1 - kept.sum(1, keepdims=True)], 1)
    b = np.concatenate([targets.logprobs.double().exp().numpy(), targets.residual.double().numpy()[:, None]], 1)
    assert found["kl"] == pytest.approx((a * np.log(a / b)).sum(), rel=1e-4)
    assert found["total_variation"] == pytest.approx(np.abs(a - b).sum() / 2, rel=1e-4)
    assert found["kl"] < 0.01 < found["angle"]  # what is lost inside the bucket shows in the angle alone


def test_a_sample_has_no_kl_and_its_mean_gradient_is_nearer_than_its_rows() -> None:
    logprobs = drawn(1, 60, 1.5).expand(32, -1)
    found = figures(round_trip(Sampled(n=20), said(logprobs)), logprobs)
    assert found["kl_rows"] == 0 and found["mean_angle"] < found["angle"] / 32 / 3
    likeliest = Targets(torch.zeros(32, 1), kind="unbiased", ids=logprobs.argmax(1)[:, None], classes=60)
    biased = figures(likeliest, logprobs)
    assert biased["mean_angle"] == pytest.approx(biased["angle"] / 32)  # all of it is bias: no mean takes it away


def test_members_are_compared_as_their_mixture() -> None:
    members = [drawn(8, 12, seed=s) for s in (1, 2)]
    mixture = Mixture((("a", 3.0), ("b", 1.0)), "mean_probs")
    logprobs = combine(members, [3.0, 1.0], "mean_probs")
    right = figures(round_trip(Members(), said(logprobs, members), mixture), logprobs)
    swapped = Mixture((("a", 1.0), ("b", 3.0)), "mean_probs")
    wrong = figures(round_trip(Members(), said(logprobs, members), swapped), logprobs)
    assert right["angle"] / 8 < 0.1 < 5 < wrong["angle"] / 8 and wrong["kl"] > 100 * right["kl"]


def test_certain_rows_have_no_angle_and_stay_finite() -> None:
    one_hot = torch.full((4, 9), -math.inf)
    one_hot[:, 3] = 0
    for codec in (Dense(), Dense(bits=8), TopK(k=3), VarOpt(k=3), Sampled(n=3)):
        found = figures(round_trip(codec, said(one_hot)), one_hot)
        assert found["angle_rows"] == found["means"] == 0 and found["agreement"] == 4
        assert all(map(math.isfinite, found.values()))
    nearly = torch.log_softmax(torch.tensor([[300.0, 0.0, -40.0, -900.0]]), 1)
    assert all(map(math.isfinite, figures(round_trip(TopK(k=1), said(nearly)), nearly).values()))


# A capture ------------------------------------------------------------------------------------------


def inspected(cli: Cli, name: str = "cache") -> dict[str, Any]:
    return json.loads(cli("inspect", name, "--json").stdout)


def test_a_capture_in_parts_reports_the_same(cached: Cli) -> None:
    """Shared by two workers and resumed, in another order of units."""
    whole = inspected(cached)
    cached("cache", "digits.py", "--out", "parts", "--units", "10:20")
    cached("cache", "digits.py", "--out", "parts", "--units", "0:4")
    cached("cache", "digits.py", "--out", "parts")
    assert inspected(cached, "parts")["statistics"] == whole["statistics"]


def test_inspect_says_what_the_codec_lost_and_what_the_members_are_worth(cached: Cli) -> None:
    report = inspected(cached)
    test = report["statistics"]["test"]
    assert report["fidelity"]["test"] == test["fidelity"]
    assert test["fidelity"]["rows"] == 32 * 2 + 32 and test["fidelity"]["top1_agreement"] > 0.9
    assert 0 <= test["fidelity"]["angle"] < 1 and 0 < test["fidelity"]["kl"] < 1e-5
    together = report["ensemble"]["test"]
    assert together["nll"] == test["predictors"]["ensemble"]["nll"]
    assert together["mutual_information"] == test["mutual_information"] > 0
    assert test["oracle"] >= together["accuracy"] and sum(test["classes"]["rows"]) == test["rows"]
    text = cached("inspect", "cache").stdout
    for word in ("Brier", "ECE", "mutual information", "NLL without a", "fidelity of the codec", "angle"):
        assert word in text


def test_without_labels_there_is_what_needs_none(cli: Cli) -> None:
    cli.change('ed.ArraySource({"image": images[part]}, labels[part])', 'ed.ArraySource({"image": images[part]})')
    cli("cache", "digits.py", "--out", "cache")
    test = inspected(cli)["statistics"]["test"]
    assert {"disagreement", "mutual_information", "pairs", "entropy_histogram", "fidelity"} <= test.keys()
    assert not {"oracle", "leave_one_out", "classes"} & test.keys()
    assert test["predictors"]["a"].keys() == {"agreement", "entropy"}


def test_a_sparse_capture_says_what_it_lost(cli: Cli) -> None:
    cli.change("batch_size=64,", "batch_size=20,\n        codec=ed.TopK(k=2),")
    cli("cache", "digits.py", "--out", "cache", "--limit", 50)
    found = inspected(cli)["fidelity"]["test"]
    assert found["rows"] == 32 and found["kl"] < 0.01 and found["angle"] > 0.3  # over two batches of a unit


# Single samples and pictures ------------------------------------------------------------------------


def test_the_worst_rows_are_those_whose_label_is_least_likely(cached: Cli) -> None:
    report = json.loads(cached("inspect", "cache", "--worst", 4, "--json").stdout)["samples"]
    cache = ed.open_cache(cached.folder / "cache")
    targets = cache.targets_at(np.arange(597), split="test")
    expected = targets.label_logprob.argsort(stable=True)[:4]
    assert [s["row"] for s in report] == expected.tolist() and {s["split"] for s in report} == {"test"}
    for shown in report:
        p = targets.logprobs[shown["row"]].exp()
        assert shown["key"] == cache.table("test").keys[shown["row"]].tobytes().hex()
        assert [c["name"] for c in shown["classes"]] == [str(i) for i in p.topk(5).indices.tolist()]
        assert [c["probability"] for c in shown["classes"]] == pytest.approx(p.topk(5).values.tolist())
        assert shown["others"] == pytest.approx(1 - float(p.topk(5).values.sum()), abs=1e-6)
        assert shown["entropy"] == float(targets.entropy[shown["row"]])
    text = cached("inspect", "cache", "--worst", 2, "--split", "train", "--view", 1).stdout
    assert "2 rows with the lowest log-probability" in text and text.count("view 1, key") == 2 and "█" in text


def test_without_labels_the_worst_are_those_most_disagreed_about(cli: Cli) -> None:
    cli.change('ed.ArraySource({"image": images[part]}, labels[part])', 'ed.ArraySource({"image": images[part]})')
    cli.change("batch_size=64,", "batch_size=64,\n        codec=ed.Members(),")
    cli("cache", "digits.py", "--out", "cache", "--limit", 100)
    report = json.loads(cli("inspect", "cache", "--worst", 3, "--json").stdout)["samples"]
    targets = ed.open_cache(cli.folder / "cache").targets_at(np.arange(100), split="test")
    assert [s["row"] for s in report] == (-targets.mutual_information).argsort(stable=True)[:3].tolist()
    best = report[0]["classes"][0]  # members side by side, and their mean
    assert best["probability"] == pytest.approx(sum(best["members"].values()) / 3, abs=1e-5)
    assert "highest mutual information" in (text := cli("inspect", "cache", "--worst", 1).stdout)
    assert re.search(r"class +ensemble +a +b +c", text)


def test_rows_are_found_by_key_or_its_first_digits(cached: Cli) -> None:
    table = ed.open_cache(cached.folder / "cache").table("held_out").keys
    key = table[17].tobytes().hex()
    for prefix in (key, key[:11].upper(), key[:12]):
        report = json.loads(cached("inspect", "cache", "--rows", prefix, "--json").stdout)["samples"]
        assert [(s["split"], s["row"], s["key"]) for s in report] == [("held_out", 17, key)]
    two = cached("inspect", "cache", "--rows", key, "--rows", table[3].tobytes().hex()).stdout
    assert "held_out row 17" in two and "held_out row 3" in two
    assert "several samples" in cached("inspect", "cache", "--rows", key[0], code=2).stderr
    assert "hexadecimal" in cached("inspect", "cache", "--rows", "xyz", code=2).stderr
    assert "no sample whose key" in cached("inspect", "cache", "--rows", key, "--split", "test", code=3).stderr
    assert "did you mean 'test'" in cached("inspect", "cache", "--worst", 2, "--split", "tset", code=2).stderr
    assert "there is no view 7" in cached("inspect", "cache", "--worst", 2, "--view", 7, code=3).stderr


@pytest.mark.parametrize("codec", ["TopK(k=3)", "VarOpt(k=4)", "Sampled(n=6)"])
def test_samples_of_sparse_caches_are_shown_as_what_is_kept(cli: Cli, codec: str) -> None:
    cli.change("batch_size=64,", f"batch_size=64,\n        codec=ed.{codec},")
    cli("cache", "digits.py", "--out", "cache", "--limit", 40)
    shown = json.loads(cli("inspect", "cache", "--worst", 2, "--json").stdout)["samples"]
    for sample in shown:
        assert 0 < len(sample["classes"]) <= 5 and all(c["probability"] > 0 for c in sample["classes"])
        assert sum(c["probability"] for c in sample["classes"]) + sample["others"] == pytest.approx(1, abs=1e-5)
    assert "all others" in cli("inspect", "cache", "--worst", 2).stdout


def test_a_picture_is_drawn_or_refused_in_a_sentence(cached: Cli) -> None:
    assert "drawn: out.png" in cached("inspect", "cache", "--plot", "out.png").stdout
    data = (cached.folder / "out.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 30_000
    assert "ends in .png" in cached("inspect", "cache", "--plot", "out.gif", code=2).stderr
    cached("inspect", "cache", "--plot", "no/such/folder/out.png", code=6)


def test_without_matplotlib_a_picture_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match="--plot needs matplotlib") as error:
        plot("out.png", "test", {"names": []}, ())
    assert "ensemble-distill[plot]" in error.value.hint


@pytest.mark.parametrize(
    ("members", "classes", "labelled"), [(1, 2, True), (9, 50, True), (70, 3, True), (2, 4, False)]
)
def test_pictures_of_few_and_many_members_and_classes(
    members: int, classes: int, labelled: bool, tmp_path: Path
) -> None:
    names = [f"m{i}" for i in range(members)]
    tally = Tally.empty([*names, "ensemble"], classes)
    parts = [drawn(60, classes, seed=i) for i in range(members)]
    count(
        tally, [*parts, combine(parts, [1.0] * members, "mean_probs")], torch.arange(60) % classes if labelled else None
    )
    plot(str(tmp_path / "out.png"), "test", tally.report(), tuple(f"a $class_{i}" for i in range(classes)))
    assert (tmp_path / "out.png").stat().st_size > 10_000


def test_statistics_of_an_older_cache_are_shown_as_far_as_they_go(cached: Cli) -> None:
    store = Store(LocalStorage(cached.folder / "cache"))
    current = str(store.current())
    figures = {"accuracy": 0.5, "nll": 1.0, "ece": 0.1, "agreement": 1.0}
    old = {"test": {"rows": 597, "disagreement": 0.1, "predictors": {"a": figures, "ensemble": figures}}}
    store.put_manifest(store.manifest(current).model_copy(update={"statistics": old}), parent=current)
    assert "50.00%" in cached("inspect", "cache").stdout
    assert inspected(cached)["fidelity"] == {}
    assert "no statistics of test to draw" in cached("inspect", "cache", "--plot", "out.png", code=2).stderr


# Audit ----------------------------------------------------------------------------------------------


def test_an_audit_of_an_honest_cache_says_what_it_compared(cached: Cli) -> None:
    report = json.loads(cached("audit", "digits.py", "--cache", "cache", "--rows", 40, "--json").stdout)
    assert report["ok"] and report["rows"] == {"held_out": 40, "test": 40, "train": 40}
    for fields in report["fields"].values():
        assert {"main/logprobs", "row/entropy", "tap/a.pool", "targets"} <= fields.keys()
        assert all(f["share_of_allowed"] < 0.1 for f in fields.values())
    text = cached("audit", "digits.py", "--cache", "cache", "--batch-size", 7, "--seed", 3).stdout
    assert "the 192 rows are what the members say" in text and "64 rows, captured against said now" in text
    assert "held_out: 5 rows" in cached("audit", "digits.py", "--cache", "cache", "--limit", 5).stdout


@pytest.mark.parametrize("codec", ["TopK(k=3)", "VarOpt(k=4)", "Members(inner=ed.TopK(k=2))", "Dense(bits=8)"])
def test_draws_and_codes_are_the_same_again(cli: Cli, codec: str) -> None:
    cli.change("batch_size=64,", f"batch_size=64,\n        codec=ed.{codec},")
    cli("cache", "digits.py", "--out", "cache", "--limit", 80)
    report = json.loads(cli("audit", "digits.py", "--cache", "cache", "--limit", 80, "--json").stdout)
    assert all(f["equal"] > 0.98 for parts in report["fields"].values() for f in parts.values() if f["largest"] is None)
    cli.change("image.float() / 16", "image.float() / 13")
    cli("audit", "digits.py", "--cache", "cache", "--limit", 80, code=4)


def test_an_audit_finds_what_the_members_do_not_say(cached: Cli) -> None:
    """A forward that changed is in no digest: weights, structure, samples and hashes are all as they were."""
    cached.change("image.float() / 16", "image.float() / 15")
    process = cached("audit", "digits.py", "--cache", "cache", code=4)
    assert re.search(r"sample \d+ in view \d \(key [0-9a-f]{32}\), is not what the members say", process.stderr)
    assert "times what rounding explains" in process.stderr and "captured against said now" in process.stdout
    report = json.loads(cached("audit", "digits.py", "--cache", "cache", "--json", code=4).stdout)
    assert not report["ok"] and report["fields"]["test"]["targets"]["share_of_allowed"] > 1


def test_an_audit_finds_targets_of_few_rows_that_were_replaced(cached: Cli) -> None:
    """Under right hashes, as somebody could who wanted to poison a student."""
    store = Store(LocalStorage(cached.folder / "cache"))
    plan = store.plan(str(store.plan_digest()), Plan)
    unit = "test-v000000-00000001.targets"
    commit, dtype = store.commit(unit), plan.group("targets").dtype
    rows = read_segments(np.frombuffer(store.object(commit), np.uint8), commit.rows, dtype, commit.segments)
    rows["main/logprobs"][::2] = np.roll(rows["main/logprobs"][::2], 1, axis=1)
    (cached.folder / "cache/commits" / f"{unit}.json").unlink()
    store.put_unit(commit.plan, unit, rows, plan.format, commit.keys, commit.statistics, commit.provenance)
    (cached.folder / "cache" / "CURRENT").unlink()  # a seal in force would tell that it is another commit
    cached("seal", "cache")
    cached("verify", "cache", "--deep")
    assert "targets of test" in cached("audit", "digits.py", "--cache", "cache", code=4).stderr


def test_an_audit_refuses_other_members_and_names_them(cached: Cli) -> None:
    def refused(*words: str, code: int = 3) -> None:
        error = cached("audit", "digits.py", "--cache", "cache", code=code).stderr
        assert all(word in error for word in words), error

    original = (cached.folder / "b.safetensors").read_bytes()
    shutil.copy(cached.folder / "a.safetensors", cached.folder / "b.safetensors")
    refused("member 'b'", "weights was")
    (cached.folder / "b.safetensors").write_bytes(original)
    text = (cached.folder / "digits.py").read_text()
    for old, new, words in [
        ('("a", "b", "c")', '("a", "b")', ("members a, b, c", "has a, b")),
        ("batch_size=64,", 'combine="mean_logits",', ("combine rule", "mean_logits")),
        ("name=name, build", "name=name, temperature=2.0, build", ("member 'a'", "temperature was 1.0, is 2.0")),
        ('taps=(ed.Tap(member="a", module="pool"),),', "", ("tap/a.pool", "no tap")),
        ("nn.Linear(width, 10)", "nn.Linear(width, 10); self.scale = 2", ("member 'a'", "structure")),
        ('"held_out": slice(1000, 1200), ', "", ("no split 'held_out'",)),
        ('return digits["images"]', 'return digits["images"] + 1', ("does not hold",)),
    ]:
        cached.change(old, new)
        refused(*words)
        (cached.folder / "digits.py").write_text(text)
    assert "no such file" in cached("audit", "none.py", "--cache", "cache", code=2).stderr
    assert "Invalid value" in cached("audit", "digits.py", "--cache", "cache", "--rows", 0, code=2).stderr
