"""Runs in this process, from a cache without teachers: stopped, gone on with, and given states that they never had."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import a_plan, keys_of, put_item
from torch import Tensor, nn

import ensemble_distill as ed
from ensemble_distill.errors import Corrupt, Interrupted, Mismatch
from ensemble_distill.recording.seal import seal
from ensemble_distill.sources.arrays import Loaded
from ensemble_distill.store.local import LocalStorage
from ensemble_distill.store.store import Store
from ensemble_distill.training import checkpoint
from ensemble_distill.training.run import Run

PLAN = a_plan(views=1, groups=1)
PLAN = PLAN.model_copy(update={"reading": PLAN.reading.model_copy(update={"temperature_before": ()})})
PLAN = PLAN.model_copy(update={"splits": {"train": PLAN.splits["train"], "held_out": PLAN.splits["train"]}})
KEYS = np.concatenate([keys_of(item) for item in PLAN.items() if item.split == "train"])
LINE = {"epoch": 1}


class Source:
    """Twelve samples in an order of one's own."""

    labels = None

    def __init__(self, order: np.ndarray) -> None:
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def load(self, index: np.ndarray) -> Loaded:
        rows = self.order[index]
        return Loaded({"x": np.stack([np.sin(rows), np.cos(rows)], 1).astype(np.float32)}, KEYS[rows])


def run(root: Path, order: np.ndarray | None = None, precision: Any = "fp32", scores: Sequence[float] = ()) -> Run:
    """Two epochs of three batches; with ``scores``, each epoch's KL on held_out is the next one of them."""
    store = Store(LocalStorage(root / "cache", sync=False))
    if store.current() is None:
        digest = store.put_plan(PLAN)
        for item in PLAN.items():
            put_item(store, PLAN, digest, item)
        seal(PLAN, digest, store)
    source = Source(np.arange(12) if order is None else order)
    sources = {"train": source} | ({"held_out": source} if scores else {})
    data = ed.DataConfig(sources=sources, classes=("a", "b", "c"))
    config = ed.TrainConfig(
        student=lambda: nn.Linear(2, 3), objective={"soft": ed.SoftTargets()}, epochs=2, batch_size=4,
        precision=precision,
    )  # fmt: skip
    begun = Run(data, config, data.sources, ed.open_cache(root / "cache"), root / "run", torch.device("cpu"))
    if scores:
        given = iter(scores)
        setattr(begun, "_score", lambda model, split: {"kl": next(given)})  # noqa: B010
    return begun


def killed(begun: Run, epoch: int) -> None:
    """As by kill -9, just before the checkpoint of an epoch is written."""
    save = begun._save

    def dying() -> None:
        if begun.state["epoch"] == epoch:
            raise KeyboardInterrupt
        save()

    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(begun, "_save", dying)
        begun.train()


def best(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / "run").glob("best*")}


def stopped(root: Path, step: int = 2) -> None:
    """A run that was asked to stop after some steps."""
    begun = run(root)
    with pytest.raises(Interrupted):
        begun.train(stop=lambda: 1.0 if begun.state["step"] == step else None)


def forge(root: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict, **fields: Any) -> None:
    """Another state under a seal that fits it."""
    storage = LocalStorage(root / "run")
    saved = checkpoint.load(storage)
    assert saved is not None
    state = saved[0].model_dump() | fields
    checkpoint.save(storage, checkpoint.State.model_construct(**state), change(saved[1]))


@pytest.mark.parametrize(
    "fields",
    [
        {"sums": {"loss": 1.0}}, {"sums": {"loss": 1.0, "soft": 1.0, "hard": 1.0}}, {"epoch": -5}, {"batch": -1},
        {"epoch": 10**30}, {"step": 10**12}, {"epoch": 1}, {"finished": True},
        {"epoch": 2, "batch": 0, "step": 6, "finished": True}, {"history": (LINE,)}, {"batch": 4, "step": 4},
        {"epoch": 3, "batch": 0, "step": 9, "history": (LINE, LINE, LINE)}, {"finished": True, "history": (LINE,)},
        {"best": {"kl": 1.0}}, {"best": {"kl": 1.0, "epoch": 1}},
    ],
)  # fmt: skip
def test_a_state_that_the_training_does_not_come_to_is_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    stopped(tmp_path)
    forge(tmp_path, **fields)
    with pytest.raises(Corrupt, match=r"checkpoint\.json"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("student/weight", None), ("student/weight", torch.zeros(1)), ("optimizer/x/y/z", torch.zeros(1)),
        ("optimizer/99/exp_avg", torch.zeros(1)), ("optimizer/0/exp_avg", torch.zeros(2, 2, 2)), ("random/cpu", None),
        ("random/cpu", torch.zeros(3, dtype=torch.uint8)), ("random/cpu", torch.zeros(3)),
    ],
)  # fmt: skip
def test_tensors_that_are_not_those_of_the_run_are_refused(tmp_path: Path, name: str, value: Tensor | None) -> None:
    stopped(tmp_path)
    forge(tmp_path, lambda held: {n: t for n, t in (held | {name: value}).items() if t is not None})
    with pytest.raises(Corrupt, match=r"checkpoint\.json: its tensors are not those of this run"):
        run(tmp_path)


