"""Caches from strangers: each ends in one of our errors, and takes no memory, no time and no file that is not its own.

A stranger can make every hash right, so nearly all of these are forged anew after the edit (see hostile.py).
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import hostile
import numpy as np
import pytest
from hostile import CANARY, CODES, GROWTH, LOOKS, Files, Forge, Fuzz, lay, outcome, watch

from ensemble_distill.fingerprint import canonical_json, sha256
from ensemble_distill.store import records

Prepare = Callable[[Forge], None]
After = Callable[[Path, Path], None]


@dataclass(frozen=True)
class Case:
    """An edit before the forging, or one of the folder after it (root, a folder outside).

    read, verify: whether it must be refused by those (None: it may be accepted too, by bytes that mean no harm).
    """

    prepare: Prepare = lambda forge: None
    after: After = lambda root, outside: None
    read: bool | None = True
    verify: bool | None = True


CASES: dict[str, Case] = {}


def add(name: str, prepare: Prepare = lambda forge: None, **more: Any) -> None:
    assert name not in CASES, name
    CASES[name] = Case(prepare, **more)


def setting(path: str, value: Any) -> Prepare:
    """Set a place of the plan, as ``splits.train.rows``."""

    def prepare(forge: Forge) -> None:
        node: Any = forge.plan
        *parents, last = path.split(".")
        for part in parents:
            node = node[int(part) if isinstance(node, list) else part]
        node[int(last) if isinstance(node, list) else last] = value

    return prepare


def lying(unit: str | None = None, **lies: Any) -> Prepare:
    """Fields of a unit's commit (``*``: of all) after its digests were computed."""

    def prepare(forge: Forge) -> None:
        forge.lies[unit or forge.unit] = lies

    return prepare


def both(*steps: Prepare) -> Prepare:
    def prepare(forge: Forge) -> None:
        for step in steps:
            step(forge)

    return prepare


def refill(forge: Forge) -> None:
    forge.refill()


def pointing(name: str, data: bytes) -> Prepare:
    return lambda forge: forge.pointers.update({name: data})


def texting(kind: str, edit: Callable[[bytes], bytes]) -> Prepare:
    return lambda forge: forge.text.update({kind: edit})


# Names ------------------------------------------------------------------------------------------------

NAMES = {
    "traversal": "../../outside/canary",
    "absolute": "/etc/passwd",
    "nul": "a\0b",
    "url": "https://example.com/a.h5",
    "file url": "file:///etc/passwd",
    "unc": "\\\\host\\share\\a.h5",
    "newline": "0" * 64 + ".h5\n",
    "dots": "..",
    "empty": "",
    "very long": "a" * 100_000,
    "terminal escapes": "\x1b[2J\x1b]0;gone\x07",
}
for label, name in NAMES.items():
    add(f"object named by {label}", lying(object=name))
    add(f"unit named by {label}", lambda f, n=name: f.lies.update({f.unit: {"unit": n}}))
    add(f"split named by {label}", lambda f, n=name: f.plan["splits"].update({n: f.plan["splits"].pop("test")}))
    add(f"group named by {label}", setting("groups.1.name", name))
    # A pointer that is a folder's or no file's name is looked up as a manifest and never as a path.
    add(f"CURRENT says {label}", pointing("CURRENT", name.encode() + b"\n"))
    add(f"PLAN says {label}", pointing("PLAN", name.encode() + b"\n"), read=None)
for label in ("traversal", "nul", "absolute"):
    add(f"manifest names its plan by {label}", lambda f, n=NAMES[label]: f.manifest_lies.update(plan=n))
    add(f"manifest names a page by {label}", lambda f, n=NAMES[label]: f.manifest_lies.update(pages=[n]))
add("field named by traversal, which names no file", setting("groups.1.fields.0.name", "tap/../../x"), read=True)
add("CURRENT without its newline", pointing("CURRENT", b"0" * 64))
add("CURRENT names a manifest that is not there", pointing("CURRENT", b"0" * 64 + b"\n"))


