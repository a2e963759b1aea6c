"""Bad input and faults, as a user meets them: the exit code, one sentence, the next step, and nothing lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import Cli, flip, load_module

import ensemble_distill as ed
from ensemble_distill.errors import Mismatch

TRAIN = ("train", "digits.py", "--cache", "cache", "--out", "run")
CACHE = ("cache", "digits.py", "--out", "cache")
VERIFY = ("verify", "cache")

# A member that runs what the file `fault` says (`hit` marks sample 250 of test): the plan is the same without it.
FAULTY = """

class Faulty(Net):
    def __init__(self, width, name):
        super().__init__(width)
        self.name = name

    def forward(self, image):
        logits, fault = super().forward(image), HERE / "fault"
        if self.name == "b" and fault.exists():
            hit = (image == torch.from_numpy(arrays()[0][1450])).flatten(1).all(1)
            exec(fault.read_text(), {"logits": logits, "hit": hit})
        return logits
"""

# Sends its own process a SIGTERM in the first steps.
STOP = """

class Stopped(Net):
    def forward(self, image):
        if (HERE / "stop").exists() and self.training:
            import os, signal

            os.kill(os.getpid(), signal.SIGTERM)
        return super().forward(image)
"""


def refused(process: subprocess.CompletedProcess[str], *words: str, verb: str = "error") -> str:
    """The one sentence on stderr: it holds ``words``, and the hint below it says what to do next."""
    lines = [line for line in process.stderr.splitlines() if line and not line.startswith("note: ")]
    sentence, hints = lines[0], lines[1:]
    assert sentence.startswith(f"{verb}: "), process.stderr
    assert "bug of ours" not in process.stderr
    for word in words:
        assert word in sentence, f"{word!r} is not in {sentence!r}"
    # A usage error names what to put right; all others need a word on what to do.
    assert hints or process.returncode == 2, f"no word on what to do next: {sentence}"
    assert len(hints) <= 1 and all(re.fullmatch("  → .+", hint) for hint in hints), process.stderr
    return sentence


def usage(process: subprocess.CompletedProcess[str], *words: str) -> None:
    """What click says of a wrong command line."""
    assert process.stderr.startswith("Usage: ") and "--help' for help" in process.stderr
    last = process.stderr.splitlines()[-1]
    assert last.startswith("Error: ") and all(word in last for word in words), process.stderr


def only(folder: Path, pattern: str) -> Path:
    """The first file that matches."""
    return sorted(folder.glob(pattern))[0]


def edit_data(cli: Cli, edit: Callable[[dict[str, np.ndarray]], None]) -> None:
    path = cli.folder / "digits.npz"
    with np.load(path) as file:
        arrays = {name: file[name].copy() for name in file.files}
    edit(arrays)
    np.savez(path, **arrays)


def content(root: Path) -> str:
    digest = (root / "CURRENT").read_text().strip()
    return str(json.loads((root / f"manifests/{digest}.json").read_bytes())["content_digest"])


def metrics(run: Path) -> list[object]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "timing"} for line in lines]


@pytest.fixture
def faulty(cli: Cli) -> Cli:
    """The pipeline with a member that can be made to fail."""
    path = cli.folder / "digits.py"
    path.write_text(path.read_text() + FAULTY)
    cli.change("build=lambda: Net(48)", "build=lambda name=name: Faulty(48, name)")
    return cli


@pytest.fixture
def unsealed(cached: Cli) -> Cli:
    """A cache as a capture leaves it that dies before its last two commits: nothing sealed."""
    root = cached.folder / "cache"
    (root / "CURRENT").unlink()
    shutil.rmtree(root / "manifests")
    shutil.rmtree(root / "pages")
    for group in ("targets", "tap.a.pool"):
        (root / f"commits/train-v000001-00000004.{group}.json").unlink()
    return cached


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """``resize(size)`` for the file system of a few kilobytes that is mounted beside the pipeline's folder."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(*options: str) -> int:
        return subprocess.run(["mount", "-t", "tmpfs", *options, "none", disk], capture_output=True).returncode

    if os.geteuid() or mount("-o", "size=64k"):
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


# The command line ------------------------------------------------------------------------------------


