"""States that a cache or a run gets into by accident or malice: each is told, and the message leads out of it."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import Cli, load_module

from ensemble_distill.cache.plan import Plan
from ensemble_distill.evaluation.evaluate import load_student
from ensemble_distill.fingerprint import canonical_json
from ensemble_distill.store import records

TRAIN = ("train", "digits.py", "--cache", "cache", "--set", "epochs=1")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# Labels ---------------------------------------------------------------------------------------------


def test_labels_that_changed_are_noticed_in_a_part_of_the_samples_too(cached: Cli) -> None:
    cached.change("images, labels = arrays()", "images, labels = arrays()\n    labels[:300] = (labels[:300] + 1) % 10")
    assert "has another label" in cached(*TRAIN, "--out", "run", "--limit", "500", code=3).stderr
    assert not (cached.folder / "run").exists()


# Pages of keys --------------------------------------------------------------------------------------


def test_a_page_of_keys_that_cannot_be_written_keeps_the_commits_that_know_it(cached: Cli) -> None:
    page = cached.folder / "cache/keys/held_out-00000000"
    page.unlink()
    page.mkdir()  # as a full disk would, it keeps repair from writing which keys have to come back
    cached("repair", "cache", "digits.py", code=6)
    assert any(name.startswith("held_out") for name in names(cached.folder / "cache/commits"))
    page.rmdir()
    cached.change(
        "images, labels = arrays()", "images, labels = arrays()\n    images[1000:1200] = 16 - images[1000:1200]"
    )
    assert "the source has changed" in cached("repair", "cache", "digits.py", code=3).stderr


def test_units_that_are_dropped_leave_which_samples_they_were_of(cached: Cli) -> None:
    for commit in (cached.folder / "cache/commits").glob("held_out-*.targets.json"):
        shard = cached.folder / "cache/objects" / json.loads(commit.read_text().partition("\n")[2])["object"]
        shard.write_bytes(shard.read_bytes()[:-1])
    for commit in (cached.folder / "cache/commits").glob("held_out-*.tap*.json"):
        shard = cached.folder / "cache/objects" / json.loads(commit.read_text().partition("\n")[2])["object"]
        shard.write_bytes(shard.read_bytes()[:-1])
    cached("repair", "cache")
    assert (cached.folder / "cache/keys/held_out-00000000").read_bytes().startswith(b"lost ")
    cached("repair", "cache")  # and a second time changes nothing of that
    shutil.copy(cached.folder / "digits.py", cached.folder / "kept.py")
    cached.change(
        "images, labels = arrays()", "images, labels = arrays()\n    images[1000:1200] = 16 - images[1000:1200]"
    )
    assert "the source has changed" in cached("cache", "digits.py", "--out", "cache", code=3).stderr
    shutil.copy(cached.folder / "kept.py", cached.folder / "digits.py")
    cached("cache", "digits.py", "--out", "cache")
    cached("verify", "cache")


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_page_of_keys_without_a_commit_is_written_again(cached: Cli, damage: str) -> None:
    """As after a kill between the two."""
    cache = cached.folder / "cache"
    for path in (cache / "CURRENT", *(cache / "commits").glob("held_out*")):
        path.unlink()
    page = cache / "keys/held_out-00000000"
    page.write_bytes(
        page.read_bytes()[:100] if damage == "cut" else bytes([page.read_bytes()[0] ^ 1]) + page.read_bytes()[1:]
    )
    cached("repair", "cache", "digits.py")
    cached("verify", "cache")
    cached(*TRAIN, "--out", "run")


def test_a_copy_tells_of_pages_of_keys_that_its_target_has_lost(cached: Cli) -> None:
    cached("copy", "cache", "there")
    there = cached.folder / "there"
    (there / "CURRENT").unlink()
    (there / "keys/held_out-00000000").unlink()
    cached("copy", "cache", "there")
    cached("verify", "there")
    (there / "CURRENT").unlink()
    os.truncate(there / "keys/test-00000000", 0)
    assert "ensemble-distill repair" in cached("copy", "cache", "there", code=4).stderr


def test_smaller_or_larger_units_are_tried_where_nothing_was_committed(cached: Cli) -> None:
    cache = cached.folder / "cache"
    for folder in ("commits", "manifests", "pages"):
        shutil.rmtree(cache / folder)
    (cache / "CURRENT").unlink()
    for rows in ("100", "300"):  # the pages of keys are those of 200
        shutil.copytree(cache, cached.folder / rows)
        cached("cache", "digits.py", "--out", rows, "--set", f"unit_rows={rows}")
        cached("verify", rows)


def test_a_part_of_two_kinds_of_samples_is_refused(cached: Cli) -> None:
    cache = cached.folder / "cache"
    (cache / "CURRENT").unlink()
    plan = Plan.model_validate_json((cache / "plans" / f"{(cache / 'PLAN').read_text().strip()}.json").read_bytes())
    unit = plan.item(plan.number("train", 1, 0)).unit(plan.groups[0])
    path = cache / "commits" / f"{unit}.json"
    body = json.loads(path.read_bytes().partition(b"\n")[2])
    path.write_bytes(records.sealed(canonical_json(body | {"keys": "0" * 64})))
    assert "of other samples" in cached(*TRAIN, "--out", "run", "--allow-partial", code=4).stderr


# The seal -------------------------------------------------------------------------------------------


def test_a_sealed_cache_without_commits_is_not_taken_for_an_empty_one(cached: Cli) -> None:
    cache = cached.folder / "cache"
    plans = names(cache / "plans")
    shutil.rmtree(cache / "commits")
    error = cached("cache", "digits.py", "--out", "cache", "--batch-size", "32", code=3).stderr
    assert "capture.batch_size" in error and names(cache / "plans") == plans
    cached("repair", "cache")
    cached("verify", "cache")


def test_what_was_sealed_since_is_neither_given_up_nor_garbage(cached: Cli) -> None:
    """CURRENT put back to what was appended to, as from an older copy of that file."""
    cache = cached.folder / "cache"
    before = (cache / "CURRENT").read_bytes()
    cached("append", "digits.py", "--cache", "cache", "--views", "3")
    after = (cache / "CURRENT").read_bytes()
    (cache / "CURRENT").write_bytes(before)
    held = {folder: names(cache / folder) for folder in ("commits", "objects", "manifests", "pages", "plans")}
    assert f"sealed as {after.decode().strip()}" in cached("verify", "cache", code=4).stdout
    error = cached("append", "--cache", "cache", "--abandon", code=3).stderr
    assert after.decode().strip() in error and "ensemble-distill repair cache" in error
    cached("gc", "cache", "--delete", "--older-than", "0")
    assert held == {folder: names(cache / folder) for folder in held}
    for command in ("seal", "repair"):
        (cache / "CURRENT").write_bytes(before)
        cached(command, "cache")
        assert (cache / "CURRENT").read_bytes() == after
    cached("verify", "cache", "--expect-digest", before.decode().strip(), code=3)
    cached("verify", "cache")


def test_a_cache_that_was_put_back_to_before_an_append_is_as_it_was_after_it(cached: Cli) -> None:
    """CURRENT, PLAN and the commits come from an older copy; what was appended lies beside them."""
    cache = cached.folder / "cache"
    older = {name: (cache / name).read_bytes() for name in ("CURRENT", "PLAN")}
    there = names(cache / "commits")
    cached("append", "digits.py", "--cache", "cache", "--views", "3")
    newer = {name: (cache / name).read_bytes() for name in older}
    for name, data in older.items():
        (cache / name).write_bytes(data)
    for name in names(cache / "commits") - there:
        (cache / "commits" / name).unlink()
    assert "was sealed as" in cached("verify", "cache", code=4).stdout
    cached("repair", "cache")
    assert newer == {name: (cache / name).read_bytes() for name in newer}
    cached("verify", "cache", "--deep")


def test_a_lease_from_the_future_is_forgotten(cached: Cli) -> None:
    lease = cached.folder / "cache/leases/train-v000000-00000000"
    lease.parent.mkdir(exist_ok=True)
    lease.write_text('{"beat":3,"machine":"elsewhere","owner":"0123456789abcdef","process":"77:123"}')
    assert "at work" in cached("gc", "cache", code=3).stderr
    os.utime(lease, (time.time() + 10**8,) * 2)
    cached("gc", "cache")


# Runs -----------------------------------------------------------------------------------------------


def test_files_of_a_run_that_are_damaged_are_one_sentence(cached: Cli) -> None:
    cached(*TRAIN, "--out", "run")
    run = cached.folder / "run"
    whole = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}

    def refused(name: str, data: bytes | None, code: int, part: str) -> None:
        (run / name).unlink()
        if data is not None:
            (run / name).write_bytes(data)
        assert part in cached("evaluate", "digits.py", "--run", "run", code=code).stderr
        (run / name).write_bytes(whole[name])

    refused("metrics.jsonl", b"", 4, "metrics.jsonl does not say which weights")
    refused("metrics.jsonl", b"[1]\n", 4, "metrics.jsonl does not say which weights")
    refused("metrics.jsonl", None, 4, "metrics.jsonl")
    refused("config.json", b"[" * 200_000, 2, "no config.json that can be read")
    config = json.loads(whole["config.json"])
    for train in ([], {"ensemble": {"bogus": 1}}):
        refused("config.json", json.dumps(config | {"train": train}).encode(), 4, "config.json is damaged")
    (run / "student.safetensors").unlink()
    with (run / "student.safetensors").open("wb") as file:
        file.truncate(3 << 30)
    assert "it can hold at most" in cached("evaluate", "digits.py", "--run", "run", code=5).stderr
    (run / "student.safetensors").write_bytes(whole["student.safetensors"])
    (run / "config.json").write_bytes(b"[" * 200_000)
    assert "is damaged" in cached(*TRAIN, "--out", "run", code=4).stderr
    (run / "config.json").unlink()
    os.mkfifo(run / "config.json")
    cached("evaluate", "digits.py", "--run", "run", code=2)


def test_a_student_by_itself_needs_no_metrics(cached: Cli) -> None:
    cached(*TRAIN, "--out", "run")
    alone = cached.folder / "alone"
    alone.mkdir()
    shutil.copy(cached.folder / "run/student.safetensors", alone)
    pipeline = load_module(cached.folder / "digits.py")
    assert not load_student(pipeline.train(), alone, torch.device("cpu")).training
