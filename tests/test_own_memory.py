"""Members, sources and transforms that write where others read: each is given, and gives, memory of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Cli
from safetensors.torch import save_file
from torch import Tensor, nn

import ensemble_distill as ed
from ensemble_distill.cache.samples import read
from ensemble_distill.ensemble.ensemble import Ensemble
from ensemble_distill.ensemble.members import load_member, load_members
from ensemble_distill.errors import UsageError
from ensemble_distill.evaluation.evaluate import evaluate
from ensemble_distill.fingerprint import sample_keys
from ensemble_distill.scoring import logits_of
from ensemble_distill.sources.arrays import Loaded

CPU = torch.device("cpu")


def net(seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(4, 3)


def ensemble(*builds: Callable[[], object], **fields: object) -> Ensemble:
    config = ed.CacheConfig(
        members=tuple(ed.Member(name=f"m{i}", build=build, version="1") for i, build in enumerate(builds)), **fields
    )
    return Ensemble([load_member(m) for m in config.members], config, 3, [CPU])


# What members are given --------------------------------------------------------------------------------


class InPlace(nn.Module):
    """Normalises its images in place, and writes into its mask, as a version counter may see or not."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.body = how, net(0)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return spoiled(self.how, x, mask, self.body)


def spoiled(how: str, x: Tensor, mask: Tensor, body: nn.Module) -> Tensor:
    mask.fill_(0)
    target = {"torch": x, "data": x.data, "numpy": x.numpy()}[how]
    target -= 1
    return body(x.flatten(1))


@pytest.mark.parametrize("how", ["torch", "data", "numpy"])
@pytest.mark.parametrize("module", [True, False])
@pytest.mark.parametrize("shape", [(4,), (1, 2, 2)])
def test_a_member_that_works_in_place_does_so_on_a_copy(how: str, module: bool, shape: tuple[int, ...]) -> None:
    first = (lambda: InPlace(how)) if module else (lambda: lambda x, mask: spoiled(how, x, mask, net(0)))
    second = net(1)
    whole = ensemble(first, lambda: lambda x, mask: second(x.flatten(1)), lambda: InPlace("torch"))
    held = np.random.default_rng(0).normal(size=(6, *shape)).astype(np.float32)
    x, mask = torch.from_numpy(held), torch.ones(6, 4, dtype=torch.bool)
    expected = [net(0)(x.flatten(1) - 1), second(x.flatten(1)), net(0)(x.flatten(1) - 1)]
    before = held.copy()
    for _ in range(2):
        said = whole({"x": x, "mask": mask}).members
        torch.testing.assert_close(said, [torch.log_softmax(z, 1) for z in expected])
    np.testing.assert_array_equal(held, before)
    assert mask.all()


def test_what_members_are_given_may_be_changed_on_another_thread() -> None:
    """As a client of a server with threads of its own does: tensors of inference mode could not be."""
    from concurrent.futures import ThreadPoolExecutor

    def client(x: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(lambda: net(0).requires_grad_(False)(x.sub_(1))).result()

    x = torch.randn(5, 4)
    torch.testing.assert_close(ensemble(lambda: client)({"x": x}).logprobs, net(0)(x - 1).log_softmax(1))


# What students are given -------------------------------------------------------------------------------


class Sliced(ed.ArraySource):
    """Gives slices of what it holds."""

    def load(self, index: np.ndarray) -> Loaded:
        inputs = {name: array[index[0] : index[-1] + 1] for name, array in self._inputs.items()}
        return Loaded(inputs, sample_keys(inputs))


@pytest.mark.parametrize("how", ["torch", "data", "numpy"])
@pytest.mark.parametrize("writeable", [True, False])
def test_a_student_that_works_in_place_does_so_on_a_copy(how: str, writeable: bool) -> None:
    held = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    before, mask = held.copy(), np.ones((6, 4), bool)
    held.flags.writeable = mask.flags.writeable = writeable
    source = Sliced({"x": held, "mask": mask}, np.arange(6) % 3)
    inputs = read(source, np.arange(6))[0]
    for _ in range(2):
        torch.testing.assert_close(
            logits_of(InPlace(how), inputs, CPU, "fp32"), net(0)(torch.from_numpy(before) - 1).detach()
        )
    assert evaluate(InPlace(how), source, None, "test", CPU)["rows"] == 6
    np.testing.assert_array_equal(held, before)
    assert mask.all()


def test_the_tensors_of_an_array_that_is_read_only_may_be_changed() -> None:
    held = np.zeros((6, 4), np.float32)
    held.flags.writeable = False
    read(Sliced({"x": held}), np.arange(6))[0]["x"].add_(1)
    assert not held.any()


# What members give -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap", [lambda z: z, torch.from_numpy, lambda z: ed.LogProbs(z - np.log(np.exp(z).sum(1))[:, None])]
)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_members_may_answer_in_one_buffer(wrap: Callable[[np.ndarray], object], temperature: float) -> None:
    buffer = np.empty((9, 3), np.float32)

    def served(seed: int) -> Callable[[Tensor], object]:
        def answer(x: Tensor) -> object:
            buffer[: len(x)] = net(seed)(x).numpy()
            return wrap(buffer[: len(x)])

        return answer

    config = ed.CacheConfig(
        members=tuple(
            ed.Member(name=f"m{i}", build=lambda i=i: served(i), version="1", temperature=temperature) for i in range(3)
        )
    )
    whole = Ensemble([load_member(m) for m in config.members], config, 3, [CPU])
    x = torch.randn(6, 4)
    for i, found in enumerate(whole({"x": x}).members):
        torch.testing.assert_close(found, (net(i)(x) / temperature).log_softmax(1))


