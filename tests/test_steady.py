"""Members that draw by chance, change as they run, or mix the rows of a batch are refused; rounding is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import Cli
from torch import Tensor, nn

import ensemble_distill as ed
from ensemble_distill.ensemble.ensemble import Ensemble
from ensemble_distill.ensemble.members import load_member
from ensemble_distill.errors import InvalidOutput

AGAIN, AMONG = "when it is shown the same samples again", "when others are in its batch"


def look(build: Callable[[], object], rows: int = 6, classes: int = 5) -> None:
    member = ed.Member(name="m", build=build, version="1")
    whole = Ensemble([load_member(member)], ed.CacheConfig(members=(member,)), classes, [torch.device("cpu")])
    whole.look({"x": torch.randn(rows, 16, generator=torch.Generator().manual_seed(0))})


def linear(seed: int = 0, **kwargs: object) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(16, 5, **kwargs)


class Of(nn.Module):
    """A function of a linear layer and its input."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.function, self.body = function, linear()
        self.register_buffer("mean", torch.zeros(16))
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def drifting(m: nn.Module, x: Tensor) -> Tensor:
    m.mean.mul_(0.9).add_(0.1 * x.mean(0) + 0.2)
    return m.body(x - m.mean)


def a_list(norm: nn.Module) -> nn.Module:
    module = Of(lambda m, x: m.body(m.hidden[0](x)))
    module.hidden = [norm]  # which eval mode does not reach
    return module


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Of(lambda m, x: m.body(nn.functional.dropout(x, 0.1))), AGAIN),
        (lambda: Of(lambda m, x: m.body(x) + 0.02 * torch.randn(len(x), 5)), AGAIN),
        (lambda: Of(drifting), AGAIN),
        (lambda: a_list(nn.Dropout(0.5)), AGAIN),
        (lambda: a_list(nn.BatchNorm1d(16)), AMONG),
        (lambda: Of(lambda m, x: m.body(m.norm(x)), norm=nn.BatchNorm1d(16, track_running_stats=False)), AMONG),
        (lambda: Of(lambda m, x: m.body(x.sort(0).values)), AMONG),
        (lambda: lambda x: torch.randn(len(x), 5), AGAIN),
        (lambda: lambda x: ed.LogProbs(torch.log_softmax(x[:, :5] - x[:, :5].mean(0), 1)), AMONG),
    ],
)
def test_a_member_that_is_no_function_of_the_sample_is_named(build: Callable[[], object], words: str) -> None:
    with pytest.raises(InvalidOutput, match=f"member 'm' says something else .*{words}"):
        look(build)


def rounded(m: nn.Module, x: Tensor) -> Tensor:
    """As other kernels for other batch sizes do it: the last bits of half precision."""
    return (m.body(x) * (1 + len(x) * 2.0**-9)).bfloat16()


def jittery(module: bool) -> Callable[[Tensor], Tensor]:
    """A server, or a network in half precision whose sums are in no fixed order: one percent each time."""
    calls = iter(range(100))
    body = linear(dtype=torch.bfloat16)

    def answer(x: Tensor) -> Tensor:
        return body(x.bfloat16()).float() * (1 + 0.01 * next(calls))

    return Of(lambda m, x: answer(x), body=body) if module else answer


def likeliest(x: Tensor) -> ed.TopKLogProbs:
    """A server whose last class of the likeliest differs by rounding."""
    top = torch.log_softmax(linear()(x), 1).topk(3, dim=1)
    ids = top.indices.clone()
    if len(x) == 4:
        ids[:, 2] = torch.tensor([next(c for c in range(5) if c not in row) for row in ids.tolist()])
    return ed.TopKLogProbs(ids, top.values)


@pytest.mark.parametrize("rows", [1, 2, 3, 6])
@pytest.mark.parametrize(
    "build",
    [
        linear,
        lambda: linear(dtype=torch.float64).float(),
        lambda: Of(rounded),
        lambda: Of(lambda m, x: m.norm(m.body(x)), norm=nn.BatchNorm1d(5)),
        lambda: Of(lambda m, x: m.body(x).masked_fill(torch.arange(5) == 2, -torch.inf)),
        lambda: Of(lambda m, x: m.body(x) * torch.nan),  # what is no distribution is told with its sample
        lambda: Of(lambda m, x: m.body(x.bfloat16()), body=linear(dtype=torch.bfloat16)),
        lambda: torch.ao.quantization.quantize_dynamic(nn.Sequential(linear()), {nn.Linear}),
        lambda: likeliest,
        lambda: jittery(True),
        lambda: jittery(False),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_rounding_is_no_difference(build: Callable[[], object], rows: int) -> None:
    look(build, rows)


@pytest.mark.parametrize("how", ["nn.functional.dropout(image.float())", "(image.float() - image.float().mean(0))"])
def test_nothing_is_written_of_members_that_are_not_steady(cli: Cli, how: str) -> None:
    cli.change("image.float() / 16", f"{how} / 16")
    assert "member 'a' says something else" in cli("cache", "digits.py", "--out", "cache", code=7).stderr
    assert not (cli.folder / "cache" / "PLAN").exists()