def enlarged(pattern: str, size: int) -> After:
    """Files that hold nothing but a hole of this size."""

    def after(root: Path, outside: Path) -> None:
        for path in root.glob(pattern):
            with path.open("r+b") as file:
                file.truncate(size)

    return after


add("CURRENT of a gigabyte", after=enlarged("CURRENT", 1 << 30))
add("PLAN of a gigabyte", after=enlarged("PLAN", 1 << 30), read=None)

# Links, pipes and folders where files should be -------------------------------------------------------


def instead(pattern: str, make: Callable[[Path, Path], None]) -> After:
    """Put something else in the place of what matches; the right thing lies outside, so reading it would do."""

    def after(root: Path, outside: Path) -> None:
        found = sorted(root.glob(pattern))
        assert found
        for path in found:
            path.rename(outside / path.name)
            make(path, outside / path.name)

    return after


MADE: dict[str, Callable[[Path, Path], None]] = {
    "a link": lambda path, moved: path.symlink_to(moved),
    "a link to /dev/zero": lambda path, moved: path.symlink_to("/dev/zero"),
    "a pipe": lambda path, moved: os.mkfifo(path),
    "a folder": lambda path, moved: path.mkdir(),
    "nothing": lambda path, moved: None,
}
FOUND = {"plan": "plans/*", "manifest": "manifests/*", "page": "pages/*", "keys": "keys/*", "objects": "objects/*"}
for label, make in MADE.items():
    for kind, pattern in FOUND.items():
        add(f"{label} for {kind}", after=instead(pattern, make))
    add(f"{label} for commits", after=instead("commits/*", make), read=None)
    add(f"{label} for CURRENT", after=instead("CURRENT", make), verify=None)
    add(f"{label} for PLAN", after=instead("PLAN", make), read=None)
for folder in ("plans", "manifests", "pages", "keys", "objects"):
    add(f"folder {folder} a link", after=instead(folder, MADE["a link"]))
    add(f"folder {folder} a pipe", after=instead(folder, MADE["a pipe"]))
add("folder commits a link", after=instead("commits", MADE["a link"]), read=None)


def unsealed_with_linked_commits(root: Path, outside: Path) -> None:
    (root / "CURRENT").unlink()
    shutil.rmtree(root / "commits")
    (root / "commits").symlink_to(outside)


add("commits a link to a folder of secret names", after=unsealed_with_linked_commits)

# Numbers of the plan ----------------------------------------------------------------------------------

RENDERING = {"sample": 0, "key": "0" * 32, "view": 1, "shape": [1, 1, 1], "cells": "00"}

for place, values in {
    "splits.train.rows": [2**40, 2**60, 2**48, 10**14, -1, 9, 11, 1.0, "10", True, 10**400],
    "splits.train.unit_rows": [0, -1, 2**60, 3, 1],
    "splits.train.views": [0, -1, 3, 2**24 - 1, 2**30, 2**63],
    "groups.0.fields.0.shape": [
        [2**28], [2**30], [2**28] * 2, [2**28] * 8, [2**28] * 7 + [0], [3] * 9, [], [-3], [0], [2**63], [4],
        [3, 1], [1.5],
    ],
    "groups.0.fields.0.dtype": ["|O", ">f2", "<U10", "|V8", "|S5", "<f8", "<M8[s]", "f2,f2", "", None, "<f4"],
    "groups.0.codecs.main": [
        {"name": "pickle", "classes": 3}, {"name": "dense"}, {}, None, {"name": "../dense"},
        {"name": "topk", "classes": 3, "k": 2**40}, {"name": "topk", "classes": 3, "k": 2},
        {"name": "varopt", "classes": 3, "k": -1}, {"name": "sampled", "classes": 2**60, "n": 3},
        {"name": "members", "inner": {"name": "members"}}, {"name": "members", "members": ["../x"]},
        {"name": "topk", "classes": 3, "k": 2, "temperatures": [2.0] * 100_000},
    ],
    "groups.0.codecs": [{}, None, {"x": {"name": "dense", "classes": 3}}, []],
    "groups.0.fields.0.name": ["main/x", "", "a" * 300, 5, "\0"],
    "groups.0.name": ["other", "tap"],
    "groups": [[], None, {}],
    "splits": [{}, [], None],
    "format": ["pickle", "../hdf5", None, "os", "layout"],
    "capture.audit": [
        [], None, [None], [{**RENDERING, "shape": [64, 8, 8]}], [{**RENDERING, "view": 2**60}],
        [RENDERING] * 65, [RENDERING] * 300_000, [{**RENDERING, "cells": "00" * 1_000_000}],
        [{**RENDERING, "shape": [2**40, 0, 8], "cells": ""}], [{**RENDERING, "cells": "zz"}],
    ],
    "reading.views.mix": [None, {}, {"kind": "mixup", "alpha": 0.2}, {"kind": "cutmix", "alpha": 0}, {"kind": "os"}],
    "schema_version": [2, 0, "1", None, "x" * 1_000_000],
    "reading.classes": [[1], None, "xyz"],
}.items():  # fmt: skip
    for i, value in enumerate(values):
        add(f"plan {place} {repr(value)[:40]} ({i})", setting(place, value))
