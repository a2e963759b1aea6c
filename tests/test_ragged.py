"""Ragged features: of tokens the real ones alone are kept, and come back where they were."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import HERE, Cli, flip, load_module, shard_of
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from pydantic import ValidationError
from small import a_plan as small_plan

import ensemble_distill as ed
from ensemble_distill import terms
from ensemble_distill.cache.commits import check_layout
from ensemble_distill.cache.decoded import Decoder
from ensemble_distill.cache.groups import Group
from ensemble_distill.cache.plan import Plan, Split
from ensemble_distill.cache.ragged import Table, Tokens, read_table
from ensemble_distill.cache.rows import Rows
from ensemble_distill.codec import Features
from ensemble_distill.codecs.domain import BadRow
from ensemble_distill.codecs.features import decode, encode, mask_of
from ensemble_distill.errors import Corrupt, Error, Unsafe, UsageError
from ensemble_distill.formats import encode as to_shard
from ensemble_distill.formats import hdf5, parquet
from ensemble_distill.formats.layout import Segment
from ensemble_distill.store import records
from ensemble_distill.store.records import Commit
from ensemble_distill.store.store import open_store
from ensemble_distill.training.terms import of_features

FORMATS, VALUES = ("hdf5", "parquet"), ("fp16", "bf16", "int8")
TAP = "tap/a.x"


def group_of(values: str, tokens: int, width: int) -> Group:
    return Group.of("tap.a.x", {TAP: Features.of((tokens, width), values, 1, mask="m")})


def features_of(mask: np.ndarray, width: int, seed: int = 0) -> torch.Tensor:
    """float32 [B, T, D]; what stands at other than real tokens is no number."""
    x = torch.randn(*mask.shape, width, generator=torch.Generator().manual_seed(seed)) * 3
    return x.masked_fill(~torch.from_numpy(mask)[:, :, None], torch.nan)


def as_captured(group: Group, x: torch.Tensor, mask: np.ndarray, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Records and tokens of a unit, which are collected by batches."""
    codec, held, tokens = group.codecs[TAP], np.zeros(len(x), group.dtype), Tokens(group.token)
    for first in range(0, len(x), batch):
        part = slice(first, first + batch)
        found = {n: a.numpy() for n, a in encode(codec, x[part], TAP, torch.from_numpy(mask[part])).items()}
        (name,) = codec.token()
        held[f"{TAP}/start"][part] = tokens.add(mask[part], found.pop(name))
        for n, array in found.items():
            held[f"{TAP}/{n}"][part] = array
    return held, tokens.table()


def shard(format: str, held: np.ndarray, tokens: np.ndarray) -> tuple[bytes, Commit]:
    parts, segments = to_shard(format, held, tokens)
    data = b"".join(map(bytes, parts))
    digest = "0" * 64
    commit = Commit(
        plan="p", unit="train-v000000-00000000.tap.a.x", object=f"{digest}.h5", size=len(data), rows=len(held),
        segments=segments, blocks=(), content="", keys=digest,
    )  # fmt: skip
    return data, commit


def padded(group: Group, table: Table, rows: np.ndarray) -> dict[str, torch.Tensor]:
    found = table.take(rows)
    names = group.codecs[TAP].padded()
    return {n: torch.from_numpy(found[f"{TAP}/{n}" if n else TAP].copy()) for n in names}


MASKS = arrays_of.arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 20)), elements=st.booleans()) | st.builds(
    lambda rows, tokens, real: np.full((rows, tokens), real), st.integers(1, 5), st.integers(1, 20), st.booleans()
)


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=40)
@given(mask=MASKS, width=st.integers(1, 5), values=st.sampled_from(VALUES), batch=st.integers(1, 5))
def test_tokens_come_back_where_they_were(format: str, mask: np.ndarray, width: int, values: str, batch: int) -> None:
    group, x = group_of(values, mask.shape[1], width), features_of(mask, width)
    data, commit = shard(format, *as_captured(group, x, mask, batch))
    assert [s.count for s in commit.segments if s.count is not None] == [mask.sum()]
    order = np.random.default_rng(0).integers(0, len(mask), 2 * len(mask))  # a reader gathers in any order, also twice
    held = padded(group, read_table(np.frombuffer(data, np.uint8), commit, group), order)
    assert np.array_equal(mask_of(group.codecs[TAP], held).numpy(), mask[order])
    found = decode(group.codecs[TAP], held).double().numpy()
    for i, row in enumerate(order):
        real = x[row].double().numpy()[mask[row]]
        # int8: a scale for each channel of the row's real tokens
        largest = np.abs(real).max(axis=0, initial=0)
        allowed = {"fp16": np.abs(real) * 2**-11 + 2**-25, "bf16": np.abs(real) * 2**-8, "int8": largest / 253}[values]
        assert (np.abs(found[i][mask[row]] - real) <= allowed + 1e-6).all()
        assert (found[i][~mask[row]] == 0).all()
    assert {"hdf5": hdf5, "parquet": parquet}[format].check(
        data, group.dtype, len(mask), commit.segments, group.token
    ) == ""  # fmt: skip