def test_a_source_that_came_into_another_order_in_the_middle_of_an_epoch_is_refused(tmp_path: Path) -> None:
    """Some samples would be seen twice in this epoch, and others never."""
    stopped(tmp_path)
    with pytest.raises(Mismatch, match="middle of epoch 1, and since then the samples of 'train' stand in another"):
        run(tmp_path, np.arange(12)[::-1])
    forge(tmp_path, order="")  # of an earlier release
    run(tmp_path, np.arange(12)[::-1])


def test_between_two_epochs_a_source_may_come_into_another_order(tmp_path: Path) -> None:
    begun = run(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        begun.train(lambda progress: (_ for _ in ()).throw(KeyboardInterrupt) if progress.line else None)
    assert b"order" not in (tmp_path / "run/checkpoint.json").read_bytes()
    assert run(tmp_path, np.arange(12)[::-1]).train()["epoch"] == 2


def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path) -> None:
    for step in (2, 3, 5):
        stopped(tmp_path / str(step), step)
        run(tmp_path / str(step)).train()
    run(tmp_path / "straight").train()
    ends = {path.read_bytes() for path in tmp_path.glob("*/run/student.safetensors")}
    assert len(ends) == 1 and len(list(tmp_path.glob("*/run"))) == 4


def test_a_training_killed_before_a_checkpoint_keeps_the_best_weights_of_the_one_before(tmp_path: Path) -> None:
    """What is trained again may come to other scores, as on another machine."""
    killed(run(tmp_path, scores=(2.0, 1.0)), 2)
    first = best(tmp_path)["best-000001.safetensors"]
    assert run(tmp_path, scores=(3.0,)).train()["best"] == {"kl": 2.0, "epoch": 1}
    assert best(tmp_path) == {"best.safetensors": first}
    assert (tmp_path / "run/student.safetensors").read_bytes() == first


def test_former_best_weights_are_removed(tmp_path: Path) -> None:
    begun = run(tmp_path, scores=(2.0, 1.0))
    with pytest.raises(KeyboardInterrupt):
        begun.train(lambda progress: (_ for _ in ()).throw(KeyboardInterrupt) if progress.step == 6 else None)
    assert list(best(tmp_path)) == ["best-000001.safetensors"]
    run(tmp_path, scores=(1.0,)).train()
    assert list(best(tmp_path)) == ["best.safetensors"]


@pytest.mark.parametrize("damage", [b"damaged", None])
def test_a_run_whose_best_weights_are_not_those_that_were_saved_does_not_go_on(
    tmp_path: Path, damage: bytes | None
) -> None:
    killed(run(tmp_path, scores=(2.0, 3.0)), 2)
    path = tmp_path / "run/best-000001.safetensors"
    path.unlink()
    if damage is not None:
        path.write_bytes(damage)
    with pytest.raises(Corrupt, match=r"best-000001\.safetensors is (damaged|missing)"):
        run(tmp_path, scores=(3.0,))


def test_a_run_with_one_file_of_best_weights_goes_on(tmp_path: Path) -> None:
    """As earlier releases wrote it."""
    killed(run(tmp_path, scores=(2.0, 3.0)), 2)
    (tmp_path / "run/best-000001.safetensors").rename(tmp_path / "run/best.safetensors")
    held = best(tmp_path)
    run(tmp_path, scores=(3.0,)).train()
    assert best(tmp_path) == held


def test_best_weights_that_no_checkpoint_names_are_nobodys(tmp_path: Path) -> None:
    killed(run(tmp_path, scores=(2.0,)), 1)
    assert best(tmp_path)
    assert run(tmp_path).train()["best"] == {}
    assert not best(tmp_path)


def test_of_two_trainings_in_one_directory_the_second_is_refused(tmp_path: Path) -> None:
    """Each would remove the tensors that the other one's record names."""
    first = run(tmp_path)
    with pytest.raises(Mismatch, match="run: another process trains here"):
        run(tmp_path)
    with pytest.raises(Interrupted):
        first.train(stop=lambda: 1.0)
    run(tmp_path).train()


def test_a_directory_is_free_at_once_where_its_holder_was_killed(tmp_path: Path) -> None:
    stopped(tmp_path)
    told, tell = os.pipe()
    if (child := os.fork()) == 0:
        held = LocalStorage(tmp_path / "run").hold()
        os.write(tell, b"-" if held is None else b"+")
        signal.pause()
    try:
        assert os.read(told, 1) == b"+"
        with pytest.raises(Mismatch, match="another process trains here"):
            run(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    run(tmp_path).train()


def test_a_refused_run_holds_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_build", lambda self: (_ for _ in ()).throw(ValueError("nowhere")))
        run(tmp_path)
    assert not (tmp_path / "run").exists()
    run(tmp_path).train()


def test_a_directory_that_cannot_be_locked_is_trained_in_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(handle: int, how: int) -> None:
        raise OSError(errno.EBADF, "as of NFS")

    run(tmp_path)  # makes the cache
    monkeypatch.setattr("fcntl.flock", flock)
    assert run(tmp_path).train()["epoch"] == 2


@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_a_pipeline_that_turned_gradients_off_trains_all_the_same(tmp_path: Path, precision: str) -> None:
    torch.set_grad_enabled(False)
    try:
        trained = run(tmp_path, precision=precision)
        before = trained.student.weight.clone()
        trained.train()
        assert not torch.equal(trained.student.weight, before)
    finally:
        torch.set_grad_enabled(True)