add("a split that is said to be empty", setting("splits.train.rows", 0), read=None)
TAP = {
    "fields": [{"name": "tap/a.pool", "dtype": "<f2", "shape": [2]}],
    "codecs": {"tap/a.pool": {"name": "features", "width": 2}},
}
add("two fields of one name", setting("groups.1.fields.1.name", "tap/a.pool"))
add("two groups of one name", lambda f: f.plan["groups"].append(f.plan["groups"][0]))
add("field that is in two groups", lambda f: f.plan["groups"].append({"name": "more", **TAP}))
add("group without fields", setting("groups.0.fields", []))
add("2000 splits", lambda f: f.plan["splits"].update({f"s{i}": f.plan["splits"]["test"] for i in range(2000)}))
add("2000 groups", lambda f: f.plan["groups"].extend({"name": f"g{i}", **TAP} for i in range(2000)))
MANY = both(setting("splits.train", {"rows": 2**26, "views": 1, "unit_rows": 1, "labels": None}))
add("2^27 units, one page that is said to be all", MANY)
add("2^27 units, no page that is there", both(MANY, lambda f: setattr(f, "pages", lambda p: ["0" * 64] * len(p))))


def unsealed(root: Path, outside: Path) -> None:
    (root / "CURRENT").unlink()


add("2^27 units, nothing sealed", MANY, after=unsealed)
add("2^24 views, nothing sealed", setting("splits.train.views", 2**24 - 1), after=unsealed, verify=None)

# What the plan says of the fields, with shards to match -------------------------------------------------

add("targets of no axis", both(setting("groups.0.fields.0.shape", []), refill), verify=None)
add("targets of two axes", both(setting("groups.0.fields.0.shape", [3, 2]), refill), read=None, verify=None)
add("targets under another name", both(setting("groups.0.fields.0.name", "main/x"), refill), verify=None)
add("no group of targets", both(setting("groups.0.name", "other")), verify=None)
add(
    "targets as features",
    both(setting("groups.0.codecs.main", {"name": "features", "width": 3}), refill),
    read=None,
    verify=None,
)
add(
    "taps as targets",
    setting("groups.1.codecs", {"tap/a.pool": {"name": "dense", "classes": 2}}),
    read=None,
    verify=None,
)
add("taps of no axis", both(setting("groups.1.fields.0.shape", []), refill), read=None, verify=None)
add("five classes in a shape of three", setting("groups.0.codecs.main.classes", 5), verify=None)
add("minus one classes", setting("groups.0.codecs.main.classes", -1), verify=None)
add(
    "features wider than their shape",
    lambda f: f.plan["groups"][1]["codecs"]["tap/a.pool"].update(width=2**62),
    verify=None,
)
for dtype in ("|u1", "<u2", "<u4", "<i8", "<f4"):
    prepare = both(setting("groups.0.fields.0.dtype", dtype), setting("groups.1.fields.1.dtype", dtype), refill)
    add(f"targets of dtype {dtype}", prepare, read=None, verify=None)
