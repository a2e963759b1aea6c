"""Sources of one's own: what ``load`` may give, and what is refused before a member or a student is shown any of it."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Cli

import ensemble_distill as ed
from ensemble_distill.cache.samples import read
from ensemble_distill.errors import Mismatch, UsageError
from ensemble_distill.fingerprint import sample_keys
from ensemble_distill.sources.arrays import Limited, Loaded, check_label_range
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


def slices(x: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Rows of an array, and no copy where they stand one behind the other."""
    first = int(index[0]) if len(index) else 0
    return x[first : first + len(index)] if (np.diff(index) == 1).all() else x[index]


@pytest.mark.parametrize("size", [0, 1, 2, 3, 40])
def test_views_of_what_a_source_holds_are_fine(size: int) -> None:
    held = {"sliced": X, "missing": np.full((40, 3), np.nan), "constant": np.broadcast_to(X[:1], (40, 3))}
    for x in held.values():
        assert check_source(Given(lambda i, x=x: slices(x, i), size), "train") == ("x",)
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

    for look in (lambda s: load(s, np.arange(5)), lambda s: check_source(s, "train")):
        with pytest.raises(UsageError, match="gave 'x' as a Tensor, expected a numpy array"):
            look(Tensors(len))


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        (lambda k: k[:, :1], r"uint8 \[5, 1\]"),
        (lambda k: k[:, :8], r"uint8 \[5, 8\]"),
        (lambda k: np.concatenate([k, k], axis=1), r"uint8 \[5, 32\]"),
        (lambda k: k.astype(np.int64), r"int64 \[5, 16\]"),
        (lambda k: k.view("S16")[:, 0], r"\|S16 \[5\]"),
        (lambda k: k.view("<i8")[:, 0], r"int64 \[5\]"),
    ],
)
def test_keys_are_sixteen_bytes_for_each_sample(keys: Callable[[np.ndarray], np.ndarray], found: str) -> None:
    class Keyed(Given):
        def load(self, index: np.ndarray) -> Loaded:
            loaded = super().load(index)
            return Loaded(loaded.inputs, keys(loaded.keys))

    with pytest.raises(UsageError, match=rf"a Keyed gave keys of {found}, expected uint8 \[5, 16\]"):
        load(Keyed(lambda i: X[i]), np.arange(5))


# Samples that depend on more than their position -------------------------------------------------------


@pytest.mark.parametrize("name", ["the longest of its batch", "the first of its batch", "another key in each batch"])
def test_samples_that_depend_on_their_batch_are_refused(name: str) -> None:
    def give(index: np.ndarray) -> np.ndarray:
        if name == "the longest of its batch":
            return np.zeros((len(index), 1 + (index % 7).max(initial=0)), np.int64)
        return X[index] - X[index[:1]] if name == "the first of its batch" else X[index]

    class Keyed(Given):
        def load(self, index: np.ndarray) -> Loaded:
            loaded = super().load(index)
            return Loaded(loaded.inputs, sample_keys(loaded.inputs | {"size": np.full(len(index), len(index))}))

    source, what = (Keyed(give), "keys") if name == "another key in each batch" else (Given(give), "x")
    words = f"load.. of the source 'train' gives other {what} of sample \\d+ alone than in a batch"
    with pytest.raises(UsageError, match=f"{words}: a sample's inputs must not depend on its batch"):
        check_source(source, "train")


class OneHandle(Given):
    """Samples of a file that all calls of load read by one handle."""

    def __init__(self, path: Path, size: int) -> None:
        X.tofile(path)
        self.file, self.size = path.open("rb"), size

    def load(self, index: np.ndarray) -> Loaded:
        inputs = {"x": np.stack([self.row(i) for i in index])}
        return Loaded(inputs, sample_keys(inputs))

    def row(self, i: int) -> np.ndarray:
        self.file.seek(i * X[0].nbytes)
        return np.frombuffer(self.file.read(X[0].nbytes), np.float32)


class Locked(OneHandle):
    lock = threading.Lock()

    def load(self, index: np.ndarray) -> Loaded:
        with self.lock:
            return super().load(index)


