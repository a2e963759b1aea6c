"""The store: units are committed once, sealed into a manifest, and read back against their hashes.

    plans/<digest>.json          create-once
    keys/<split>-<n>             create-once pages of the key table, 16 bytes a sample in source order
    objects/<root>.h5|.parquet   immutable shards, named by content
    commits/<unit>.json          create-once: the only commit point
    manifests/<digest>/…         create-once, by seal
    CURRENT                      the digest of the manifest in force

Files only appear whole, under their names; a commit is created after its object and its key page are
durable. So a process may die anywhere: what was acknowledged is there, and what was not is done again.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from ensemble_distill.config import Config
from ensemble_distill.errors import Corrupt, Mismatch, UsageError
from ensemble_distill.fingerprint import KEY_BYTES, sha256
from ensemble_distill.formats import SUFFIX, encode
from ensemble_distill.store import records
from ensemble_distill.store.local import LocalStorage
from ensemble_distill.store.records import Commit, Manifest, Page

_HEX = re.compile(r"[0-9a-f]{64}")


class Store:
    """Reads and writes one cache directory. Knows units by name; what they mean is the plan's business."""

    def __init__(self, storage: LocalStorage) -> None:
        self.storage = storage
        self.root = storage.root

    # Writing ----------------------------------------------------------------------------------------

    def put_plan(self, plan: Config) -> str:
        data = records.dump(plan)
        digest = sha256(data)
        self.storage.create(f"plans/{digest}.json", data)
        return digest

    def put_keys(self, split: str, page: int, keys: np.ndarray) -> str:
        """Commit one page of the key table (uint8 [rows, 16]); Mismatch if another content stands there."""
        name, data = f"keys/{split}-{page:08d}", keys.tobytes()
        if not self.storage.create(name, data) and (held := self.storage.read(name)) != data:
            witnesses = {self.commit(unit).keys for unit in self.committed() if page_of(unit) == (split, page)}
            if len(held) != len(data) or (witnesses and witnesses != {sha256(held)}):
                raise Corrupt(f"{self.root}/{name}: not the keys that were committed", hint=_MEND)
            old = np.frombuffer(held, np.uint8).reshape(-1, KEY_BYTES)
            row = int(np.argmax((old != keys).any(axis=1)))
            raise Mismatch(
                f"{self.root}: sample {row} of page {page} of {split} has key {keys[row].tobytes().hex()}, "
                f"but {old[row].tobytes().hex()} was captured before: the source has changed",
                hint="capture the changed source into another directory",
            )
        return sha256(data)

    def put_unit(
        self,
        plan: str,
        unit: str,
        rows: np.ndarray,
        format: str,
        keys: str,
        statistics: dict[str, Any] | None,
        provenance: dict[str, Any],
    ) -> Commit:
        """Write one unit's records (structured [N]) as a shard and commit it; the first commit wins."""
        data, segments = encode(format, rows)
        blocks = records.block_hashes(data)
        commit = Commit(
            plan=plan,
            unit=unit,
            object=records.root_hash(blocks) + SUFFIX[format],
            size=len(data),
            rows=len(rows),
            segments=segments,
            blocks=blocks,
            content=records.content_hash(rows),
            keys=keys,
            statistics=statistics,
            provenance=provenance,
        )
        self.storage.create(f"objects/{commit.object}", data)
        self.storage.create(f"commits/{unit}.json", records.seal(commit))
        return commit

    def put_manifest(self, manifest: Manifest, pages: list[Page]) -> str:
        """Seal: pages first, then the manifest, then the pointer to it."""
        data = records.dump(manifest)
        digest = sha256(data)
        for i, page in enumerate(pages):
            self.storage.create(f"manifests/{digest}/page-{i:06d}.json", records.dump(page))
        self.storage.create(f"manifests/{digest}/manifest.json", data)
        self.storage.replace("CURRENT", f"{digest}\n".encode())
        return digest

    def drop_plan(self, digest: str) -> None:
        """Forget a plan under which nothing was committed."""
        self.storage.remove(f"plans/{digest}.json")

    # Reading ----------------------------------------------------------------------------------------

    def plans(self) -> list[str]:
        return [Path(name).stem for name in self.storage.list("plans")]

    def plan(self, digest: str, kind: type[records.R]) -> records.R:
        name = f"plans/{_hex(digest, self.root)}.json"
        return records.load_hashed(kind, self.storage.read(name), digest, f"{self.root}/{name}")

    def committed(self) -> set[str]:
        """The names of the units that are committed."""
        return {name.removeprefix("commits/").removesuffix(".json") for name in self.storage.list("commits")}

    def commit(self, unit: str) -> Commit:
        name = f"commits/{unit}.json"
        commit = records.unseal(Commit, self.storage.read(name), f"{self.root}/{name}")
        if commit.unit != unit:
            raise Corrupt(f"{self.root}/{name}: it commits unit {commit.unit}")
        return commit

    def current(self) -> str | None:
        """The digest of the manifest in force, or None where nothing is sealed yet."""
        if not self.storage.exists("CURRENT"):
            return None
        text = self.storage.read("CURRENT").decode("latin-1")
        if not text.endswith("\n"):
            raise Corrupt(f"{self.root}/CURRENT: {text[:70]!r} is not a digest and the end of its line")
        return _hex(text[:-1], self.root / "CURRENT")

    def manifest(self, digest: str) -> Manifest:
        name = f"manifests/{digest}/manifest.json"
        if not self.storage.exists(name):
            raise Corrupt(f"{self.root}/CURRENT names manifest {digest}, and {name} is not there", hint=_MEND)
        return records.load_hashed(Manifest, self.storage.read(name), digest, f"{self.root}/{name}")

    def page(self, digest: str, manifest: Manifest, i: int) -> Page:
        name = f"manifests/{digest}/page-{i:06d}.json"
        return records.load_hashed(Page, self.storage.read(name), manifest.pages[i], f"{self.root}/{name}")

    def keys(self, split: str, page: int, digest: str) -> np.ndarray:
        """One page of the key table: uint8 [rows, 16]."""
        name = f"keys/{split}-{page:08d}"
        data = self.storage.read(name)
        if sha256(data) != digest:
            raise Corrupt(f"{self.root}/{name}: not the keys that were committed", hint=_MEND)
        return np.frombuffer(data, np.uint8).reshape(-1, KEY_BYTES)

    def object(self, commit: Commit) -> bytes:
        """A shard's bytes, every one of them checked against the commit's block hashes."""
        name = f"objects/{commit.object}"
        data = self.storage.read(name)
        if len(data) != commit.size:
            raise Corrupt(
                f"{self.root}/{name} (unit {commit.unit}): {len(data)} bytes, expected {commit.size}", hint=_MEND
            )
        found = records.block_hashes(data)
        if found != commit.blocks:
            bad = next(i for i, (a, b) in enumerate(zip(found, commit.blocks, strict=True)) if a != b)
            raise Corrupt(
                f"{self.root}/{name} (unit {commit.unit}): bytes {bad * records.BLOCK} to "
                f"{min(len(data), (bad + 1) * records.BLOCK)} are not those that were committed",
                hint=_MEND,
            )
        return data