for value in (np.nan, np.inf, -np.inf):
    add(f"a payload of {value}", lambda f, value=value: f.refill(value), read=None, verify=None)

# Commits ----------------------------------------------------------------------------------------------


def segments(edit: Callable[[list[dict[str, Any]]], list[Any]], unit: str = "train-v000000-00000000.tap") -> Prepare:
    def prepare(forge: Forge) -> None:
        forge.lies[unit] = {"segments": edit([dict(s) for s in forge.commits[unit]["segments"]])}

    return prepare


for field, values in {
    "offset": [-1, -(2**63), 2**20, 2**63, 2**64, 10**30, 1.0, "0", None],
    "stride": [0, -8, 1, 4, 2**40, 2**63, None],
    "fields": [[], ["tap/a.pool"], ["tap/b.pool", "tap/a.pool"], ["tap/a.pool"] * 2, ["x"], None, [["tap/a.pool"]]],
    "count": [0, 4, -1, 2**62, 10**30, 1.0, "1", None],
}.items():
    for i, value in enumerate(values):
        name = f"segment {field} {value} ({i})"
        add(name, segments(lambda found, field=field, value=value: [found[0] | {field: value}]))
add("no segments", segments(lambda found: []))
add("a segment twice", segments(lambda found: found * 2))
add("100,000 empty segments", segments(lambda found: found + [{"fields": [], "offset": 0, "stride": -1}] * 10_000))
add("an empty segment beside", segments(lambda found: found + [{"fields": [], "offset": 0, "stride": -1}]))
SPLIT = [{"fields": [f"tap/{m}.pool"], "offset": 0, "stride": 4} for m in "ab"]
add("segments that overlap", segments(lambda found: SPLIT), read=None, verify=None)
TOKENS = {"fields": [], "offset": 0, "stride": 1, "count": 1}
add("tokens of no field beside", segments(lambda found: [*found, TOKENS]))
add("segments in another order", segments(lambda found: SPLIT[::-1]))
for field, values in {
    "size": [-1, 0, 1, 2**40, 2**62, 10**30, 5.0],
    "rows": [-1, 0, 3, 5, 2**60, 10**30, 4.0],
    "blocks": [[], ["0" * 64], ["0" * 64] * 2, ["0" * 64] * 10_000, ["x"], [None], "0" * 64],
    "keys": ["0" * 64, "", None, "../keys", "A" * 64],
    "statistics": [[], 5, "x"],
    "provenance": [None, []],
    "surprise": [1],
}.items():
    for i, value in enumerate(values):
        add(f"commit {field} {repr(value)[:40]} ({i})", lying(**{field: value}))
add("shard that is a hole of a terabyte", after=enlarged("objects/*", 1 << 40))
add(
    "shard that is a hole of a terabyte and says so",
    lying("*", size=1 << 40),
    after=enlarged("objects/*", 1 << 40),
)


