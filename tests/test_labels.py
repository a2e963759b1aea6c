"""Labels of other samples: told for every codec, where images or labels moved, and of a part of the source."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Cli, load_module
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_distill import ArraySource, Cache, DataConfig, EnsembleConfig, open_cache
from ensemble_distill.cache.labels import in_captured_order, other_label
from ensemble_distill.errors import Mismatch
from ensemble_distill.sources.arrays import Limited, Loaded
from ensemble_distill.targets import Targets

ROWS = 120
CODECS = {
    "varopt": '{"name":"varopt","k":3}',
    "sampled": '{"name":"sampled","n":3}',
    "topk": '{"name":"topk","k":2}',
    "members": '{"name":"members"}',
}
OTHER = EnsembleConfig(weights={"a": 1.0})


@pytest.fixture(scope="module")
def folder(teachers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline's folder with a cache of the first samples by each codec."""
    folder = tmp_path_factory.mktemp("labels") / "work"
    shutil.copytree(teachers, folder)
    for name, codec in CODECS.items():
        Cli(folder)("cache", "digits.py", "--out", name, "--views", 1, "--limit", ROWS, "--set", f"codec={codec}")
    return folder


@pytest.fixture(params=CODECS)
def cache(request: pytest.FixtureRequest, folder: Path) -> Cache:
    opened = open_cache(folder / request.param)
    return opened.mixed(OTHER) if request.param == "members" else opened