@pytest.mark.parametrize("size", [2, 3, 40])
def test_a_source_that_does_not_bear_two_threads_is_refused(size: int, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"load\(\) of the source 'train' .* where two threads call it at once"
    ) as error:
        check_source(OneHandle(tmp_path / "x", size), "train")
    assert "threading.Lock" in error.value.hint
    assert check_source(Locked(tmp_path / "x", size), "train") == ("x",)


def test_what_a_source_shares_between_its_calls_is_seen_without_an_error() -> None:
    place = np.empty(3, np.float32)

    def through(i: int) -> np.ndarray:
        place[:] = X[i]
        return place.copy()

    with pytest.raises(UsageError, match="gives other x where two threads call it at once, as --workers do"):
        check_source(Given(lambda index: np.stack([through(i) for i in index])), "train")


def test_a_source_that_fails_with_two_threads_is_refused() -> None:
    inside: list[int] = []

    def alone(index: np.ndarray) -> np.ndarray:
        inside.append(1)
        if len(inside) > 1:
            raise ValueError("in use")
        return X[index[: len(index) * inside.pop()]]

    with pytest.raises(UsageError, match=r"fails \(ValueError: in use\) where two threads call it at once"):
        check_source(Given(alone), "train")


# Labels ------------------------------------------------------------------------------------------------


def labelled(labels: object, size: int = 40) -> Given:
    source = Given(lambda i: X[i], size)
    source.labels = labels
    return source


Y = np.arange(40) % 3


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (Y.astype(float), "has an array of float64 as labels, expected a numpy array of integers"),
        (Y > 0, "has an array of bool as labels"),
        (Y.astype("U1"), "has an array of <U1 as labels"),
        (Y.tolist(), "has a list as labels"),
        (torch.from_numpy(Y), "has a Tensor as labels"),
        (np.eye(3)[Y].astype(int), r"has labels of shape \[40, 3\]"),
        (np.array(1), r"has labels of shape \[\]"),
        (Y[:37], "has 37 labels for 40 samples"),
        (np.arange(50) % 3, "has 50 labels for 40 samples"),
    ],
)
def test_labels_are_one_integer_for_each_sample(labels: object, words: str) -> None:
    source = labelled(labels)
    for some in (source, Limited(source, 20)):  # a limit makes no labels of others fit
        for check in (lambda s: check_label_range(s, "train", 3), lambda s: check_source(s, "train")):
            with pytest.raises(UsageError, match=f"source 'train' {words}"):
                check(some)


@pytest.mark.parametrize("kind", ["u1", "i1", "<i4", ">i4", "u8", "i8"])
def test_labels_may_be_any_integers(kind: str) -> None:
    source, index = labelled(Y.astype(kind)), np.array([3, 1, 1, 39])
    check_label_range(source, "train", 3)
    assert torch.equal(read(source, index)[1], torch.from_numpy(Y[index].astype(np.int64)))
    with pytest.raises(Mismatch, match="has labels 0 to 2, but there are 2 classes"):
        check_label_range(source, "train", 2)


def test_all_commands_take_labels_of_one_byte_and_none_takes_too_few(cli: Cli) -> None:
    small = "class Small(ed.ArraySource):\n    labels = property(lambda self: self._labels.astype(np.uint8))\n\n\n"
    cli.change("class Net(", small + "class Net(")
    cli.change("ed.ArraySource({", "Small({")
    cli.change("views=2", 'views=2, calibrate="held_out"')
    cli.change("transforms=(ed.Crop(padding=1),)", "mix=ed.Mixup()")
    cli("cache", "digits.py", "--out", "cache", "--limit", 60)
    cli("train", "digits.py", "--cache", "cache", "--out", "run", "--limit", 60, "--set", "epochs=2")
    shutil.rmtree(cli.folder / "cache")
    cli.change("self._labels.astype(np.uint8)", "self._labels[1:]")
    assert "source 'test' has 596 labels for 597" in cli("evaluate", "digits.py", "--run", "run", code=2).stderr


@pytest.mark.parametrize("number", [1.5, np.nan, np.inf])
def test_an_array_source_cuts_no_labels(number: float) -> None:
    assert ed.ArraySource({"x": X}, Y.astype(np.float32)).labels.tolist() == Y.tolist()
    with pytest.raises(UsageError, match=f"needs whole numbers as labels, found {number}"):
        ed.ArraySource({"x": X}, np.where(np.arange(40) == 7, number, Y))