def test_both_formats_hold_one_content_in_as_many_bytes_as_there_are_tokens() -> None:
    chance = np.random.default_rng(0)
    group, mask = group_of("fp16", 128, 64), chance.random((200, 128)) < 0.25
    held, tokens = as_captured(group, features_of(mask, 64), mask, 32)
    exact = 200 * (16 + 4) + int(mask.sum()) * 2 * 64
    for format in FORMATS:
        data, commit = shard(format, held, tokens)
        assert exact <= len(data) <= exact + 8192
        rows = read_table(np.frombuffer(data, np.uint8), commit, group)
        assert records.content_hash(held, tokens) == records.content_hash(
            rows.records.view(group.dtype).reshape(-1), rows.tokens
        )
        again, _ = shard(format, held, tokens)
        assert again == data
    changed = tokens.copy()
    changed[TAP][-1, -1] += 1
    assert records.content_hash(held, tokens) != records.content_hash(held, changed)


def test_other_peoples_tools_read_the_tokens() -> None:
    mask = np.array([[0, 1, 1], [0, 0, 0], [1, 0, 0], [1, 1, 1]], bool)
    group, x = group_of("fp16", 3, 2), features_of(mask, 2)
    held, tokens = as_captured(group, x, mask, 3)
    expected = [x[i].half().numpy()[mask[i]] for i in range(4)]
    with h5py.File(io.BytesIO(shard("hdf5", held, tokens)[0])) as file:
        flat, starts = file["tokens"][TAP], file["rows"][f"{TAP}/start"]
        assert file["tokens"].chunks is None and file["tokens"].compression is None
        for one, start in zip(expected, starts, strict=True):
            assert np.array_equal(flat[start : start + len(one)], one)
    lists = pq.read_table(io.BytesIO(shard("parquet", held, tokens)[0]))[TAP].to_pylist()
    assert [b"".join(row) for row in lists] == [one.tobytes() for one in expected]


# Damage and forgery -----------------------------------------------------------------------------------


@pytest.fixture
def unit() -> tuple[Group, np.ndarray, np.ndarray]:
    mask = np.random.default_rng(1).random((6, 11)) < 0.5
    mask[2] = False
    group = group_of("fp16", 11, 3)
    return group, *as_captured(group, features_of(mask, 3), mask, 4)


@pytest.mark.parametrize("format", FORMATS)
def test_starts_and_masks_that_do_not_add_up_are_refused(
    format: str, unit: tuple[Group, np.ndarray, np.ndarray]
) -> None:
    group, held, tokens = unit

    def refused(name: str, row: int, change: int, problem: str, at: int) -> None:
        other = held.copy()
        place = other[f"{TAP}/{name}"]
        if name == "mask":
            place[row, 1] ^= change
        else:
            place[row : row + 1] += np.uint32(change)
        data, commit = bytearray(shard(format, held, tokens)[0]), shard(format, held, tokens)[1]
        for segment in commit.segments[:-1]:  # as a forger does, who cares for hashes too
            raw = other if len(segment.fields) > 1 else np.ascontiguousarray(other[segment.fields[0]])
            data[segment.offset : segment.offset + raw.nbytes] = raw.tobytes()
        with pytest.raises(BadRow, match=problem) as error:
            read_table(np.frombuffer(bytes(data), np.uint8), commit, group)
        assert error.value.row == at

    refused("start", 3, 1, "do not begin where those of the row before end", 3)
    refused("start", 0, 1, "do not begin", 0)
    refused("start", 5, 2**32 - 1, "do not begin", 5)  # falling
    refused("mask", 4, 1, "do not begin", 5)
    refused("mask", 5, 1, "its tokens end at", 5)
    refused("mask", 1, 8, "a token beyond the 11 of a row", 1)