# What members share ------------------------------------------------------------------------------------


def saved(folder: Path, seed: int) -> Path:
    path = folder / f"{seed}.safetensors"
    save_file(net(seed).state_dict(), path)
    return path


def test_two_members_of_one_module_are_refused_where_they_load_other_weights(cli: Cli) -> None:
    cli.change("class Net(", "import functools\n\nclass Net(")
    cli.change("def cache():", "@functools.cache\ndef network():\n    return Net(48)\n\n\ndef cache():")
    cli.change("lambda: Net(48)", "network")
    error = cli("cache", "digits.py", "--out", "cache", code=2).stderr
    assert "members 'a' and 'b' share parts" in error and "build()" in error
    assert not (cli.folder / "cache" / "PLAN").exists()


def test_members_may_share_what_is_the_same_in_both(tmp_path: Path) -> None:
    one, trunk, weights = net(0), nn.Linear(4, 4), saved(tmp_path, 1)
    same = [ed.Member(name=n, build=lambda: one, weights=weights, temperature=t) for n, t in (("a", 1), ("b", 2))]
    heads = [ed.Member(name=f"h{i}", build=lambda i=i: nn.Sequential(trunk, net(i))) for i in range(2)]
    assert len(load_members([*same, *heads])) == 4


@pytest.mark.parametrize("share", ["storage", "number"])
def test_parts_that_a_later_member_changes_are_found(share: str, tmp_path: Path) -> None:
    one = net(0)

    def again() -> nn.Module:
        if share == "storage":  # another module, whose weight lies in the same memory
            other = net(3)
            other.weight = nn.Parameter(one.weight.data[:])
            return other
        one.scale = 2
        return one

    first = ed.Member(name="first", build=lambda: one, weights=saved(tmp_path, 1))
    later = ed.Member(name="later", build=again, weights=saved(tmp_path, 2 if share == "storage" else 1))
    with pytest.raises(UsageError, match="members 'first' and 'later' share parts, and what was loaded later changed"):
        load_members([first, later])


def test_a_part_without_weights_is_shared_too() -> None:
    one = nn.Identity()

    def again() -> nn.Module:
        one.scale = getattr(one, "scale", 0) + 1
        return nn.Sequential(one, net(0))

    with pytest.raises(UsageError, match="members 'a' and 'b' share parts"):
        load_members([ed.Member(name=name, build=again) for name in "ab"])


class Mute(nn.Linear):
    """Its train() returns nothing, as in many repositories."""

    def train(self, mode: bool = True) -> None:
        self.training = mode


def test_a_train_that_returns_nothing_is_fine() -> None:
    module = load_member(ed.Member(name="a", build=lambda: Mute(4, 3))).module
    assert not module.training and not module.weight.requires_grad


@pytest.mark.parametrize("build", [lambda: nn.LazyLinear(3), lambda: nn.Linear(4, 3, device="meta")])
def test_weights_without_values_are_refused(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="member 'a': weight has no values"):
        load_member(ed.Member(name="a", build=build))
    if isinstance(build(), nn.LazyLinear):
        loaded = load_member(ed.Member(name="a", build=build, weights=saved(tmp_path, 1)))
        torch.testing.assert_close(loaded.module.weight, net(1).weight)
