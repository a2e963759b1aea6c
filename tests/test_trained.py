"""What the weights of a run stand for: classes and inputs in their order, and numbers that are floating."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import ensemble_distill as ed
from ensemble_distill.errors import Corrupt, Mismatch, Unsafe
from ensemble_distill.evaluation.evaluate import check_data, load_student, of_bucket, run_cache
from ensemble_distill.fingerprint import sha256
from ensemble_distill.training.start import begin
from ensemble_distill.weights import printed_digest

CLASSES = ("a", "b", "c")


def source(*names: str) -> ed.ArraySource:
    return ed.ArraySource({name: np.zeros((4, 2), np.float32) for name in names})


def data(classes: tuple[str, ...] = CLASSES) -> ed.DataConfig:
    return ed.DataConfig(sources={"train": source("x")}, classes=classes)


def a_run(folder: Path, **config: Any) -> Path:
    """What a run leaves behind that was trained with CLASSES."""
    folder.mkdir(exist_ok=True)
    weights = safetensors.torch.save(nn.Linear(2, 3).state_dict())
    student = printed_digest(nn.Linear(2, 3))
    for name in ("last", "student"):
        (folder / f"{name}.safetensors").write_bytes(weights)
    (folder / "metrics.jsonl").write_text(json.dumps({"last": sha256(weights), "student": sha256(weights)}) + "\n")
    whole = {"cache": "", "cache_content": "", "manifest": "", "train": {}, "student": student}
    (folder / "config.json").write_text(json.dumps(whole | {"data": {"classes": list(CLASSES)}} | config))
    return folder


def test_a_second_stage_is_of_the_same_classes(tmp_path: Path) -> None:
    run, other = a_run(tmp_path), data(("b", "a", "c"))
    assert begin(run, nn.Linear(2, 3), data(), source("x")) == sha256((run / "last.safetensors").read_bytes())
    with pytest.raises(Mismatch, match=r"start: .* was trained with classes\[0\] = 'a', this pipeline says 'b'"):
        begin(run, nn.Linear(2, 3), other, source("x"))
    begin(run / "last.safetensors", nn.Linear(2, 3), other, source("x"))  # a file says nothing of its classes


def test_a_student_is_given_its_inputs_in_the_order_of_its_training(tmp_path: Path) -> None:
    """A module is called with them one after another, and its weights fit either way."""
    run, wrong = a_run(tmp_path, inputs=["x", "y"]), r"was trained with inputs\[0\] = 'x', this pipeline says 'y'"
    begin(run, nn.Linear(2, 3), data(), source("x", "y"))
    check_data(run, data(), source("x", "y"))
    for check in (lambda *of: begin(run, nn.Linear(2, 3), *of), lambda *of: check_data(run, *of)):
        with pytest.raises(Mismatch, match=wrong):
            check(data(), source("y", "x"))
    a_run(tmp_path)  # of an earlier release, which says nothing of inputs
    begin(run, nn.Linear(2, 3), data(), source("y", "x"))
    check_data(run, data(), source("y", "x"))


def test_a_bucket_is_not_opened_because_a_run_names_it(tmp_path: Path) -> None:
    run = a_run(tmp_path, cache="s3://bucket/cache")
    assert run_cache(run) is None and of_bucket(run)
    a_run(tmp_path, cache=str(tmp_path))
    assert run_cache(run) == str(tmp_path) and not of_bucket(run)


def test_a_run_to_begin_with_is_read_no_further_than_its_student_reaches(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    with (run / "last.safetensors").open("wb") as file:
        file.truncate(3 << 30)
    with pytest.raises(Unsafe, match="it can hold at most"):
        begin(run, nn.Linear(2, 3), data(), source("x"))
    (run / "last.safetensors").write_bytes(b"")
    with pytest.raises(Corrupt, match="not the weights that the run wrote"):
        begin(run, nn.Linear(2, 3), data(), source("x"))


def numbers(kind: str, size: int) -> bytes:
    """A safetensors file of the student's weights, all zero, as numbers of ``size`` bytes."""
    header = {
        "weight": {"dtype": kind, "shape": [3, 2], "data_offsets": [0, 6 * size]},
        "bias": {"dtype": kind, "shape": [3], "data_offsets": [6 * size, 9 * size]},
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(9 * size)


@pytest.mark.parametrize(("kind", "size"), [("F8_E8M0", 1), ("BOOL", 1), ("I64", 8), ("C64", 8)])
def test_weights_that_are_no_floating_numbers_are_refused(tmp_path: Path, kind: str, size: int) -> None:
    (tmp_path / "student.safetensors").write_bytes(numbers(kind, size))
    config = ed.TrainConfig(student=lambda: nn.Linear(2, 3), objective={"soft": ed.SoftTargets()})
    with pytest.raises(Mismatch, match=r"student\.safetensors does not fit the pipeline's student"):
        load_student(config, tmp_path, torch.device("cpu"))
    if kind != "F8_E8M0":  # which is read from a file, and not from bytes
        with pytest.raises(Mismatch, match=r"start: .*student\.safetensors does not fit the module"):
            begin(tmp_path / "student.safetensors", nn.Linear(2, 3), data(), source("x"))
    for kind, size in (("F64", 8), ("BF16", 2)):
        (tmp_path / "student.safetensors").write_bytes(numbers(kind, size))
        assert not load_student(config, tmp_path, torch.device("cpu")).weight.any()