@pytest.mark.parametrize("format", FORMATS)
def test_what_a_commit_says_of_tokens_is_held_against_the_plan(
    format: str, unit: tuple[Group, np.ndarray, np.ndarray]
) -> None:
    group, held, tokens = unit
    plan = a_plan(format, group)
    (item,) = plan.items()
    _, commit = shard(format, held, tokens)
    check_layout(commit, group, item, "here")
    *rows, last = commit.segments

    def refused(kind: type[Error], *segments: Segment, message: str) -> None:
        with pytest.raises(kind, match=message):
            check_layout(commit.model_copy(update={"segments": segments}), group, item, "here")

    def changed(**fields: int) -> Segment:
        return last.model_copy(update=fields)

    refused(Unsafe, *rows, changed(count=67), message="has 67 tokens, its rows have at most 66")
    refused(Unsafe, *rows, changed(count=-1), message="has -1 tokens")
    refused(Unsafe, *rows, changed(count=10**18), message="at most 66")
    refused(Unsafe, *rows, changed(stride=4), message="stride 4, expected 6")
    refused(Unsafe, *rows, changed(offset=-1), message="tokens beyond the end")
    refused(Unsafe, *rows, changed(offset=commit.size - 5), message="tokens beyond the end")
    refused(Corrupt, *rows, message="expected")
    refused(Corrupt, *rows, last.model_copy(update={"count": None}), message="holds")
    refused(Corrupt, *rows, Segment(fields=(), offset=0, stride=1, count=1), last, message="2 tables of tokens")
    refused(Corrupt, *rows, Segment(fields=(), offset=0, stride=1, count=1), message="expected")
    large = commit.model_copy(update={"size": commit.size + (1 << 20)})
    with pytest.raises(Unsafe, match="would be a file of"):
        check_layout(large, group, item, "here")
    plain = Group.of("tap.a.x", {TAP: Features.of((11, 3))})
    whole = shard(format, np.zeros(6, plain.dtype), tokens[:0])[1] if format == "hdf5" else None
    if whole is not None:
        forged = whole.model_copy(
            update={"segments": (whole.segments[0], Segment(fields=(), offset=0, stride=1, count=1))}
        )
        with pytest.raises(Corrupt, match="1 tables of tokens"):
            check_layout(forged, plain, item, "here")


