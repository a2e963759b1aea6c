"""Temperatures and shares fitted to labels, against what is known of the best ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ensemble_distill.calibration import COLDEST, HOTTEST, fit_shares, fit_temperature, mixture_nll


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