_MEND = "restore the file from a copy of the cache, or capture into another directory"


_UNIT = re.compile(r"(\w+)-v\d+-(\d+)\..+")


def page_of(unit: str) -> tuple[str, int]:
    """The split and the key page that a unit belongs to, from its name."""
    match = _UNIT.fullmatch(unit)
    if match is None:
        raise Corrupt(f"{unit!r} is no name of a unit")
    return match[1], int(match[2])


def _hex(text: str, where: Path) -> str:
    if not _HEX.fullmatch(text):
        raise Corrupt(f"{where}: {text[:70]!r} is no digest")
    return text


def open_store(path: str | Path, *, create: bool = False) -> Store:
    """The store in a directory; UsageError if there is none, Mismatch if the directory is something else."""
    path = Path(path)
    store = Store(LocalStorage(path))
    if path.is_dir():
        # A first capture killed while it wrote its plan leaves plans/ and nothing else.
        fresh = create and {entry.name for entry in path.iterdir()} <= {"plans"}
        if not store.plans() and not fresh:
            raise Mismatch(
                f"{path} is no cache: it has no plans/",
                hint="give the --out directory of `ensemble-distill cache`"
                if not create
                else "choose an empty or a new directory",
            )
    elif path.exists():
        raise Mismatch(f"{path} is a file, expected a cache directory", hint="give a directory")
    elif not create:
        raise UsageError(f"{path}: no such directory", hint="make the cache with `ensemble-distill cache`")
    return store
