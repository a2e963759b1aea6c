"""Combining members, their identity, and the metrics that describe them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss
from torch import nn

import ensemble_distill as ed
from ensemble_distill.ensemble.ensemble import Ensemble, InvalidRow
from ensemble_distill.ensemble.members import load_member, state_digest
from ensemble_distill.errors import UsageError
from ensemble_distill.metrics import accuracy, count, ece, nll
from ensemble_distill.mixture import combine
from ensemble_distill.tally import Tally


def logits(members: int = 3, b: int = 6, c: int = 5) -> list[torch.Tensor]:
    return list(torch.randn(members, b, c, generator=torch.Generator().manual_seed(0)) * 3)


def test_mean_probs_is_the_mixture() -> None:
    z, shares = logits(), [1.0, 2.0, 5.0]
    p = sum(w / 8 * torch.softmax(x.double(), 1) for x, w in zip(z, shares, strict=True))
    torch.testing.assert_close(combine(z, shares, "mean_probs").double(), p.log(), atol=1e-6, rtol=1e-5)


def test_mean_logits_is_the_normalised_geometric_mean() -> None:
    z, shares = logits(), [1.0, 2.0, 5.0]
    mean = sum(w / 8 * x.double() for x, w in zip(z, shares, strict=True))
    found = combine(z, shares, "mean_logits")
    torch.testing.assert_close(found.double(), torch.log_softmax(mean, 1), atol=1e-6, rtol=1e-5)
    shifted = [x + 7.0 * i for i, x in enumerate(z)]  # a shift per member drops out, a scale does not
    torch.testing.assert_close(combine(shifted, shares, "mean_logits"), found, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(combine([2 * z[0], *z[1:]], shares, "mean_logits"), found, atol=1e-2)


@pytest.mark.parametrize("rule", ["mean_probs", "mean_logits"])
def test_copies_of_one_member_are_that_member(rule: str) -> None:
    z = logits(1)[0]
    torch.testing.assert_close(combine([z] * 4, [1.0] * 4, rule), torch.log_softmax(z, 1), atol=1e-6, rtol=1e-5)


def test_a_class_that_all_members_rule_out_stays_out() -> None:
    z = torch.tensor([[1.0, -torch.inf, 0.0]])
    for rule in ("mean_probs", "mean_logits"):
        found = combine([z, z], [1.0, 1.0], rule)
        assert found[0, 1] == -torch.inf and torch.isfinite(found[0, [0, 2]]).all()


class Half(nn.Module):
    """Doubles its input in training mode only, so that eval mode shows."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3, bias=False)
        nn.init.constant_(self.body.weight, scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) * (2 if self.training else 1)


def build(*members: ed.Member, **fields: object) -> Ensemble:
    config = ed.CacheConfig(members=members, **fields)
    return Ensemble([load_member(m) for m in members], config, 3, [torch.device("cpu")])


def test_members_run_in_eval_mode_at_their_temperature_and_tap() -> None:
    x = torch.randn(5, 4)
    ensemble = build(
        ed.Member(name="a", build=lambda: Half(0.5), temperature=2.0), taps=(ed.Tap(member="a", module="body"),)
    )
    out = ensemble({"x": x})
    torch.testing.assert_close(out.members[0], torch.log_softmax(Half(0.5).eval()(x) / 2, 1))
    torch.testing.assert_close(out.features["tap/a.body"], Half(0.5).eval()(x))
    after = build(ed.Member(name="a", build=lambda: Half(0.5)), temperature=2.0)({"x": x})
    torch.testing.assert_close(after.logprobs, out.logprobs)  # for one member both orders are the same


def test_a_member_spread_over_devices_says_the_same() -> None:
    members = [load_member(ed.Member(name=n, build=Half)) for n in ("a", "b")]
    config = ed.CacheConfig(members=tuple(m.config for m in members))
    two = Ensemble(members, config, 3, [torch.device("cpu", 0), torch.device("cpu")])
    x = torch.randn(5, 4)
    torch.testing.assert_close(two({"x": x}).logprobs, torch.log_softmax(Half().eval()(x), 1))


def test_nan_names_member_and_row() -> None:
    ensemble = build(ed.Member(name="good", build=Half), ed.Member(name="bad", build=Half))
    ensemble.modules[1].register_forward_hook(lambda m, a, out: out.index_fill(0, torch.tensor([3]), torch.nan))
    with pytest.raises(InvalidRow) as error:
        ensemble({"x": torch.randn(5, 4)})
    assert error.value.member == "member 'bad'" and error.value.row == 3


def test_wrong_shape_is_refused() -> None:
    with pytest.raises(UsageError, match=r"\[5, 3\], expected logits \[batch, 4\]"):
        member = load_member(ed.Member(name="a", build=Half))
        ensemble = Ensemble([member], ed.CacheConfig(members=(member.config,)), 4, [torch.device("cpu")])
        ensemble({"x": torch.zeros(5, 4)})


def test_identity_follows_every_bit_of_the_weights() -> None:
    a, b = Half(), Half()
    assert state_digest(a) == state_digest(b)
    with torch.no_grad():
        b.body.weight[0, 0] = torch.nextafter(b.body.weight[0, 0], torch.tensor(9.0))
    assert state_digest(a) != state_digest(b)


# Metrics --------------------------------------------------------------------------------------------


def cases() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.log_softmax(torch.randn(500, 7, generator=g) * 2, 1), torch.randint(0, 7, (500,), generator=g)


def naive_ece(p: np.ndarray, y: np.ndarray) -> float:
    confidence, right, total = p.max(1), p.argmax(1) == y, 0.0
    for i in range(15):
        mask = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if mask.any():
            total += mask.mean() * abs(right[mask].mean() - confidence[mask].mean())
    return total


def test_metrics_equal_independent_ones() -> None:
    logprobs, labels = cases()
    p, y = torch.softmax(logprobs.double(), 1).numpy(), labels.numpy()
    assert accuracy(logprobs, labels) == (p.argmax(1) == y).mean()
    assert nll(logprobs, labels) == pytest.approx(log_loss(y, p, labels=range(7)), rel=1e-5)
    assert ece(logprobs, labels) == pytest.approx(naive_ece(p, y), abs=1e-6)


def test_a_tally_adds_up_and_survives_json() -> None:
    logprobs, labels = cases()
    parts = [logprobs, logprobs.roll(3, 0), logprobs.roll(9, 1)]
    whole, first, second = (Tally.empty(["a", "b", "ensemble"]) for _ in range(3))
    count(whole, parts, labels)
    count(first, [p[:123] for p in parts], labels[:123])
    count(second, [p[123:] for p in parts], labels[123:])
    first.merge([json.loads(json.dumps(second.state()))])
    report = whole.report()
    assert report == first.report() or report["predictors"]["a"] == pytest.approx(first.report()["predictors"]["a"])
    assert report["predictors"]["b"]["nll"] == pytest.approx(nll(parts[1], labels), rel=1e-6)
    assert report["predictors"]["ensemble"]["ece"] == pytest.approx(ece(parts[2], labels), rel=1e-9)
    assert report["disagreement"] == pytest.approx(
        float((parts[0].argmax(1) != parts[1].argmax(1)).double().mean())
    )  # the one pair of members
    unlabelled = Tally.empty(["a", "ensemble"])
    count(unlabelled, parts[:2], None)
    assert unlabelled.report()["predictors"]["a"].keys() == {"agreement", "entropy"}
    with pytest.raises(ValueError, match="expected predictors"):
        first.merge([unlabelled.state()])
