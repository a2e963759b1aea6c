"""`plan`: what it says of bytes is what a capture then writes; what it says of errors is what an oracle says."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli
from hypothesis import given, settings
from hypothesis import strategies as st
from small import a_plan

from ensemble_distill.cache.groups import Group
from ensemble_distill.cache.plan import Plan, Split
from ensemble_distill.codec import Dense, HeadCodec, Members, Sampled, TopK, VarOpt, resolved
from ensemble_distill.codecs.heads import decode, encode
from ensemble_distill.config import CacheConfig, Member, override
from ensemble_distill.mixture import Mixture, combine
from ensemble_distill.recording.estimate import errors
from ensemble_distill.recording.offers import as_written, default_sizes, name_of, offers, setting, size_of
from ensemble_distill.recording.prices import Teller, stored_bytes
from ensemble_distill.recording.probe import Measured, spread
from ensemble_distill.targets import Said

CPU = [torch.device("cpu")]
FIGURES = {"kl", "total_variation", "top1_agreement", "gradient_degrees"}


def report(cli: Cli, *args: object) -> dict[str, Any]:
    return json.loads(cli("plan", "digits.py", "--batches", 2, "--json", *args).stdout)


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


# The command ----------------------------------------------------------------------------------------


def test_it_prices_every_codec_and_writes_nothing(cli: Cli) -> None:
    before = files(cli.folder)
    found = report(cli, "--k", "8,2,8,11")
    assert files(cli.folder) == before
    assert found["rows"] == 2797 and found["views"] == 2 and found["device"] == "cpu" and found["precision"] == "fp32"
    assert [price["codec"] for price in found["codecs"]] == [
        "dense", "dense bits=8", "topk k=2", "topk k=2 values=16", "topk k=8", "topk k=8 values=16", "varopt k=2",
        "varopt k=8", "sampled n=2", "sampled n=8", "members dense", "members dense bits=8", "members topk k=2",
        "members topk k=8",
    ]  # fmt: skip
    assert [price["codec"] for price in found["codecs"] if price["own"]] == ["dense"]
    assert {left["codec"]: left["reason"] for left in found["left_out"]}["varopt k=11"] == "there are 10 classes"
    for price in found["codecs"]:
        assert price["error"].keys() == FIGURES and price["seconds"] > 0
        assert (price["error"]["kl"] is None) == price["codec"].startswith(("varopt", "sampled"))
        assert 0 <= price["error"]["top1_agreement"] <= 1 and price["bytes_per_row"] * 2797 < price["bytes"]
    own = found["codecs"][0]
    same = ("seconds", "bytes", "units", "break_even_epochs")
    assert {key: found[key] for key in same} == {key: own[key] for key in same}
    # three members of 64 × 48 + 48 + 48 × 10 + 10 parameters; a tap of 48, ten classes and three figures, float16
    assert found["memory"]["members"] == 3 * 3610 * 4 and own["bytes_per_row"] == 2 * (48 + 10 + 3)
    assert found["memory"]["host_peak"] > found["memory"]["records"] == 2 * 200 * own["bytes_per_row"]
    assert found["memory"]["device_peak"] is None and found["probe"]["batches"] == 2


def test_the_table_names_all_codecs_in_a_hundred_columns(cli: Cli) -> None:
    text = cli("plan", "digits.py", "--batches", 1, "--limit", 70, "--set", "codec.bits=8", "--views", 1).stdout
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100, max(lines, key=len)
    rows = [line for line in lines if line.startswith(("dense", "topk", "varopt", "sampled", "members"))]
    assert {line.split()[0] for line in rows} == {"dense", "topk", "varopt", "sampled", "members"}
    assert [line.split("  ")[0] for line in rows if "*" in line] == ["dense bits=8 *"]
    assert "210 rows (train 70×1, held_out 70×1, test 70×1)" in text
    assert cli("plan", "digits.py", "--batches", 1, "--limit", 70, "--quiet").stdout == ""


@pytest.mark.parametrize("format", ["hdf5", "parquet"])
def test_bytes_and_units_are_those_of_the_capture(cli: Cli, format: str) -> None:
    flags = ("--format", format, "--limit", 450)
    found = report(cli, *flags, "--k", "4")
    for price in found["codecs"]:
        if price["codec"] in ("dense", "sampled n=4", "members topk k=4"):
            cache = price["codec"].replace(" ", "-")
            cli("cache", "digits.py", "--out", cache, *flags, *shlex.split(price["set"]))
            held = json.loads(cli("inspect", cache, "--json").stdout)
            assert held["bytes"] == pytest.approx(price["bytes"], rel=0.01)
            assert (held["units"], held["rows"]) == (price["units"], found["rows"])


def test_a_codec_of_the_pipelines_own_comes_first(cli: Cli) -> None:
    codec = 'codec={"name":"topk","k":5,"temperatures":[2,4],"classes":10}'
    found = report(cli, "--limit", 70, "--k", "2", "--set", codec, "--set", "combine=mean_logits")
    own = found["codecs"][0]
    assert own["own"] and own["codec"] == "topk k=5 temperatures=2,4"
    assert own["config"] == {"name": "topk", "k": 5, "temperatures": [2.0, 4.0]}
    assert sum(price["own"] for price in found["codecs"]) == 1
    [left] = found["left_out"]
    assert left["codec"] == "members topk k=2" and "mean_probs" in left["reason"]


@pytest.mark.parametrize("sizes", ["0", "-1,4", "x", "", "65537"])
def test_numbers_of_classes_are_checked(cli: Cli, sizes: str) -> None:
    assert "expected numbers from 1" in cli("plan", "digits.py", "--k", sizes, code=2).stderr


def test_what_cache_refuses_is_refused(cli: Cli) -> None:
    assert "codec" in cli("plan", "digits.py", "--set", 'codec={"name":"zip"}', code=2).stderr
    keeps = 'codec={"name":"topk","k":11}'
    assert "k=11 of 10 classes" in cli("plan", "digits.py", "--set", keeps, code=2).stderr
    cli.change('"test": slice(1200, None)', '"test": slice(0, 0)', to="empty.py")
    assert "'test' is empty" in cli("plan", "empty.py", code=2).stderr


def test_a_teacher_that_fails_in_the_probe_is_named(cli: Cli) -> None:
    forward = "return self.head(self.pool(image.float() / 16))"
    nan = "out = self.head(self.pool(image.float() / 16))\n        out[3:4] = float('nan')\n        return out"
    cli.change(forward, nan, to="nan.py")
    error = cli("plan", "nan.py", "--limit", 70, "--views", 1, "--batches", 1, code=7).stderr
    assert "member 'a' gave NaN or infinite logits for sample 38 of test (view 0" in error
    cli.change(forward, f"assert len(image) < 3, 'no room'\n        {forward}", to="raises.py")
    assert "raises.py:" in cli("plan", "raises.py", code=2).stderr


# Errors ---------------------------------------------------------------------------------------------


def said(rows: int, classes: int, scale: float, seed: int, members: int = 2) -> Said:
    generator = torch.Generator().manual_seed(seed)
    each = [torch.log_softmax(torch.randn(rows, classes, generator=generator) * scale, 1) for _ in range(members)]
    shares = [1.0 + i for i in range(members)]
    keys = np.random.default_rng(seed).integers(0, 256, (rows, 16), dtype=np.uint8)
    return Said(combine(each, shares, "mean_probs"), each, shares, None, keys, 0)


def oracle(what: Said, codec: HeadCodec) -> dict[str, float | None]:
    """Row by row in float64, from the definitions and the gradients as they stand on paper."""
    mixture = Mixture((("a", 1.0), ("b", 2.0)), "mean_probs")
    kept = decode(codec, encode(codec, what), mixture)
    kl, tv, agree, exact_gradient, kept_gradient = [], [], [], [], []
    for row, logs in enumerate(what.logprobs.double().numpy()):
        p = np.exp(logs) / np.exp(logs).sum()
        q = np.sqrt(p) / np.sqrt(p).sum()  # a student whose logits are half of log p
        values = kept.logprobs[row].double().exp().numpy()
        exact_gradient.append(q - p)
        if kept.ids is None:
            own, held, gradient = p, values, q - values
            guess = values.argmax()
        else:
            ids = kept.ids[row].numpy()
            weights = np.zeros(len(p))
            np.add.at(weights, ids, values)
            others = np.setdiff1d(np.arange(len(p)), ids)
            guess = weights.argmax()
            if kept.kind == "unbiased":
                own, held, gradient = p, weights, q * values.sum() - weights
            else:
                residual = float(kept.residual[row])
                own = np.append(p[ids], p[others].sum())
                held = np.append(values, residual)
                gradient = q - weights
                if len(others):
                    gradient[others] -= residual * q[others] / q[others].sum()
        kept_gradient.append(gradient)
        inside = own > 0
        if kept.kind != "unbiased":
            kl.append((own[inside] * np.log(own[inside] / held[inside])).sum())
        tv.append(np.abs(own - held).sum() / 2)
        agree.append(guess == p.argmax())
    u, v = np.concatenate(exact_gradient), np.concatenate(kept_gradient)
    cosine = u @ v / np.linalg.norm(u) / np.linalg.norm(v)
    return {
        "kl": np.mean(kl) if kl else None,
        "total_variation": np.mean(tv),
        "top1_agreement": np.mean(agree),
        "gradient_degrees": math.degrees(math.acos(min(1.0, cosine))),
    }


@settings(max_examples=40)
@given(
    st.sampled_from(
        [Dense(), Dense(bits=8), TopK(k=3), TopK(k=3, values=16), VarOpt(k=3), Sampled(n=3)]
        + [Members(), Members(inner=TopK(k=3))]
    ),
    st.integers(4, 40),
    st.sampled_from([0.5, 2.0, 6.0]),
    st.integers(0, 99),
)
def test_errors_are_those_of_a_float64_oracle(codec: HeadCodec, classes: int, scale: float, seed: int) -> None:
    what = said(12, classes, scale, seed)
    codec = resolved(codec, classes, ("a", "b"))
    found, expected = errors(codec, what), oracle(what, codec)
    assert found.keys() == FIGURES and (found["kl"] is None) == (expected["kl"] is None)
    if found["kl"] is not None:
        assert found["kl"] == pytest.approx(expected["kl"], rel=1e-3, abs=1e-6) and found["kl"] >= 0
    assert found["total_variation"] == pytest.approx(expected["total_variation"], rel=1e-4, abs=1e-6)
    # Kept at 8 or 16 bits two classes may be equal, of which either may come first: one row of twelve.
    assert found["top1_agreement"] == pytest.approx(expected["top1_agreement"], abs=1 / 12 + 1e-9)
    assert found["gradient_degrees"] == pytest.approx(expected["gradient_degrees"], rel=1e-3, abs=0.01)


def test_a_member_left_alone_is_not_the_mixture() -> None:
    what = said(8, 10, 3.0, 0)
    codec = resolved(Members(), 10, ("a", "b"))
    assert errors(codec, what)["kl"] < 1e-5
    assert errors(codec, what, Mixture((("a", 1.0),), "mean_probs"))["kl"] > 1e-2


def test_certain_rows_have_an_error_and_no_gradient() -> None:
    certain = torch.tensor([[0.0, -math.inf, -math.inf, -math.inf]]).expand(3, 4)
    what = Said(certain, [certain], [1.0], None, np.zeros((3, 16), np.uint8), 0)
    for codec in (Dense(), Dense(bits=8), TopK(k=2), TopK(k=4)):
        found = errors(resolved(codec, 4, ("a",)), what)
        assert found == {"kl": 0, "total_variation": 0, "top1_agreement": 1, "gradient_degrees": None}


# What is offered ------------------------------------------------------------------------------------


@given(st.integers(2, 200_000))
def test_default_sizes_suit_the_classes(classes: int) -> None:
    sizes = default_sizes(classes)
    assert 1 <= len(sizes) <= 3 and list(sizes) == sorted(set(sizes)) and sizes[0] >= 1 and sizes[-1] <= classes / 2


def test_default_sizes_of_usual_numbers_of_classes() -> None:
    assert [default_sizes(c) for c in (2, 10, 100, 1000, 128_256)] == [
        (1,), (2, 4), (2, 8, 32), (8, 32, 128), (8, 32, 128)
    ]  # fmt: skip


def test_what_is_shown_can_be_given_to_set() -> None:
    own = TopK(k=2, temperatures=(2.0,))
    config = CacheConfig(members=(Member(name="a", build=object),))
    found = [*offers((2, 8)), own, VarOpt(k=3, seed=7)]
    assert {type(codec) for codec in found} == {Dense, TopK, VarOpt, Sampled, Members}
    assert len(set(map(name_of, found))) == len(found)
    for codec in found:
        assert override(config, [setting(codec)]).codec == codec
        assert as_written(resolved(codec, 10, ("a",))) == codec
    assert [size_of(codec) for codec in (Dense(), Sampled(n=3), Members(inner=TopK(k=4)))] == [None, 3, 4]


# What it adds up to ---------------------------------------------------------------------------------


def measured(name: str, **seconds: Any) -> Measured:
    found = Measured()
    found.seconds.reading |= {False: [9.0, 1.0, 1.0], True: [3.0]}
    found.seconds.teachers |= {False: [10.0], True: [20.0]}
    found.seconds.figures.append(0.25)
    found.seconds.encode[name].append(0.25)
    found.seconds.decode[name].append(seconds.get("decode", 5.0))
    found.errors[name].append((4, {"kl": 1.0, "angle": None}))
    found.errors[name].append((12, {"kl": 2.0, "angle": 3.0}))
    return found


def test_seconds_and_epochs_follow_from_what_was_measured() -> None:
    plan = a_plan(rows=12, views=3)
    price = Teller(measured("dense"), CPU, 1, hashing=0.0).price(Dense(), plan, True)
    # twelve rows once as they are and twice rendered, and half a second a row for figures and codec
    assert price.seconds == pytest.approx(12 * (1 + 10) + 24 * (3 + 20) + 36 * 0.5)
    # an epoch sees each row in one view: the teachers' (10 + 20 + 20) / 3 seconds less the reader's 5
    assert price.epochs == pytest.approx(price.seconds / (12 * (50 / 3 - 5)))
    assert price.error == {"kl": (4 + 24) / 16, "angle": 3.0}
    hashed = Teller(measured("dense"), CPU, 1, hashing=0.5).price(Dense(), plan, True)
    assert hashed.seconds == pytest.approx(price.seconds + price.bytes / 2)


def test_reading_beside_a_device_costs_what_is_longer() -> None:
    plan, gpu = a_plan(rows=12, views=1), [torch.device("cuda", 0)]
    found = measured("dense")
    assert Teller(found, gpu, 1, 0.0).price(Dense(), plan, True).seconds == pytest.approx(12 * 10.5)
    found.seconds.reading[False] = [30.0]
    assert Teller(found, gpu, 1, 0.0).price(Dense(), plan, True).seconds == pytest.approx(12 * 30)
    assert Teller(found, gpu, 2, 0.0).price(Dense(), plan, True).seconds == pytest.approx(12 * 15)


def test_a_cache_that_reads_no_faster_than_the_teachers_is_never_paid_for() -> None:
    plan = a_plan(rows=12, views=1)
    assert Teller(measured("dense", decode=10.0), CPU, 1, 0.0).price(Dense(), plan, True).epochs is None
    other = plan.model_copy(update={"splits": {"test": plan.splits["train"]}})
    assert Teller(measured("dense"), CPU, 1, 0.0).price(Dense(), other, True).epochs is None


@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 9), st.integers(1, 12))
def test_the_probe_is_spread_over_all_that_is_captured(rows: int, views: int, unit_rows: int, batches: int) -> None:
    plan = a_plan(rows=rows, unit_rows=unit_rows, views=views)
    plan = plan.model_copy(update={"splits": plan.splits | {"test": Split(rows=7, views=1, unit_rows=4, labels=None)}})
    chosen = spread(plan, batches)
    seen = [(item.split, item.view, int(row)) for item, index in chosen for row in index]
    assert len(set(seen)) == len(seen) and 1 <= len(chosen) <= batches
    for item, index in chosen:
        assert item.first <= index[0] and index[-1] < item.last and len(index) <= plan.capture.batch_size
    if batches == 1:
        assert any(abs(_position(plan, place) - plan.rows / 2) <= 1 for place in seen)


def _position(plan: Plan, place: tuple[str, int, int]) -> int:
    split, view, row = place
    before = sum(s.rows * s.views for name, s in plan.splits.items() if name < split)
    return before + view * plan.splits[split].rows + row


def test_parquet_stores_no_padding() -> None:
    padded = Group.of("targets", {"main": Dense(classes=3, bits=8)})  # codes of 3 bytes, then two float16
    plans = {format: a_plan(format, rows=1000, unit_rows=1000, views=1, groups=1) for format in ("hdf5", "parquet")}
    plans = {format: plan.model_copy(update={"groups": (padded,)}) for format, plan in plans.items()}
    more = {format: plan.model_copy(update={"splits": _twice(plan)}) for format, plan in plans.items()}
    grown = {format: stored_bytes(more[format]) - stored_bytes(plans[format]) for format in plans}
    assert grown == {"hdf5": 8 * 1000, "parquet": 7 * 1000}


def _twice(plan: Plan) -> dict[str, Split]:
    return {name: split.model_copy(update={"rows": 2000, "unit_rows": 2000}) for name, split in plan.splits.items()}