def test_a_misspelt_option_or_command_is_named_with_the_right_one(cli: Cli) -> None:
    usage(cli("trian", code=2), "'trian'", "'train'")
    usage(cli("frobnicate", code=2), "'frobnicate'")
    usage(cli(*CACHE, "--limt", 10, code=2), "--limt", "--limit")
    usage(cli("verify", "cache", "--worker", 2, code=2), "--worker", "--workers")
    usage(cli("cache", "digits.py", code=2), "--out")
    usage(cli(*CACHE, "--limit", 0, code=2), "--limit", "0")
    usage(cli(*CACHE, "--format", "hdf", code=2), "--format", "'hdf'", "hdf5", "parquet")
    assert not (cli.folder / "cache").exists()


@pytest.mark.parametrize(
    "args, words",
    [
        ((*TRAIN, "--set", "epoch=3"), ("--set epoch", "'epoch'", "did you mean 'epochs'?")),
        ((*TRAIN, "--set", "optimizer.learning=3"), ("--set optimizer.learning", "'lr'")),
        ((*TRAIN, "--set", "objective.sofd.weight=3"), ("'sofd'", "did you mean 'soft'?")),
        ((*TRAIN, "--set", "epochs=zero"), ("--set epochs", "integer", "'zero'")),
        ((*CACHE, "--set", "combine=mean"), ("--set combine", "'mean_probs'", "'mean'")),
        ((*CACHE, "--set", "combine"), ("--set combine", "a.b=value")),
        ((*CACHE, "--device", "nonsense"), ("--device nonsense",)),
        (("train", "digits.py:othr", *TRAIN[2:]), ("digits.py", "'othr'", "did you mean 'other'?")),
        (("train", "digits.py:data", *TRAIN[2:]), ("digits.py", "data()", "DataConfig", "TrainConfig")),
        (("cache", "digit.py", "--out", "cache"), ("digit.py", "no such file")),
        (("train", "digits.py", "--cache", "cahce", "--out", "run"), ("cahce", "no such directory")),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_named_with_what_was_expected(cli: Cli, args: tuple[str, ...], words: tuple[str]) -> None:
    refused(cli(*args, code=2), *words)
    assert not (cli.folder / "cache").exists() and not (cli.folder / "run").exists()


@pytest.mark.parametrize(
    "old, new, args, words",
    [
        ("epochs=4", "epoch=4", TRAIN, ("epoch: TrainConfig", "did you mean 'epochs'?")),
        ("OptimizerConfig(lr", "OptimizerConfig(lrr", TRAIN, ("lrr: OptimizerConfig", "did you mean 'lr'?")),
        ("unit_rows=200", "unit_row=200", CACHE, ("unit_row: CacheConfig", "did you mean 'unit_rows'?")),
        ('precision="fp32"', 'precision="fp8"', CACHE, ("precision", "'fp32'", "'fp8'")),
        ('member="a"', 'member="aa"', CACHE, ("'tap/aa.pool'", "names no member")),
        ("def cache", "import flowers\n\n\ndef cache", CACHE, ("flowers",)),
        ("def cache", "1 / 0\n\n\ndef cache", CACHE, ("ZeroDivisionError",)),
        ("def cache():", "def cache():\n    1 / 0", CACHE, ("ZeroDivisionError",)),
        ("def cache():", "def cache()", CACHE, ("expected ':'",)),
        ("build=lambda: Net(48)", "build=lambda: Net(1 / 0)", CACHE, ("ZeroDivisionError",)),
        ("return self.head(", "1 / 0; return self.head(", CACHE, ("ZeroDivisionError",)),
    ],
)  # fmt: skip
def test_a_mistake_in_the_pipeline_is_told_with_file_and_line(
    cli: Cli, old: str, new: str, args: tuple[str, ...], words: tuple[str]
) -> None:
    cli.change(old, new)
    sentence = refused(cli(*args, code=2), *words)
    assert re.search(r"digits\.py(:|, line )\d+", sentence), sentence
    assert not (cli.folder / "cache/commits").exists()


@pytest.mark.parametrize("old, new", [("Net(16)", "Net(1 / 0)"), ("return self.head(", "1 / 0; return self.head(")])
def test_a_student_that_cannot_be_built_or_run_is_told_with_file_and_line(cached: Cli, old: str, new: str) -> None:
    cached.change(old, new)
    assert re.search(r"digits\.py:\d+", refused(cached(*TRAIN, code=2), "ZeroDivisionError"))


def test_missing_weights_data_or_variants_are_named(cli: Cli) -> None:
    (cli.folder / "b.safetensors").rename(cli.folder / "b.bak")
    refused(cli(*CACHE, code=2), "'b'", "b.safetensors", "no such file")
    (cli.folder / "b.bak").rename(cli.folder / "b.safetensors")
    (cli.folder / "digits.npz").unlink()
    refused(cli(*CACHE, code=2), "digits.npz", "digits.py:")
    cli.change('np.load(HERE / "digits.npz")', 'ed.read_idx(HERE / "images-idx3-ubyte.gz")')
    refused(cli(*CACHE, code=2), "images-idx3-ubyte.gz", "no such file")
    (cli.folder / "images-idx3-ubyte.gz").write_bytes(b"<html>")
    refused(cli(*CACHE, code=3), "images-idx3-ubyte.gz", "gzip")


def test_weights_of_another_module_and_pickles_are_refused(cli: Cli) -> None:
    cli.change("Net(48)", "Net(40)")
    refused(cli(*CACHE, code=3), "'a'", "a.safetensors", "48", "40")
    cli.change("Net(40)", "Net(48)")
    cli.change('f"{name}.safetensors"', 'f"{name}.pt"')
    torch.save({}, cli.folder / "a.pt")
    process = cli(*CACHE, code=5)
    refused(process, "'a'", "a.pt")
    assert "safetensors.torch.save_file" in process.stderr
    assert not (cli.folder / "cache").exists()


def test_what_is_no_cache_is_told_apart(cli: Cli) -> None:
    (cli.folder / "photos").mkdir()
    (cli.folder / "photos/cat.jpg").write_text("cat")
    refused(cli("verify", "nowhere", code=2), "nowhere", "no such directory")
    refused(cli("inspect", "nowhere", code=2), "nowhere", "no such directory")
    refused(cli("verify", "photos", code=3), "photos", "no cache")
    refused(cli("verify", "digits.py", code=3), "digits.py", "is a file")


def test_outputs_that_hold_something_else_are_left_alone(cached: Cli) -> None:
    (cached.folder / "photos").mkdir()
    (cached.folder / "photos/cat.jpg").write_text("cat")
    refused(cached("cache", "digits.py", "--out", "photos", code=3), "photos", "no cache")
    refused(cached("cache", "digits.py", "--out", "digits.npz", code=3), "digits.npz", "is a file")
    refused(cached("train", "digits.py", "--cache", "photos", "--out", "run", code=3), "photos", "no cache")
    refused(cached("train", "digits.py", "--cache", "cache", "--out", "photos", code=3), "photos", "holds no run")
    refused(cached("train", "digits.py", "--cache", "cache", "--out", "digits.npz", code=3), "digits.npz", "is a file")
    assert [p.name for p in (cached.folder / "photos").iterdir()] == ["cat.jpg"]
    with np.load(cached.folder / "digits.npz") as file:
        assert len(file["images"]) == 1797


# Mismatches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "old, new, words",
    [
        ('CLASSES = ("0", "1"', 'CLASSES = ("1", "0"', ("classes[0]", "'0'", "'1'")),
        ("VIEW_SEED = 3", "VIEW_SEED = 4", ("views.seed", "3", "4")),
        ('CLASSES = ("0", ', "CLASSES = (", ("classes", "'0'")),
    ],
)
def test_a_pipeline_that_means_something_else_than_the_cache_is_refused(
    cached: Cli, old: str, new: str, words: tuple[str]
) -> None:
    cached.change(old, new)
    refused(cached(*TRAIN, code=3), "cache was captured with", *words)
    assert not (cached.folder / "run").exists()


@pytest.mark.parametrize(
    "args, words",
    [
        (("--set", "combine=mean_logits"), ("reading.combine", "'mean_probs'", "'mean_logits'")),
        (("--format", "parquet"), ("format", "'hdf5'", "'parquet'")),
        (("--limit", "100"), ("rows", "200", "100")),
    ],
)
def test_another_capture_into_the_same_cache_is_refused(cached: Cli, args: tuple[str, ...], words: tuple[str]) -> None:
    refused(cached(*CACHE, *args, code=3), "cache was begun with", *words)
    assert "already complete" in cached(*CACHE).stdout


def test_weights_that_change_in_the_middle_of_a_capture_are_refused(unsealed: Cli, captured: Path) -> None:
    folder = unsealed.folder
    (folder / "a.safetensors").rename(folder / "kept")
    shutil.copy(folder / "b.safetensors", folder / "a.safetensors")
    refused(unsealed(*CACHE, code=3), "cache was begun with capture.members[0].weights", "this run says")
    (folder / "kept").replace(folder / "a.safetensors")
    unsealed(*CACHE)
    assert content(unsealed.folder / "cache") == content(captured / "cache")


def test_a_source_that_changes_in_the_middle_of_a_capture_is_refused(unsealed: Cli) -> None:
    def edit(arrays: dict[str, np.ndarray]) -> None:
        arrays["images"][820] ^= 1

    edit_data(unsealed, edit)
    refused(unsealed(*CACHE, code=3), "train", "20", "the source has changed")


def test_labels_outside_the_classes_are_refused_by_both_stages(cached: Cli) -> None:
    def edit(arrays: dict[str, np.ndarray]) -> None:
        arrays["labels"][7] = 10

    edit_data(cached, edit)
    refused(cached("cache", "digits.py", "--out", "other", code=3), "'train'", "0 to 10", "10 classes")
    assert not (cached.folder / "other").exists()
    refused(cached(*TRAIN, "--limit", 60, code=3), "train", "10")


def test_relabelled_samples_are_refused(cached: Cli) -> None:
    def edit(arrays: dict[str, np.ndarray]) -> None:
        arrays["labels"][1100] = (arrays["labels"][1100] + 1) % 10

    edit_data(cached, edit)
    refused(cached(*TRAIN, code=3), "labels of held_out")
    assert not (cached.folder / "run").exists()


def test_a_changed_image_is_named_and_its_batch_is_never_used(cached: Cli) -> None:
    def edit(arrays: dict[str, np.ndarray]) -> None:
        arrays["images"][333] ^= 1

    edit_data(cached, edit)
    refused(cached(*TRAIN, code=3), "sample 333 of train", "key", "at this position")
    refused(cached(*TRAIN, "--verify-source", code=3), "sample 333 of train")
    pipeline, cache = load_module(cached.folder / "digits.py"), ed.open_cache(cached.folder / "cache")
    used: list[int] = []
    with pytest.raises(Mismatch, match="sample 333 "):
        for batch in cache.loader(pipeline.data().sources["train"], 20):
            used += batch.index.tolist()
    assert used and 333 not in used
    fewer = cached(*TRAIN, "--limit", 333, "--out", "other")  # what is unchanged is served, by position
    assert fewer.stderr == ""


def ensemble(pipeline: ModuleType, folder: Path, images: torch.Tensor) -> torch.Tensor:
    """What the teachers say about these images, computed afresh: probabilities [B, 10]."""
    from safetensors.torch import load_file

    total = torch.zeros(len(images), 10)
    for name in "abc":
        net = pipeline.Net(48)
        net.load_state_dict(load_file(folder / f"{name}.safetensors"))
        total += net(images).softmax(1).detach() / 3
    return total


def test_a_reordered_source_is_served_by_key_and_says_so(cached: Cli) -> None:
    order = np.random.default_rng(0).permutation(1000)

    def edit(arrays: dict[str, np.ndarray]) -> None:
        for array in arrays.values():
            array[:1000] = array[order]

    edit_data(cached, edit)
    process = cached(*TRAIN)
    order_note, views_note = process.stderr.splitlines()
    assert re.fullmatch(r"note: the order of train differs .*by key", order_note)
    assert "its views were not compared by pixels" in views_note
    assert metrics(cached.folder / "run")[-1]["test"]["kl"] < 0.3  # type: ignore[index]
    pipeline, cache = load_module(cached.folder / "digits.py"), ed.open_cache(cached.folder / "cache")
    for epoch in (0, 1):
        for batch in cache.loader(pipeline.data().sources["train"], 128, epoch=epoch, taps=["tap/a.pool"]):
            wanted = ensemble(pipeline, cached.folder, batch.inputs["image"])
            torch.testing.assert_close(batch.targets.logprobs.exp(), wanted, atol=2e-3, rtol=0)
            there = cache.targets_at(order[batch.index], batch.view, taps=["tap/a.pool"])
            assert torch.equal(there.logprobs, batch.targets.logprobs)
            assert torch.equal(there.features["tap/a.pool"], batch.targets.features["tap/a.pool"])


def test_another_digest_than_the_trusted_one_is_refused(cached: Cli) -> None:
    digest = (cached.folder / "cache/CURRENT").read_text().strip()
    refused(cached(*TRAIN, "--expect-digest", "0" * 64, code=3), "cache", digest, "0" * 64)
    cached(*TRAIN, "--expect-digest", digest, "--limit", 40)


def test_an_objective_that_asks_for_what_is_not_there_is_refused(cached: Cli) -> None:
    refused(cached(*TRAIN, "--set", "objective.feature.tap=tap/b.pool", code=2), "'tap/b.pool'", "'tap/a.pool'")
    refused(cached(*TRAIN, "--set", "objective.feature.module=pol", code=2), "'pol'", "did you mean 'pool'?")
    cached.change('Tap(member="a", module="pool")', 'Tap(member="a", module="heat")')
    refused(cached("cache", "digits.py", "--out", "other", code=2), "'a'", "'heat'", "did you mean 'head'?")


def test_a_run_is_not_mixed_with_another(cached: Cli) -> None:
    cached(*TRAIN, "--limit", 60)
    kept = metrics(cached.folder / "run")
    refused(cached(*TRAIN, "--limit", 60, "--set", "epochs=5", code=3), "run", "train.epochs", "4", "5")
    refused(cached(*TRAIN, code=3), "run", "rows.held_out", "60", "200")
    refused(cached("evaluate", "digits.py", "--run", "rum", code=2), "rum", "no such file")
    refused(cached("evaluate", "digits.py:other", "--run", "run", code=3), "run/student.safetensors", "does not fit")
    refused(cached("evaluate", "digits.py", "--run", "run", "--split", "tset", code=2), "'tset'", "'test'")
    assert "finished" in cached(*TRAIN, "--limit", 60).stdout and metrics(cached.folder / "run") == kept


# Teachers that fail, captures that stop --------------------------------------------------------------


def test_nan_names_member_and_sample_and_commits_nothing_of_its_unit(faulty: Cli, captured: Path) -> None:
    fault = faulty.folder / "fault"
    fault.write_text("logits[hit] = float('nan')")
    refused(faulty(*CACHE, code=7), "member 'b'", "NaN", "sample 250 of test", "rows 250–299")
    committed = sorted(p.name for p in (faulty.folder / "cache/commits").iterdir())
    assert committed == sorted(
        f"{split}-v000000-00000000.{group}.json"
        for split in ("held_out", "test")
        for group in ("targets", "tap.a.pool")
    )
    assert "whole" in faulty(*VERIFY).stdout
    fault.unlink()
    faulty(*CACHE)
    assert content(faulty.folder / "cache") == content(captured / "cache")


def test_nan_for_every_sample_names_member_and_sample(faulty: Cli) -> None:
    (faulty.folder / "fault").write_text("logits[:] = float('nan')")
    refused(faulty(*CACHE, code=7), "member 'b'", "NaN", "sample 0 of held_out")
    assert not (faulty.folder / "cache/commits").exists()


def test_a_stopped_capture_says_how_far_it_is_and_goes_on(faulty: Cli, captured: Path) -> None:
    fault = faulty.folder / "fault"
    fault.write_text("import os, signal; hit.any() and os.kill(os.getpid(), signal.SIGTERM)")
    refused(faulty(*CACHE, "--grace", 0, code=75), "4/28 units committed", verb="stopped")
    assert "whole" in faulty(*VERIFY).stdout
    words = ("cache", "4/28 units committed", "test view 0 rows 200–399; test view 0 rows 400–596", "24 units in all")
    refused(faulty(*TRAIN, code=3), *words)
    refused(faulty(*CACHE, code=75), "6/28 units committed", verb="stopped")  # the open item fits the time given
    fault.unlink()
    faulty(*CACHE)
    assert content(faulty.folder / "cache") == content(captured / "cache")
    faulty(*TRAIN, "--limit", 40)


def test_a_missing_unit_is_listed_and_captured_again(unsealed: Cli, captured: Path) -> None:
    refused(unsealed(*TRAIN, code=3), "26/28 units committed", "missing: train view 1 rows 800–999")
    assert "captured 200 rows" in unsealed(*CACHE).stdout
    assert content(unsealed.folder / "cache") == content(captured / "cache")
    unsealed(*VERIFY)


# Damage ----------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def shard(cache: Path, unit: str = "train-v000000-00000000.targets") -> Path:
    commit = json.loads((cache / f"commits/{unit}.json").read_bytes().split(b"\n")[1])
    return cache / "objects" / commit["object"]


def swap_shards(path: Path) -> None:
    other = shard(path.parent.parent, "train-v000000-00000001.targets")
    data = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(data)


@pytest.mark.parametrize(
    "find, damage",
    [
        pytest.param(shard, flip, id="a flipped bit in a shard"),
        pytest.param(shard, truncate, id="a truncated shard"),
        pytest.param(shard, Path.unlink, id="a missing shard"),
        pytest.param(shard, swap_shards, id="two swapped shards"),
        pytest.param("plans/*.json", flip, id="a flipped bit in the plan"),
        pytest.param("manifests/*.json", flip, id="a flipped bit in the manifest"),
        pytest.param("pages/*.json", flip, id="a flipped bit in a manifest page"),
        pytest.param("keys/train-00000002", flip, id="a flipped bit in a key page"),
        pytest.param("keys/train-00000002", Path.unlink, id="a missing key page"),
        pytest.param("CURRENT", flip, id="a flipped bit in CURRENT"),
        pytest.param("CURRENT", truncate, id="a truncated CURRENT"),
        pytest.param("CURRENT", lambda path: os.truncate(path, 0), id="an empty CURRENT"),
    ],
)
def test_damage_is_found_before_it_is_used(
    cached: Cli, find: str | Callable[[Path], Path], damage: Callable[[Path], None]
) -> None:
    root = cached.folder / "cache"
    path = only(root, find) if isinstance(find, str) else find(root)
    damage(path)
    name = str(path.relative_to(cached.folder))
    process = cached(*VERIFY, code=4)
    refused(process, "cache", "damaged or missing")
    assert any(name in line for line in process.stdout.splitlines() if line.startswith("damaged: ")), process.stdout
    verdict = json.loads(cached(*VERIFY, "--json", code=4).stdout)
    assert verdict["ok"] is False and any(name in problem for problem in verdict["damaged"])
    refused(cached(*TRAIN, code=4), name)
    assert not list((cached.folder / "run").glob("checkpoint*"))


UNFINISHED = ["plans/*.json", "commits/train-v000000-00000004.targets.json", "keys/train-00000004"]


@pytest.mark.parametrize("name", UNFINISHED)
def test_damage_in_an_unfinished_cache_is_found_before_it_is_sealed(unsealed: Cli, name: str) -> None:
    path = only(unsealed.folder / "cache", name)
    flip(path)
    refused(unsealed(*CACHE, code=4), str(path.relative_to(unsealed.folder)))
    assert not (unsealed.folder / "cache/CURRENT").exists()


@pytest.mark.parametrize("name", [*UNFINISHED, shard])
def test_verify_lists_damage_in_an_unfinished_cache(unsealed: Cli, name: str | Callable[[Path], Path]) -> None:
    root = unsealed.folder / "cache"
    path = only(root, name) if isinstance(name, str) else name(root)
    flip(path)
    process = unsealed(*VERIFY, code=4)
    assert str(path.relative_to(unsealed.folder)) in process.stdout
    refused(process, "cache", "damaged or missing")


def test_a_damaged_run_is_not_resumed(cached: Cli) -> None:
    path = cached.folder / "digits.py"
    path.write_text(path.read_text() + STOP)
    cached.change("return Net(16)", "return Stopped(16)")
    (cached.folder / "stop").touch()
    refused(cached(*TRAIN, code=75), "in epoch 1/4", "saved", verb="stopped")
    (cached.folder / "stop").unlink()
    run = cached.folder / "run"
    for file in ("checkpoint.json", only(run, "checkpoint-*").name):
        whole = (run / file).read_bytes()
        flip(run / file)
        refused(cached(*TRAIN, code=4), f"run/{file}")
        (run / file).write_bytes(whole)
    tensors = only(run, "checkpoint-*")
    tensors.rename(run / "away")
    refused(cached(*TRAIN, code=4), f"run/{tensors.name}", "missing")
    (run / "away").rename(tensors)
    assert "going on at epoch 1" in cached(*TRAIN).stdout
    cached(*TRAIN[:-1], "undisturbed")
    assert metrics(run) == metrics(cached.folder / "undisturbed")


def test_a_run_whose_configuration_is_cut_short_is_not_resumed(cached: Cli) -> None:
    cached(*TRAIN, "--limit", 40)
    os.truncate(cached.folder / "run/config.json", 500)
    refused(cached(*TRAIN, "--limit", 40, code=4), "run/config.json")


# Full disks ------------------------------------------------------------------------------------------


def test_a_full_disk_costs_nothing_that_is_committed(
    cli: Cli, small_disk: Callable[[str], None], captured: Path
) -> None:
    disk = ("cache", "digits.py", "--out", "../disk/cache")
    refused(cli(*disk, code=6), "../disk/cache", "needs 0.3 MB", "0.1 MB are free")
    assert not (cli.folder / "../disk/cache").exists()
    small_disk("400k")  # enough by the estimate, not with what file systems add
    refused(cli(*disk, code=6), "../disk/cache/", "No space left on device")
    committed = len(list((cli.folder / "../disk/cache/commits").iterdir()))
    assert 0 < committed < 28
    assert "whole" in cli("verify", "../disk/cache").stdout
    small_disk("2m")
    cli(*disk)
    assert content(cli.folder / "../disk/cache") == content(captured / "cache")


def test_a_disk_that_fills_up_while_a_student_trains_costs_no_checkpoint(
    cached: Cli, small_disk: Callable[[str], None]
) -> None:
    disk = (*TRAIN[:-1], "../disk/run")
    refused(cached(*disk, code=6), "../disk/run/", "No space left on device")
    small_disk("2m")
    assert "going on at epoch 2" in cached(*disk).stdout
    cached(*TRAIN)
    assert metrics(cached.folder / "../disk/run") == metrics(cached.folder / "run")


@pytest.mark.parametrize("where", ["teacher", "student"])
def test_running_out_of_memory_says_which_batch_size_to_try(cached: Cli, where: str) -> None:
    """The device's error is raised by the module itself, after a few batches."""
    cached.change(
        "    def forward(self, image):\n",
        "    def forward(self, image):\n"
        "        Net.calls = getattr(Net, 'calls', 0) + 1\n"
        "        if Net.calls > 20:\n"
        "            raise torch.OutOfMemoryError('CUDA out of memory')\n",
    )
    if where == "teacher":
        process = cached("cache", "digits.py", "--out", "other", code=8)
        refused(process, "out of device memory", "batch size 64")
        assert "--batch-size 32" in process.stderr and not (cached.folder / "other" / "CURRENT").exists()
    else:
        process = cached("train", "digits.py", "--cache", "cache", "--out", "run", code=8)
        refused(process, "out of device memory", "batch size 20")
        assert "--batch-size 10" in process.stderr


def test_evaluate_refuses_a_cache_or_a_student_that_is_not_the_runs_own(cached: Cli) -> None:
    cached("train", "digits.py", "--cache", "cache", "--out", "run", "--set", "epochs=1")
    (cached.folder / "cache").rename(cached.folder / "old")
    cached("cache", "digits.py", "--out", "cache", "--views", 1, "--quiet")
    refused(cached("evaluate", "digits.py", "--run", "run", code=3), "content digest", "run was trained from")
    cached("evaluate", "digits.py", "--run", "run", "--cache", "old")
    weights = cached.folder / "run" / "student.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    refused(cached("evaluate", "digits.py", "--run", "run", "--cache", "old", code=4), "student.safetensors", "damaged")


def test_a_student_whose_body_changed_does_not_go_on_with_the_old_run(cached: Cli) -> None:
    cached("train", "digits.py:other", "--cache", "cache", "--out", "run", "--set", "epochs=1", "--limit", 100)
    cached.change("nn.Dropout(0.1)", "nn.Dropout(0.2)")
    process = cached(
        "train", "digits.py:other", "--cache", "cache", "--out", "run", "--limit", 100, "--set", "epochs=1", code=3
    )
    refused(process, "another run", "student")


def test_a_variant_made_by_model_copy_is_checked_too(cached: Cli) -> None:
    cached.change("def other():", "def bad():\n    return train().model_copy(update={'epochs': 0})\n\n\ndef other():")
    refused(
        cached("train", "digits.py:bad", "--cache", "cache", "--out", "run", code=2),
        "epochs",
        "greater than or equal to 1",
    )