@pytest.fixture
def arrays(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    images, labels = load_module(folder / "digits.py").arrays()
    return images[:ROWS], labels[:ROWS]


class Increasing(ArraySource):
    """As of a file that wants increasing positions: the samples come in another order than they were asked for."""

    def load(self, index: np.ndarray) -> Loaded:
        return super().load(np.sort(index))


def read(cache: Cache, source: ArraySource | Limited) -> dict[bytes, int]:
    """The labels of a source's samples by key, as batches hand them out."""
    cache.check_labels(source, "train")
    batches = list(cache.loader(source, 16))
    return {key.tobytes(): int(label) for b in batches for key, label in zip(b.keys, b.targets.labels, strict=True)}


def test_images_that_moved_without_their_labels_are_told(cache: Cache, arrays: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = arrays
    order = np.random.default_rng(0).permutation(ROWS)
    with pytest.raises(Mismatch, match="another label"):  # also of one's own loop
        list(cache.loader(ArraySource({"image": images[order]}, labels), 16))
    for source in (ArraySource({"image": images[order]}, labels), Increasing({"image": images}, labels)):
        with pytest.raises(Mismatch, match=r"sample \d+ of train has another label"):
            read(cache, source)


def test_labels_that_moved_without_their_images_are_told(cache: Cache, arrays: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = arrays
    order = np.random.default_rng(0).permutation(ROWS)
    changed = labels[order].copy()
    changed[7] = (changed[7] + 1) % 10
    for source in (ArraySource({"image": images}, labels[order]), ArraySource({"image": images[order]}, changed)):
        with pytest.raises(Mismatch, match="labels of train"):
            cache.check_labels(source, "train")


def test_ones_own_loop_is_told_of_labels_that_moved(cache: Cache, arrays: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = arrays
    changed = labels.copy()
    changed[7] = (changed[7] + 1) % 10
    for other in (np.random.default_rng(0).permutation(labels), changed):
        source = ArraySource({"image": images}, other)
        for _ in range(2):  # told again, and not only of the first loader
            with pytest.raises(Mismatch, match="labels of train"):
                cache.loader(source, 16)
    list(cache.loader(ArraySource({"image": images}, labels), 16))


def test_the_keys_of_a_source_in_another_order_are_read_once_for_its_labels(
    cache: Cache, arrays: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, look_up = [], Cache.look_up
    monkeypatch.setattr(Cache, "look_up", lambda *args: looked.append(args[1]) or look_up(*args))
    (images, labels), order = arrays, np.random.default_rng(0).permutation(ROWS)
    checked, unchecked = (ArraySource({"image": images[order]}, labels[order]) for _ in range(2))
    cache.check_labels(checked, "train")
    for source in (checked, checked, unchecked, unchecked):
        list(cache.loader(source, 16))
    assert looked == [checked, unchecked]


def test_samples_that_moved_with_their_labels_are_served(cache: Cache, arrays: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = arrays
    order = np.random.default_rng(0).permutation(ROWS)
    expected = read(cache, ArraySource({"image": images[order]}, labels[order]))
    assert read(cache, ArraySource({"image": images}, labels)) == expected
    assert read(cache, ArraySource({"image": images[:50]}, labels[:50])).items() <= expected.items()


def test_a_source_in_another_order_proves_the_labels_of_a_part(
    cache: Cache, arrays: tuple[np.ndarray, np.ndarray]
) -> None:
    images, labels = arrays
    order, changed = np.random.default_rng(0).permutation(ROWS), labels[:50].copy()
    changed[9] = (changed[9] + 1) % 10
    cache.check_labels(ArraySource({"image": images[order]}, labels[order]), "train")
    with pytest.raises(Mismatch, match="sample 9 of train has another label"):
        read(cache, ArraySource({"image": images[:50]}, changed))


def test_the_first_samples_of_a_pipelines_source_are_proved_by_all_of_it(
    cache: Cache, folder: Path, arrays: tuple[np.ndarray, np.ndarray]
) -> None:
    images, labels = arrays
    classes, views = (getattr(cache.plan.reading, name) for name in ("classes", "views"))
    whole = Increasing({"image": images}, labels)
    cache.check(DataConfig(sources={"train": whole}, classes=classes, views=views))
    with pytest.raises(Mismatch, match="another label"):
        read(cache, Limited(whole, 50))


def test_a_label_that_was_kept_and_is_now_one_that_was_not_is_told(
    folder: Path, arrays: tuple[np.ndarray, np.ndarray]
) -> None:
    images, labels = (part[:50] for part in arrays)
    cache = open_cache(folder / "topk")
    ids = cache.targets_at(np.arange(50)).ids.numpy()
    sure = np.flatnonzero((ids[:, 0] == labels) & (cache.targets_at(np.arange(50)).residual.numpy() < 0.05))
    changed = labels.copy()
    changed[sure[0]] = next(c for c in range(10) if c not in ids[sure[0]])
    read(cache, ArraySource({"image": images}, labels))
    with pytest.raises(Mismatch, match=f"sample {sure[0]} of train has another label"):
        read(cache, ArraySource({"image": images}, changed))


def test_equal_samples_of_different_labels_may_change_places(cli: Cli, arrays: tuple[np.ndarray, np.ndarray]) -> None:
    cli.change('return digits["images"]', 'digits = dict(digits)\n    twins(digits)\n    return digits["images"]')
    cli.change(
        "def data():",
        'def twins(digits):\n    digits["images"][5:60:5] = digits["images"][0]\n'
        '    digits["labels"][5:60:5] = 7\n\n\ndef data():',
    )
    cli("cache", "digits.py", "--out", "twins", "--views", 1, "--limit", ROWS)
    cache = open_cache(cli.folder / "twins")
    images, labels = (part[:ROWS] for part in load_module(cli.folder / "digits.py").arrays())
    order = np.random.default_rng(3).permutation(ROWS)
    for some in (order, order[:100]):
        read(cache, ArraySource({"image": images[some]}, labels[some]))
    changed = labels[order].copy()
    changed[np.flatnonzero(order == 61)] += 1
    with pytest.raises(Mismatch, match="another label"):
        read(cache, ArraySource({"image": images[order]}, changed % 10))
    read(cache, ArraySource({"image": images}, labels))
    read(cache, ArraySource({"image": images[order]}, labels[order]))
    changed = labels[:50].copy()
    changed[5] = 3  # which none of its equals has
    with pytest.raises(Mismatch, match="sample 5 of train has another label"):
        read(cache, ArraySource({"image": images[:50]}, changed))


@pytest.mark.parametrize(
    ("kept", "label", "captured", "other"),
    [
        ((0.5, 0.3), 0, 0.5, False),
        ((0.5, 0.3), 1, 0.5, True),
        ((0.5, 0.3), 9, 0.19, False),  # it was not kept then either
        ((0.5, 0.3), 9, 0.01, False),
        ((0.5, 0.3), 9, 0.28, True),  # more than is left over for all that were not
        ((0.5, 0.05), 9, 0.3, True),  # likelier than one that was kept
        ((0.5, 0.05), 9, 0.05, False),
        ((0.5, 0.3), 9, np.nan, False),
    ],
)
def test_a_label_that_was_not_kept_was_no_likelier_than_those_that_were(
    kept: tuple[float, float], label: int, captured: float, other: bool
) -> None:
    logs, row = torch.tensor([kept]).log(), torch.tensor([captured]).log()
    residual = torch.tensor([1 - sum(kept)])
    targets = Targets(logs, kind="ghost", ids=torch.tensor([[0, 1]]), residual=residual, classes=10)
    assert other_label(replace(targets, labels=torch.tensor([label]), label_logprob=row)).tolist() == [other]


@settings(max_examples=40)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_labels_are_put_back_where_their_samples_were(numbers: list[int], random: object) -> None:
    keys = np.array([[n] * 16 for n in numbers], np.uint8)
    labels, order = np.array(numbers) * 3, np.array(numbers)
    order = np.arange(len(numbers))
    random.shuffle(order)  # type: ignore[attr-defined]
    back = in_captured_order(labels[order], keys[order], keys)
    assert back is not None and np.array_equal(back.labels, labels) and back.sure
    assert in_captured_order(labels, keys, keys + 1) is None
    twice = in_captured_order(np.r_[labels, 100, 101], np.r_[keys, keys[:1], keys[:1]], np.r_[keys, keys[:1], keys[:1]])
    assert twice is not None and not twice.sure


def test_fitting_and_evaluating_by_another_ensemble_tell_of_images_that_moved(cli: Cli) -> None:
    cli("cache", "digits.py", "--out", "cache", "--views", 1, "--set", 'codec={"name":"members"}')
    train = ["train", "digits.py", "--cache", "cache", "--out", "run", "--set", "epochs=1", "--limit", 200]
    cli(*train, "--set", 'ensemble.weights={"a":1.0}')
    cli.change(
        "for name, part in parts.items()},",
        'for name, part in parts.items()} | {name: ed.ArraySource({"image": images[parts[name]][::-1]}, '
        'labels[parts[name]]) for name in ("held_out", "test")},',
    )
    for command in (["fit-weights", "digits.py", "--cache", "cache"], ["evaluate", "digits.py", "--run", "run"]):
        assert "has another label" in cli(*command, code=3).stderr