def test_a_deep_look_finds_what_other_tools_would_be_shown(
    unit: tuple[Group, np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    group, held, tokens = unit
    for module, format in ((hdf5, "hdf5"), (parquet, "parquet")):
        data, commit = shard(format, held, tokens)
        assert module.check(data, group.dtype, 6, commit.segments, group.token) == ""
        assert module.check(data, group.dtype, 6, commit.segments[:-1], None)  # a second table is more than rows
        moved = (*commit.segments[:-1], commit.segments[-1].model_copy(update={"offset": 8}))
        assert module.check(data, group.dtype, 6, moved, group.token)
        none, of_none = shard(format, np.zeros_like(held), tokens[:0])
        assert module.check(none, group.dtype, 6, of_none.segments, group.token) == ""
    other = held.copy()
    other[f"{TAP}/start"][3] += 1
    monkeypatch.setattr(parquet, "_starts", lambda records: other[f"{TAP}/start"])
    data, commit = shard("parquet", held, tokens)
    monkeypatch.undo()
    problem = parquet.check(data, group.dtype, 6, commit.segments, group.token)
    assert problem == f"the lists of {TAP} are not of the lengths that the rows say"


def test_rows_that_no_codec_writes_are_found_by_their_number(unit: tuple[Group, np.ndarray, np.ndarray]) -> None:
    group, held, tokens = unit
    check = Decoder(a_plan("hdf5", group))
    data, commit = shard("hdf5", held, tokens)
    check(data, commit, group, "here")
    bad = tokens.copy()
    bad[TAP][held[f"{TAP}/start"][4], 0] = np.inf
    with pytest.raises(Corrupt, match="its row 4: a feature that is not finite"):
        check(*shard("hdf5", held, bad), group, "here")
    with pytest.raises(Corrupt, match="its row 5: its tokens end at"):
        check(*shard("hdf5", held, tokens[:-1]), group, "here")


def a_plan(format: str, group: Group) -> Plan:
    base = small_plan(format, rows=6, unit_rows=6, views=1, groups=1)
    return base.model_copy(update={"groups": (group,)})


# A plan and a tap --------------------------------------------------------------------------------------


def test_plans_and_commits_without_masks_are_what_they_were() -> None:
    assert Features.of((4, 3), axis=1).model_dump(mode="json") == {"name": "features", "shape": [4, 3], "axis": 1}
    segment = Segment(fields=("x",), offset=1, stride=2)
    assert segment.model_dump(mode="json") == {"fields": ["x"], "offset": 1, "stride": 2}
    ragged = Features.of((4, 3), axis=1, mask="m")
    assert Features.model_validate_json(json.dumps(ragged.model_dump(mode="json"))) == ragged


def test_units_are_bounded_by_what_all_real_tokens_would_take() -> None:
    group = group_of("fp16", 1 << 10, 1 << 10)
    assert group.dtype.itemsize < 200 and group.row_bytes == group.dtype.itemsize + (1 << 21)
    base = small_plan(rows=1000, unit_rows=128, views=1, groups=1)
    fields = dict(base) | {"groups": (*base.groups, group)}
    with pytest.raises(ValidationError, match="would take more than 256 MiB"):
        Plan.model_validate(fields)
    split = Split(rows=1000, views=1, unit_rows=100, labels=None)
    plan = Plan.model_validate(fields | {"splits": {"train": split}})
    assert plan.bytes_per_row == base.bytes_per_row + group.row_bytes
    with pytest.raises(ValidationError, match="holds a ragged feature, and more"):
        Group.of("x", dict(group.codecs) | {"tap/a.y": Features(width=2)})
    for fields in ({"shape": (2, 3), "axis": 0}, {"width": 3}, {"shape": (2, 3, 4), "axis": 1}):
        with pytest.raises(ValidationError, match="a mask is for tokens"):
            Features(mask="m", **fields)


def test_rows_that_padding_would_blow_up_are_refused_before_they_are_read() -> None:
    """A row without a token is a few bytes on disk, whatever the plan says that it might have."""
    group = group_of("fp16", 1 << 12, 1 << 12)
    rows = Rows(SimpleNamespace(root="here"), a_plan("hdf5", group), None, {}, memory=0)
    with pytest.raises(UsageError, match=r"here: 5 rows of tap\.a\.x take 167\.8 MB once they are padded"):
        rows.gather(group, "train", 0, np.arange(5))


def test_a_mask_that_cannot_be_is_one_sentence() -> None:
    with pytest.raises(
        ValidationError, match=r"mask='m' is for reduction='tokens' without project, found reduction='pool'"
    ):
        ed.Tap(member="a", module="x", mask="m")
    with pytest.raises(ValidationError, match="without project, found project"):
        ed.Tap(member="a", module="x", reduction="tokens", mask="m", project=ed.Random(dim=3))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"tokens", mask="mask"', '"tokens", mask="maks"', "mask: the source has no input 'maks'; did you mean 'mask'"),
        ("astype(np.int64)}", "astype(np.float32)}", "the input 'mask' is torch.float32, expected bool or an integer"),
        ('"tokens", mask="mask"', '"tokens", mask="ids2"', r"the input 'ids2' has shape [2], the tokens [2, 11]"),
    ],
)
def test_an_input_that_is_no_mask_is_refused_before_anything_is_written(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    cli = in_folder(tmp_path)
    cli.change(old, new, name="ragged.py")
    cli.change("ids[:rows], ", "ids[:rows], 'ids2': labels[:rows], ", name="ragged.py")
    cli.change("(self, ids, mask)", "(self, ids, ids2, mask)", name="ragged.py")
    assert message in cli("cache", "ragged.py", "--out", "cache", code=2).stderr
    assert not list((tmp_path / "cache").rglob("*.json"))


# Losses ------------------------------------------------------------------------------------------------


def test_terms_see_real_tokens_alone() -> None:
    torch.manual_seed(0)
    mask = torch.rand(5, 7) < 0.6
    student, cached = torch.randn(5, 7, 3), torch.randn(5, 7, 3).masked_fill(~mask[:, :, None], 0)
    pairs = [(student[i][mask[i]].double().flatten(), cached[i][mask[i]].double().flatten()) for i in range(5)]
    match = {"tap": TAP, "module": "x"}
    l2 = of_features(terms.FeatureMatch(**match, distance="l2"), None, student, cached, None, mask)
    torch.testing.assert_close(l2.double(), torch.stack([(s - t).square().sum() / 2 for s, t in pairs]).mean())
    cosine = of_features(terms.FeatureMatch(**match), None, student, cached, None, mask)
    angles = [1 - torch.cosine_similarity(s, t, dim=0) for s, t in pairs]
    torch.testing.assert_close(cosine.double(), torch.stack(angles).mean())
    given = []
    own = terms.FeatureMatch(
        **match, distance=lambda *a: given.extend(a) or ed.losses.tinybert_hidden(a[0], a[1], a[3])
    )
    value = of_features(own, None, student, cached, None, mask)
    assert torch.equal(given[3], mask) and given[2] is None
    torch.testing.assert_close(value.double(), torch.stack([(s - t).square().mean() for s, t in pairs]).mean())
    relations = terms.SimilarityPreserving(**match)
    zeroed = student.masked_fill(~mask[:, :, None], 0)
    assert of_features(relations, None, student, cached, None, mask) == of_features(
        relations, None, zeroed, cached, None
    )
    pooled = of_features(relations, None, student.mean(1), cached, None, mask)
    assert pooled == of_features(relations, None, student.mean(1), cached, None)
    with pytest.raises(
        UsageError, match=r"7 tokens a row, of which some are real, and the student's the shape \[6, 3\]"
    ):
        of_features(relations, None, student[:, :6], cached, None, mask)


# The command line --------------------------------------------------------------------------------------


def in_folder(folder: Path) -> Cli:
    shutil.copy(HERE / "pipelines" / "ragged.py", folder)
    return Cli(folder)


@pytest.fixture(scope="module")
def captured_ragged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ragged") / "work"
    folder.mkdir()
    cli = in_folder(folder)
    for format in FORMATS:
        cli("cache", "ragged.py", "--out", format, "--format", format)
    return folder


@pytest.fixture
def ragged(captured_ragged: Path, tmp_path: Path) -> Cli:
    return Cli(shutil.copytree(captured_ragged, tmp_path / "work"))


def batches(
    pipeline: ModuleType, cache: ed.Cache, taps: list[str]
) -> Iterator[tuple[ed.Batch, dict[str, torch.Tensor]]]:
    """Batches in a drawn order, and what the member's modules give for them."""
    member = pipeline.seeded(lambda: pipeline.Text(pipeline.WIDTH, 0.0)).eval()
    source = pipeline.data().sources["train"]
    for batch in cache.loader(source, 7, taps=taps, seed=3):
        ids, mask = batch.inputs["ids"], batch.inputs["mask"]
        with torch.no_grad():
            x, real = member.embed(ids), mask[:, :, None] != 0
            mean = (x * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
            yield batch, {"embed": x, "norm": member.norm(member.mix(x) + mean)}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("memory", [0, None])  # unit by unit, and all at once
def test_features_of_real_tokens_are_those_of_the_member(
    captured_ragged: Path, format: str, memory: int | None
) -> None:
    pipeline = load_module(captured_ragged / "ragged.py")
    cache = ed.open_cache(captured_ragged / format, memory=memory)
    seen = 0
    for batch, expected in batches(pipeline, cache, [tap.field for tap in pipeline.TAPS]):
        real = batch.inputs["mask"] != 0
        assert set(batch.targets.masks) == {tap.field for tap in pipeline.TAPS if tap.mask}
        for tap in pipeline.TAPS:
            found, right = batch.targets.features[tap.field], expected[tap.module]
            assert found.shape == right.shape and found.dtype == torch.float32
            if tap.mask is None:
                torch.testing.assert_close(found, right, rtol=2**-10, atol=1e-6)
                continue
            mask = batch.targets.masks[tap.field]
            assert mask.dtype == torch.bool and torch.equal(mask, real)
            right = right.masked_fill(~real[:, :, None], 0)
            largest = right.abs().amax(1, keepdim=True).expand_as(right)[real]
            allowed = {"fp16": 2**-10, "bf16": 2**-7, "int8": 1 / 250}[tap.values] * largest + 1e-5
            assert ((found - right)[real].abs() <= allowed).all() and (found[~real] == 0).all()
        seen += len(real)
    assert seen == pipeline.TRAIN


def test_units_take_what_their_masks_say(captured_ragged: Path) -> None:
    pipeline = load_module(captured_ragged / "ragged.py")
    for split, source in pipeline.data().sources.items():
        mask = source.load(np.arange(len(source))).inputs["mask"] != 0
        for page, part in enumerate(np.split(mask, range(20, len(mask), 20))):
            sizes = {}
            for format in FORMATS:
                for tap in ("embed", "padded"):
                    name = f"{split}-v000000-{page:08d}.tap.t.{tap}.json"
                    commit = json.loads((captured_ragged / format / "commits" / name).read_bytes().partition(b"\n")[2])
                    sizes[format, tap] = commit["size"]
                    counted = [s["count"] for s in commit["segments"] if "count" in s]
                    assert counted == ([int(part.sum())] if tap == "embed" else [])
            assert sizes["hdf5", "embed"] <= len(part) * 8 + int(part.sum()) * 2 * pipeline.WIDTH + 1024


def test_a_ragged_cache_is_verified_copied_repaired_and_the_same_in_both_formats(ragged: Cli) -> None:
    digests = {ed.open_cache(ragged.folder / format).content_digest for format in FORMATS}
    assert len(digests) == 1
    for format in FORMATS:
        ragged("verify", format, "--deep")
    text = ragged("inspect", "hdf5").stdout
    assert "tokens×6" in text and "tokens of module 'norm', the real ones by 'mask', int8" in text
    ragged("copy", "hdf5", "copied")
    assert ed.open_cache(ragged.folder / "copied").digest == ed.open_cache(ragged.folder / "hdf5").digest
    flip(shard_of(ragged.folder / "copied", "train-v000000-00000001.tap.t.embed"), 0.95)
    assert "tap.t.embed" in ragged("verify", "copied", code=4).stdout
    ragged("repair", "copied", "ragged.py")
    ragged("verify", "copied", "--deep")
    assert ed.open_cache(ragged.folder / "copied").content_digest in digests


def test_a_forged_unit_with_hashes_of_its_own_is_found(ragged: Cli) -> None:
    store, name = open_store(ragged.folder / "hdf5"), "train-v000000-00000001.tap.t.embed"
    old, plan = store.commit(name), ed.open_cache(ragged.folder / "hdf5").plan
    group = plan.locate(name)[1]
    table = read_table(np.frombuffer(store.object(old), np.uint8), old, group)
    held = table.records.view(group.dtype).reshape(-1).copy()
    held["tap/t.embed/start"][5] += 1
    (ragged.folder / "hdf5" / "commits" / f"{name}.json").unlink()
    store.put_unit(old.plan, name, held, "hdf5", old.keys, None, old.provenance, table.tokens)
    (ragged.folder / "hdf5" / "CURRENT").unlink()
    ragged("seal", "hdf5")
    process = ragged("verify", "hdf5", "--deep", code=4)
    assert "its row 5: its tokens do not begin where those of the row before end" in process.stdout
    cache = ed.open_cache(ragged.folder / "hdf5")
    with pytest.raises(Corrupt, match=r"unit train-v000000-00000001\.tap\.t\.embed: row 5: its tokens do not begin"):
        cache.targets_at(np.array([25]), taps=["tap/t.embed"])


def test_samples_and_ragged_taps_are_appended(ragged: Cli) -> None:
    before = ed.open_cache(ragged.folder / "hdf5").targets_at(np.arange(50), taps=["tap/t.bf16"])
    ragged.change("TRAIN = 11, 6, 50", "TRAIN = 11, 6, 63", name="ragged.py")
    more = '    ed.Tap(member="t", module="mix", reduction="tokens", mask="mask"),\n'
    ragged.change("    # one more\n", more, name="ragged.py")
    ragged("append", "ragged.py", "--cache", "hdf5")
    ragged("verify", "hdf5", "--deep")
    cache, pipeline = ed.open_cache(ragged.folder / "hdf5"), load_module(ragged.folder / "ragged.py")
    after = cache.targets_at(np.arange(63), taps=["tap/t.bf16", "tap/t.mix"])
    assert torch.equal(after.features["tap/t.bf16"][:50], before.features["tap/t.bf16"])
    mask = torch.from_numpy(pipeline.data().sources["train"].load(np.arange(63)).inputs["mask"] != 0)
    for tap in after.features:
        assert torch.equal(after.masks[tap], mask)
        assert torch.equal(after.features[tap].abs().sum(2) > 0, mask)


def test_a_student_learns_from_real_tokens(ragged: Cli) -> None:
    ragged("train", "ragged.py", "--cache", "hdf5", "--out", "run")
    assert json.loads((ragged.folder / "run" / "config.json").read_text())["inputs"] == ["ids", "mask"]
    metrics = [json.loads(line) for line in (ragged.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [entry for entry in metrics if "hidden" in str(entry)]
    assert losses and "nan" not in str(losses).lower()
    ragged.change('("tap/t.bf16", "tap/t.int8")', '("tap/t.bf16", "tap/t.padded")', name="ragged.py")
    process = ragged("train", "ragged.py", "--cache", "hdf5", "--out", "other", code=2)
    assert "objective.cosine: its taps have the masks ['mask', None]: they must have one, or none" in process.stderr


def test_the_plan_estimates_ragged_taps_by_their_mean_number_of_tokens(ragged: Cli) -> None:
    found = json.loads(ragged("plan", "ragged.py", "--batches", 9, "--json").stdout)
    taps = {tap["tap"]: tap for tap in found["taps"]}
    assert taps["tap/t.padded"]["tokens"] is None and taps["tap/t.padded"]["bytes_per_row"] == 2 * 11 * 6
    pipeline = load_module(ragged.folder / "ragged.py")
    sources = pipeline.data().sources.values()
    mean = np.concatenate([s.load(np.arange(len(s))).inputs["mask"] != 0 for s in sources]).sum(1).mean()
    assert taps["tap/t.norm"]["tokens"] == pytest.approx(mean, rel=0.05)
    assert taps["tap/t.norm"]["bytes_per_row"] == pytest.approx(8 + mean * 12, rel=0.05)
    held = json.loads(ragged("inspect", "hdf5", "--json").stdout)
    assert found["bytes"] == pytest.approx(held["bytes"], rel=0.02)
    text = ragged("plan", "ragged.py", "--batches", 2).stdout
    assert "of 11×6" in text and "~: an estimate, by the mean number of real tokens" in text


def test_masks_go_where_targets_go() -> None:
    targets = ed.Targets(torch.zeros(2, 3), masks={TAP: torch.ones(2, 4, dtype=torch.bool)})
    assert targets.to("meta").masks[TAP].device.type == "meta"
    assert targets.to("cpu").masks[TAP].all()


def test_inputs_in_another_order_are_refused(tmp_path: Path) -> None:
    """A module is called with them one after another, and no key depends on their order."""
    shutil.copy(HERE / "pipelines" / "ragged.py", tmp_path)
    cli = Cli(tmp_path)
    cli("cache", "ragged.py", "--out", "cache", "--units", "0:3")
    cli.change(
        '{"ids": ids[:rows], "mask": 3 * mask[:rows].astype(np.int64)}',
        '{"mask": 3 * mask[:rows].astype(np.int64), "ids": ids[:rows]}',
        "ragged.py",
        "other.py",
    )
    cli.change("def forward(self, ids, mask)", "def forward(self, mask, ids)", "other.py")
    assert "reading.inputs" in cli("cache", "other.py", "--out", "cache", code=3).stderr
    cli("cache", "ragged.py", "--out", "cache")
    error = cli("train", "other.py", "--cache", "cache", "--out", "run", code=3).stderr
    assert "inputs ids, mask" in error and "mask, ids" in error