def holes(forge: Forge, rows: int, width: int) -> None:
    """One unit of zeros, as sparse files that a few kilobytes of an archive can carry."""
    forge.plan["splits"] = {"train": {"rows": rows, "views": 1, "unit_rows": rows, "labels": None}}
    forge.plan["groups"] = [forge.plan["groups"][0]]
    forge.plan["groups"][0]["fields"][0] |= {"shape": [width]}
    forge.plan["groups"][0]["codecs"]["main"] |= {"classes": width}
    forge.plan["reading"] |= {"classes": ["x"] * width, "heads": {"main": width}}
    size, unit = rows * width * 2, forge.unit
    commit = forge.commits[unit]
    forge.commits, forge.shards = {unit: commit}, {unit: b""}
    blocks = [sha256(bytes(records.BLOCK))] * (size // records.BLOCK)
    keys = sha256(memoryview(bytes(rows * 16)))
    lies: dict[str, Any] = {"size": size, "blocks": blocks, "object": records.root_hash(tuple(blocks)) + ".h5"}
    stride = {"fields": ["main/logprobs"], "offset": 0, "stride": width * 2}
    forge.lies[unit] = lies | {"rows": rows, "segments": [stride], "keys": keys}
    forge.keys = {}


def sparse(rows: int, width: int) -> After:
    def after(root: Path, outside: Path) -> None:
        commit = json.loads(next((root / "commits").iterdir()).read_bytes().partition(b"\n")[2])
        for name, size in ((f"objects/{commit['object']}", rows * width * 2), ("keys/train-00000000", rows * 16)):
            with (root / name).open("wb") as file:
                file.truncate(size)

    return after


add(
    "a shard of 512 MiB of nothing",
    lambda f: holes(f, 2**18, 2**10),
    after=sparse(2**18, 2**10),
    read=None,
    verify=None,
)
add("keys of 512 MiB of nothing", lambda f: holes(f, 2**25, 1), after=sparse(2**25, 1), read=None, verify=None)

# JSON -------------------------------------------------------------------------------------------------


def within(data: bytes, addition: bytes) -> bytes:
    return data[:-1] + b"," + addition + b"}"


# An addition to provenance or statistics, where any JSON may stand.
def free(data: bytes, value: bytes) -> bytes:
    for name in (b'"provenance":{', b'"heads":{'):
        if name in data:
            return data.replace(name, name + b'"a":' + value + b",", 1)
    return data.replace(b":null", b":" + value, 1)


TRICKS: dict[str, Callable[[bytes], bytes]] = {
    "a key twice": lambda data: within(data, data[1 : data.index(b",")]),
    "NaN": lambda data: free(data, b"NaN"),
    "Infinity": lambda data: free(data, b"Infinity"),
    "1e999": lambda data: free(data, b"1e999"),
    "an integer of 5,000 digits": lambda data: free(data, b"9" * 5000),
    "an integer of 4,000 digits for a schema": lambda data: data.replace(
        b'"schema_version":1', b'"schema_version":' + b"9" * 4000
    ),
    "100,000 lists in each other": lambda data: free(data, b"[" * 100_000 + b"]" * 100_000),
    "nothing but brackets": lambda data: b"[" * 100_000,
    "an unknown field": lambda data: within(data, b'"zzz":1'),
    "an unknown field with a name of 900 kB": lambda data: within(data, b'"' + b"ab" * 450_000 + b'":1'),
    "bytes that are no text": lambda data: free(data, b'"\xff\xfe"'),
    "half a surrogate": lambda data: free(data, b'"\\ud800"'),
    "nothing": lambda data: b"",
    "a byte order mark": lambda data: b"\xef\xbb\xbf" + data,
    "UTF-16": lambda data: data.decode().encode("utf-16"),
    "a space": lambda data: data + b" ",
    "null": lambda data: b"null",
    "a list": lambda data: b"[]",
    "100,000 lists": lambda data: b"[" + b"[]," * 100_000 + b"[]]",
    "half of it": lambda data: data[: len(data) // 2],
}
for kind in ("plan", "manifest", "page", "commit"):
    for label, trick in TRICKS.items():
        if not (kind in ("page", "commit") and "schema" in label):
            add(f"{kind}: {label}", texting(kind, trick))
add(
    "manifest: an unknown field with a name of 20 MB",
    texting("manifest", lambda d: within(d, b'"' + b"ab" * 10**7 + b'":1')),
)
add(
    "plan: 10 million wrong classes",
    texting("plan", lambda d: d.replace(b'["x","y","z"]', b"[" + b"1," * 10**7 + b"1]")),
)
add("manifest: 10 million wrong pages", texting("manifest", lambda d: b'{"pages":[' + b"1," * 10**7 + b"1]}"))
add(
    "manifest: 10 million empty lists",
    texting("manifest", lambda d: free(d, b"[" + b"[]," * 10**7 + b"[]]")),
    read=None,
)
add("page: 5 million empty commits", texting("page", lambda d: b'{"commits":[' + b"{}," * (5 * 10**6) + b"{}]}"))
for kind, pattern in {"plan": "plans/*", "manifest": "manifests/*", "page": "pages/*"}.items():
    add(f"{kind} that is a hole of 300 MB", after=enlarged(pattern, 300 << 20))
    add(f"{kind} that is a hole of 60 MB", after=enlarged(pattern, 60 << 20))
add("commits that are holes of 300 MB", after=enlarged("commits/*", 300 << 20), read=None)

# The manifest and its pages -----------------------------------------------------------------------------

for field, values in {
    "schema_version": [2, 0, "1", None],
    "units": [0, 13, 15, -1, 2**60, 10**400, 14.0],
    "pages": [[], ["0" * 64], ["0" * 64] * 2, None, {}],
    "plan": ["0" * 64],
    "content_digest": ["", "x"],
    "statistics": [None, []],
}.items():
    for i, value in enumerate(values):
        name = f"manifest {field} {repr(value)[:40]} ({i})"
        add(name, lambda f, field=field, value=value: f.manifest_lies.update({field: value}))


def many_pages(pages: Callable[[list[str]], list[str]]) -> Prepare:
    """4,104 units on two pages; their shards are alike, and only the pages hold their commits."""

    def prepare(forge: Forge) -> None:
        views = 684
        forge.plan["splits"]["train"] = {"rows": 10, "views": views, "unit_rows": 4, "labels": None}
        del forge.plan["splits"]["test"]
        old, forge.commits, shards, forge.shards = forge.commits, {}, forge.shards, {}
        for view in range(views):
            for page in range(3):
                for group in ("targets", "tap"):
                    like, unit = f"train-v000000-{page:08d}.{group}", f"train-v{view:06d}-{page:08d}.{group}"
                    forge.commits[unit], forge.shards[unit] = old[like] | {"unit": unit}, shards[like]
        forge.own_commits, forge.pages = False, pages

    return prepare


add("two pages, as they should be", many_pages(lambda pages: pages), read=False)
add("pages in another order", many_pages(lambda pages: pages[::-1]))
add("a page twice", many_pages(lambda pages: [pages[0], pages[0]]))
add("the second page alone", many_pages(lambda pages: [pages[1], pages[1]]))


def swap_commits(forge: Forge) -> None:
    forge.commits = dict(reversed(forge.commits.items()))


def foreign_plan(root: Path, outside: Path) -> None:
    """PLAN names another plan than the manifest does."""
    plan = json.loads(next((root / "plans").iterdir()).read_bytes())
    plan["capture"]["batch_size"] = 5
    text = canonical_json(plan)
    (root / f"plans/{sha256(text)}.json").write_bytes(text)
    (root / "PLAN").write_text(f"{sha256(text)}\n")


add("commits in another order", swap_commits)
add("a manifest of another plan than PLAN", after=foreign_plan, read=None)
add("commits of another plan", lying("*", plan="another"), read=None, verify=None)

# Keys -------------------------------------------------------------------------------------------------


def keyed(edit: Callable[[bytes], bytes]) -> Prepare:
    return lambda forge: forge.keys.update({"keys/train-00000000": edit(forge.keys["keys/train-00000000"])})


add("keys too long", keyed(lambda data: data + bytes(16)))
add("keys too short", keyed(lambda data: data[:-16]))
add("keys that end within one", keyed(lambda data: data[:-1]))
add("no keys", keyed(lambda data: b""))
add("keys that are all the same", keyed(lambda data: bytes(len(data))), read=None, verify=None)
add("keys that are a hole of a terabyte", after=enlarged("keys/*", 1 << 40))
add("keys that are not those of the commits", after=lambda root, outside: swap(root, "keys/train-00000000"))


def swap(root: Path, name: str) -> None:
    (root / name).write_bytes((root / name).read_bytes()[::-1])


# Shards that are something else, under right hashes -----------------------------------------------------


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch exploded",))


def external_hdf5() -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file["rows"] = h5py.ExternalLink("/etc/passwd", "/")
        file["soft"] = h5py.SoftLink("/nowhere")
    return buffer.getvalue()


CONTENTS = {
    "a pickle": pickle.dumps(Bomb()),
    "an HDF5 file with an external link": external_hdf5(),
    "a zip": b"PK\x03\x04" + bytes(40),
    "nothing": b"",
    "one byte": b"\0",
}
for label, data in CONTENTS.items():
    for size, pad in {"as it is": 0, "with room for the rows": 4096}.items():
        # With room it is read at the committed offsets, as the numbers that any bytes are.
        add(
            f"shard that is {label}, {size}",
            lambda f, data=data, pad=pad: f.shards.update(dict.fromkeys(f.shards, data + bytes(pad))),
            read=None,
            verify=None,
        )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return hostile.files_of(hostile.make(tmp_path_factory.mktemp("hostile") / "cache"))


def test_a_forged_cache_without_an_edit_is_the_cache_itself(base: Files, tmp_path: Path) -> None:
    """The rig's own check: what is refused below is refused for its edit."""
    assert Forge(base).files() == base
    lay(tmp_path / "cache", base)
    assert {look(tmp_path / "cache") for look in LOOKS.values()} > {"ok"}


def problems_of(name: str, base: Files, folder: Path) -> list[str]:
    """What is wrong with what became of a case; nothing, if the promise holds."""
    case, forge = CASES[name], Forge(base)
    root, outside = folder / "cache", folder / "outside"
    outside.mkdir()
    (outside / CANARY).write_text(CANARY * 100)
    case.prepare(forge)
    lay(root, forge.files())
    case.after(root, outside)
    del forge
    problems, refused = [], []
    for label, look in LOOKS.items():  # each in a child of its own: one that dies hides no other
        (found,) = watch([lambda look=look: outcome(lambda: look(root))])
        end = found["value"]
        message = end.get("message", "")
        if found["growth"] > GROWTH:
            problems.append(f"{label} took {found['growth'] >> 20} MiB")
        if end["end"] not in ("read", "refused") or end.get("code", 4) not in CODES:
            problems.append(f"{label} {end['end']} {end.get('code', '')}: {message[:300]}")
        if CANARY in message:
            problems.append(f"{label} told of a file outside: {message[:200]}")
        if any(ord(c) < 32 and c != "\n" for c in message):
            problems.append(f"{label} prints control characters: {message[:200]!r}")
        if end["end"] == "refused":
            refused.append(label)
        if end["end"] in ("hung", "crashed"):
            break
    if not problems and case.read is not None and case.read != any(label in refused for label in ("table", "targets")):
        problems.append(f"reading was {'not ' if case.read else ''}refused")
    if not problems and case.verify is not None and case.verify != ("verify" in refused):
        problems.append(f"verify {'accepted' if case.verify else 'refused'} it")
    return problems


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_cache_ends_in_an_error_of_ours(name: str, base: Files, tmp_path: Path) -> None:
    assert not problems_of(name, base, tmp_path)
    assert not Path("exploded").exists()


def test_the_corpus_is_large_enough() -> None:
    assert len(CASES) >= 40


# Checkpoints ------------------------------------------------------------------------------------------


def header(value: dict[str, Any], data: bytes = b"") -> bytes:
    text = canonical_json(value)
    return len(text).to_bytes(8, "little") + text + data


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
TENSORS: dict[str, bytes] = {
    "a header of 2^60 bytes": (1 << 60).to_bytes(8, "little") + b"{}",
    "a header longer than the file": (100).to_bytes(8, "little") + b"{}",
    "nothing": b"",
    "seven bytes": bytes(7),
    "a header of no bytes": bytes(8),
    "tensors that overlap": header({"a": F32, "b": F32}, bytes(8)),
    "offsets beyond the end": header({"a": F32 | {"data_offsets": [0, 2**40], "shape": [2**38]}}, bytes(8)),
    "offsets backwards": header({"a": F32 | {"data_offsets": [8, 0]}}, bytes(8)),
    "offsets below zero": header({"a": F32 | {"data_offsets": [-8, 0]}}, bytes(8)),
    "a gap": header({"a": F32 | {"data_offsets": [8, 16]}}, bytes(16)),
    "a shape that overflows": header({"a": F32 | {"shape": [2**33, 2**33]}}, bytes(8)),
    "a huge shape of no elements": header({"a": F32 | {"shape": [2**62, 0], "data_offsets": [0, 0]}}),
    "an overflowing shape of no elements": header({"a": F32 | {"shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}}),
    "100 axes": header({"a": F32 | {"shape": [1] * 100, "data_offsets": [0, 4]}}, bytes(4)),
    "an unknown dtype": header({"a": F32 | {"dtype": "O"}}, bytes(8)),
    "a dtype that torch may lack": header({"a": {"dtype": "F8_E8M0", "shape": [8], "data_offsets": [0, 8]}}, bytes(8)),
    "a dtype of half bytes": header({"a": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}}, bytes(8)),
    "complex numbers": header({"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}, bytes(8)),
    "no text": (4).to_bytes(8, "little") + b"\xff\xfe\xfd\xfc",
    "deep nesting": (10**5).to_bytes(8, "little") + b"[" * 10**5,
    "metadata that is no text": header({"__metadata__": {"a": 1}, "a": F32}, bytes(8)),
    "a pickle": pickle.dumps(Bomb()),
    "torch.save": b"PK\x03\x04" + bytes(100),
}  # fmt: skip
RECORDS: dict[str, Any] = {
    "traversal": {"tensors": "../outside"},
    "an absolute name": {"tensors": "/etc/passwd"},
    "NUL": {"tensors": "a\0b"},
    "the record itself": {"tensors": "checkpoint.json"},
    "another hash": {"sha256": "0" * 64},
    "no hash": {"sha256": None},
    "state that is none": {"state": {}},
    "more fields": {"more": 1},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return hostile.files_of(hostile.make_checkpoint(tmp_path_factory.mktemp("hostile") / "run"))


def load_checkpoint(root: Path) -> dict[str, Any]:
    (found,) = watch([lambda: outcome(lambda: hostile.see_checkpoint(root))])
    assert found["growth"] < GROWTH
    assert found["value"]["end"] in ("read", "refused"), found
    return dict(found["value"])


@pytest.mark.parametrize("name", TENSORS)
def test_a_hostile_checkpoint_ends_in_an_error_of_ours(name: str, saved: Files, tmp_path: Path) -> None:
    """Under a right hash."""
    body = json.loads(saved["checkpoint.json"].partition(b"\n")[2])
    sealed = records.sealed(canonical_json(body | {"sha256": sha256(TENSORS[name])}))
    for file, data in (saved | {body["tensors"]: TENSORS[name], "checkpoint.json": sealed}).items():
        (tmp_path / file).write_bytes(data)
    assert load_checkpoint(tmp_path).get("digest") != "none", "taken for a run that has not begun"


@pytest.mark.parametrize("name", RECORDS)
def test_a_hostile_record_of_a_checkpoint_is_refused(name: str, saved: Files, tmp_path: Path) -> None:
    body = json.loads(saved["checkpoint.json"].partition(b"\n")[2])
    for file, data in (saved | {"checkpoint.json": records.sealed(canonical_json(body | RECORDS[name]))}).items():
        (tmp_path / file).write_bytes(data)
    assert load_checkpoint(tmp_path)["end"] == "refused"


def test_a_checkpoints_tensors_are_not_read_through_a_link(saved: Files, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for file, data in saved.items():
        (tmp_path / "run" / file).write_bytes(data)
    (path,) = (tmp_path / "run").glob("*.safetensors")
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    assert load_checkpoint(tmp_path / "run")["code"] == 5


# Mutations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", hostile.KINDS)
def test_mutated_files_are_the_same_or_refused(kind: str, tmp_path: Path) -> None:
    """Seeded; benchmarks/fuzz.py makes many more."""
    found = Fuzz(kind, tmp_path).run(range(150))
    assert not found["findings"], found["findings"][:10]
    assert found["mutations"] == 150 and found["refused"] > 50
