"""Sources of one's own: what ``load`` may give, and what is refused before a member or a student is shown any of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import Cli

import ensemble_distill as ed
from ensemble_distill.errors import UsageError
from ensemble_distill.fingerprint import sample_keys
from ensemble_distill.sources.arrays import Loaded, check_label_range
from ensemble_distill.sources.loading import CALLS, check_source, load

OWN = """BUFFER = np.empty((512, 1, 8, 8), np.uint8)


class Own:
    def __init__(self, inputs, labels):
        self.images, self.labels = inputs["image"], labels

    def __len__(self):
        return len(self.images)

    def load(self, index):
        from ensemble_distill.fingerprint import sample_keys
        from ensemble_distill.sources.arrays import Loaded

        inputs = {"image": np.take(self.images, index, axis=0, out=BUFFER[: len(index)])}
        return Loaded(inputs, sample_keys(inputs))


"""


def test_a_source_that_uses_its_buffer_again_is_refused_by_both_stages(cached: Cli) -> None:
    cached.change("class Net(", OWN + "class Net(")
    cached.change("ed.ArraySource(", "Own(")
    for command in (("cache", "digits.py", "--out", "new"), ("train", "digits.py", "--cache", "cache", "--out", "run")):
        error = cached(*command, code=2).stderr
        assert "load() of the source 'train' writes into the image that it gave before" in error and "copy" in error
    assert not (cached.folder / "new" / "PLAN").exists()


def test_splits_give_their_inputs_in_one_order(cli: Cli) -> None:
    order = '("image", "more")[:: -1 if name == "test" else 1]'
    cli.change('{"image": images[part]}', "{n: images[part] for n in " + order + "}")
    cli.change("def forward(self, image):", "def forward(self, image, more):")
    error = cli("cache", "digits.py", "--out", "cache", code=2).stderr
    assert "the source 'test' gives the inputs more, image, and 'train' image, more" in error
    assert not (cli.folder / "cache" / "PLAN").exists()


class Given:
    """A source whose load is a function of the index."""

    labels = None

    def __init__(self, function: Callable[[np.ndarray], np.ndarray], size: int = 40) -> None:
        self.function, self.size = function, size

    def __len__(self) -> int:
        return self.size

    def load(self, index: np.ndarray) -> Loaded:
        inputs = {"x": self.function(index)}
        return Loaded(inputs, sample_keys(inputs))


X = np.arange(120, dtype=np.float32).reshape(40, 3)


def ring(count: int) -> Callable[[np.ndarray], np.ndarray]:
    buffers, calls = np.empty((count, 40, 3), np.float32), iter(range(10**6))

    def give(index: np.ndarray) -> np.ndarray:
        out = buffers[next(calls) % count, : len(index)]
        out[:] = X[index]
        return out

    return give


@pytest.mark.parametrize("count", [1, 2, CALLS - 1])
def test_buffers_in_turn_are_found(count: int) -> None:
    with pytest.raises(UsageError, match="writes into the x that it gave before"):
        check_source(Given(ring(count)), "train")


@pytest.mark.parametrize("size", [0, 1, 2, 3, 40])
def test_views_of_what_a_source_holds_are_fine(size: int) -> None:
    held = {"sliced": X, "missing": np.full((40, 3), np.nan), "constant": np.broadcast_to(X[:1], (40, 3))}
    for x in held.values():
        assert check_source(Given(lambda i, x=x: x[i.min(initial=0) :][: len(i)], size), "train") == ("x",)
    assert check_source(Given(lambda i: X[i], size), "train") == ("x",)


@pytest.mark.parametrize(
    "change", [lambda x: x[:, ::-1], lambda x: x.astype(">f4"), lambda x: x.astype(">f4")[:, ::-1]]
)
def test_any_order_of_bytes_and_rows_is_read(change: Callable[[np.ndarray], np.ndarray]) -> None:
    index = np.arange(5)
    inputs, _ = load(Given(lambda i: change(X[i])), index)
    assert torch.equal(inputs["x"], torch.from_numpy(np.ascontiguousarray(change(X[index])).astype("<f4")))


@pytest.mark.parametrize(
    ("give", "words"),
    [
        (lambda i: X[np.unique(i // 2)], "load() of a Given gave 3 rows of 'x' for 5 positions"),
        (lambda i: X[i].astype("U5"), "the input 'x' is an array of <U5, of which torch has no tensors"),
    ],
)
def test_what_is_no_batch_is_refused(give: Callable[[np.ndarray], np.ndarray], words: str) -> None:
    with pytest.raises(UsageError) as error:
        load(Given(give), np.arange(5))
    assert words in str(error.value)


def test_tensors_are_no_arrays() -> None:
    class Tensors(Given):
        def load(self, index: np.ndarray) -> Loaded:
            return Loaded({"x": torch.from_numpy(X[index])}, sample_keys({"x": X[index]}))

    for read in (lambda s: load(s, np.arange(5)), lambda s: check_source(s, "train")):
        with pytest.raises(UsageError, match="gave 'x' as a Tensor, expected a numpy array"):
            read(Tensors(len))


def test_labels_of_several_columns_are_refused() -> None:
    with pytest.raises(UsageError, match=r"source 'train' has labels of shape \[40, 3\]"):
        check_label_range(ed.ArraySource({"x": X}, np.eye(3)[np.arange(40) % 3]), "train", 3)
