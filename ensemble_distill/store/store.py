"""One cache directory: plans, key pages, shards, commits, manifests, and the order in which they become real.

    cache/
      PLAN                       create-once: the digest of the plan that the cache is captured under
      plans/<digest>.json        the plan
      calibrations/<digest>.json   temperatures fitted before the plan that names them
      keys/<split>-<n>           create-once pages of the key table
      objects/<root>.h5          immutable shards, named by content (.parquet likewise)
      commits/<unit>.json        create-once: the only commit point
      pages/<digest>.json        up to 4096 commits of a sealed cache, in the order of the units
      manifests/<digest>.json    what was sealed
      CURRENT                    the digest of the manifest in force
      leases/<item>              who is at work on what; only saves work

A unit exists when its commit does. Its shard and key page were durable before, so a commit never names
what is not there; whatever has no commit may be dropped and made again.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ensemble_distill.errors import Corrupt, Mismatch, StorageError, Unsafe, UsageError
from ensemble_distill.fingerprint import KEY_BYTES, sha256
from ensemble_distill.formats import SUFFIX, encode
from ensemble_distill.frozen import Config
from ensemble_distill.store import records
from ensemble_distill.store.local import LocalStorage
from ensemble_distill.store.records import Commit, Manifest, Page
from ensemble_distill.store.storage import Storage

MEND = "mend it with `ensemble-distill repair`, or restore the file from a copy of the cache"

# In place of a digest: whatever stands there now.
NOW = "now"

_HEX = re.compile(r"[0-9a-f]{64}")

# What stands in place of a page of keys that was damaged: its length is that of no page.
LOST = len("lost ") + 64 + len("\n")
_LOST = re.compile(rb"lost ([0-9a-f]{64})\n")


class Store:
    """Reads and writes one cache. Knows units by name; what they mean is the plan's business."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.root = storage.root
        self._plan: tuple[str, Config] | None = None  # the last one: it is read often, and may be megabytes

    # Writing ----------------------------------------------------------------------------------------

    def put_plan(self, plan: Config, parent: str | None = None) -> str:
        """Make this the plan of the cache unless there is one; the digest of the plan that is.

        ``parent``: the digest of the plan that it grows out of, whose place it takes.
        """
        data = _bounded(self.root, "plan", records.dump(plan), records.MAX_PLAN)
        digest = sha256(data)
        self._put(f"plans/{digest}.json", data)
        if not self.storage.create("PLAN", f"{digest}\n".encode()):
            if parent is not None:
                self.storage.swap("PLAN", f"{parent}\n".encode(), f"{digest}\n".encode())
            return self.plan_digest() or digest
        return digest

    def put_calibration(self, calibration: Config) -> str:
        """Commit what a plan may name; its digest."""
        data = records.dump(calibration)
        digest = sha256(data)
        self._put(f"calibrations/{digest}.json", data)
        return digest

    def drop_plan(self, digest: str) -> None:
        """Forget a plan under which nothing was committed."""
        self.storage.remove("PLAN")
        self.storage.remove(f"plans/{digest}.json")

    def put_keys(
        self, split: str, page: int, keys: np.ndarray, committed: Callable[[], str | None] = lambda: None
    ) -> str:
        """Commit one page of the key table (uint8 [rows, 16]); its SHA-256. Mismatch if another content stands there.

        committed: says the SHA-256 that it has to have, as a commit has it, for where the page itself is lost.
        """
        name, data = f"keys/{split}-{page:08d}", keys.tobytes()
        if committed() not in (None, sha256(data)) and self.storage.size(name) is None:
            raise _other_samples(f"{self.root}/{name} is lost")
        if self.storage.create(name, data):
            return sha256(data)
        if self.storage.size(name) not in (len(data), LOST):
            self._replace_keys(split, page, data)
        held = self.storage.read(name, max(len(data), LOST))
        if (expected := _expected(held)) is not None:
            if sha256(data) != expected:
                raise _other_samples(f"{self.root}/{name} was damaged")
            self.storage.replace(name, data)
        elif held != data:
            witnesses = self._witnesses(split, page)
            if len(held) != len(data) or (witnesses and witnesses != {sha256(held)}):
                raise Corrupt(f"{self.root}/{name}: not the keys that were committed", hint=MEND)
            old = np.frombuffer(held, np.uint8).reshape(-1, KEY_BYTES)
            row = int(np.argmax((old != keys).any(axis=1)))
            raise Mismatch(
                f"{self.root}: sample {row} of page {page} of {split} has key {keys[row].tobytes().hex()}, "
                f"but {old[row].tobytes().hex()} was captured before: the source has changed",
                hint="capture the changed source into another directory; if it has not changed, that page is damaged: "
                "`ensemble-distill repair` removes it",
            )
        return sha256(data)

    def _replace_keys(self, split: str, page: int, data: bytes) -> None:
        """Write a page of keys over one of another size, as a kill or another size of units left it: Corrupt if a
        commit names it."""
        name = f"keys/{split}-{page:08d}"
        if self._witnesses(split, page):
            raise Corrupt(f"{self.root}/{name}: not the keys that were committed", hint=MEND)
        self.storage.replace(name, data)

    def _witnesses(self, split: str, page: int) -> set[str]:
        """The digests that commits of this page say its keys have."""
        return {self.commit(unit).keys for unit in self.committed() if page_of(unit) == (split, page)}

    def held_keys(self, split: str, page: int, rows: int) -> np.ndarray | None:
        """A page of keys as it stands, uint8 [rows, 16], not compared with a commit; None where none is whole."""
        name = f"keys/{split}-{page:08d}"
        if self.storage.size(name) != rows * KEY_BYTES:
            return None
        return np.frombuffer(self.storage.read(name, rows * KEY_BYTES), np.uint8).reshape(-1, KEY_BYTES)

    def lose_keys(self, split: str, page: int, digest: str) -> None:
        """In place of a damaged page of the key table: the SHA-256 of what has to stand there again; the first one."""
        if not self.says_lost(name := f"keys/{split}-{page:08d}"):
            self.storage.replace(name, f"lost {digest}\n".encode())

    def says_lost(self, name: str) -> bool:
        """Whether what stands at the name of a page of keys is what ``lose_keys`` left."""
        return self.storage.size(name) == LOST and _expected(self.storage.read(name, LOST)) is not None

    def put_unit(
        self,
        plan: str,
        unit: str,
        rows: np.ndarray,
        format: str,
        keys: str,
        statistics: dict[str, Any] | None,
        provenance: dict[str, Any],
        tokens: np.ndarray | None = None,
    ) -> tuple[Commit, bool]:
        """Write one unit's records (structured [N]), and the tokens of a ragged feature, as a shard and commit it.

        The first commit wins: False says that another writer's stands, which may be of another shard.
        """
        parts, segments = encode(format, rows, tokens)
        with ThreadPoolExecutor(1) as beside:  # two hashes are most of what a commit costs beside its writes
            content = beside.submit(records.content_hash, rows, tokens)
            blocks = records.block_hashes(*parts)
        commit = Commit(
            plan=plan,
            unit=unit,
            object=records.root_hash(blocks) + SUFFIX[format],
            size=sum(map(len, parts)),
            rows=len(rows),
            segments=segments,
            blocks=blocks,
            content=content.result(),
            keys=keys,
            statistics=statistics,
            provenance=provenance,
        )
        self._put(f"objects/{commit.object}", *parts)
        return commit, self.storage.create(f"commits/{unit}.json", records.seal(commit))

    def put_page(self, bodies: list[bytes]) -> str:
        """A page of a manifest, from its commits' bodies; its digest."""
        data = records.page(bodies)
        digest = sha256(data)
        self._put(f"pages/{digest}.json", data)
        return digest

    def put_manifest(self, manifest: Manifest, parent: str | None = NOW) -> str:
        """Seal: the manifest, whose pages are written, and then the pointer to it.

        parent: the digest of the manifest that was in force (None: there was none) when the caller began to read
        what it seals; as it is now, where nothing can have changed. Mismatch if another came into force since.
        """
        parent = self.current() if parent == NOW else parent
        if (unit := next(self.committed(), None)) is not None:
            # A writer may have died between the link and the fsync of a commit that others then found: to create it
            # again makes the directory durable, and with it all of them.
            self.storage.create(f"commits/{unit}.json", self.storage.read(f"commits/{unit}.json", records.MAX_COMMIT))
        data = _bounded(self.root, "manifest", records.dump(manifest), records.MAX_MANIFEST)
        digest = sha256(data)
        self._put(f"manifests/{digest}.json", data)
        before = None if parent is None else f"{parent}\n".encode()
        if not self.storage.swap("CURRENT", before, f"{digest}\n".encode()):
            raise Mismatch(
                f"{self.root} was sealed by somebody else meanwhile",
                hint="run the same command again: it seals what is there now",
            )
        return digest

    def put_copy(self, unit: str, commit: Commit, data: bytes) -> bool:
        """Commit a unit of another cache: its shard, whose hashes were checked, and its commit."""
        self._put(f"objects/{commit.object}", data)
        return self.storage.create(f"commits/{unit}.json", records.seal(commit))

    def _put(self, name: str, *parts: bytes | memoryview) -> None:
        """Create what is named by its content; where it stands already, it may have been damaged since."""
        if not self.storage.create(name, *parts):
            data = b"".join(parts)
            try:
                whole = self.storage.read(name, len(data)) == data
            except (Corrupt, Unsafe):
                whole = False
            if not whole:
                self.storage.replace(name, data)

    # Reading ----------------------------------------------------------------------------------------

    def plan_digest(self) -> str | None:
        """The digest of the plan that the cache is captured under, or None before there is one."""
        return self._pointer("PLAN")

    def current(self) -> str | None:
        """The digest of the manifest in force, or None where nothing is sealed yet."""
        return self._pointer("CURRENT")

    def plan(self, digest: str, kind: type[records.R]) -> records.R:
        """A plan; its bytes are read and hashed each time, and parsed where they are not those of the last one."""
        name, held = f"plans/{digest}.json", self._plan
        data = self.storage.read(name, records.MAX_PLAN)
        if held is not None and held[0] == digest == sha256(data) and isinstance(held[1], kind):
            return held[1]
        plan = records.load_hashed(kind, data, digest, f"{self.root}/{name}")
        self._plan = digest, plan
        return plan

    def calibration(self, digest: str, kind: type[records.R]) -> records.R:
        name = f"calibrations/{digest}.json"
        return records.load_hashed(kind, self.storage.read(name, records.MAX_PLAN), digest, f"{self.root}/{name}")

    def committed(self) -> Iterator[str]:
        """The names of the units that are committed, in any order; what is no ``.json`` is no commit."""
        for name in self.storage.list("commits"):
            if name.endswith(".json"):
                yield unit_of(name)

    def is_committed(self, unit: str) -> bool:
        return self.storage.size(f"commits/{unit}.json") is not None

    def commit_body(self, unit: str) -> bytes:
        """A commit's JSON, checked against the hash in front of it."""
        name = f"commits/{unit}.json"
        return records.unsealed(self.storage.read(name, records.MAX_COMMIT), f"{self.root}/{name}")

    def commit(self, unit: str) -> Commit:
        name = f"commits/{unit}.json"
        commit = records.load(Commit, self.commit_body(unit), f"{self.root}/{name}")
        if commit.unit != unit:
            raise Corrupt(f"{self.root}/{name}: it commits unit {commit.unit[:200]}")
        return commit

    def manifest(self, digest: str) -> Manifest:
        name = f"manifests/{digest}.json"
        if self.storage.size(name) is None:
            raise Corrupt(f"{self.root}/CURRENT names manifest {digest}, and {name} is not there", hint=MEND)
        data = self.storage.read(name, records.MAX_MANIFEST)
        return records.load_hashed(Manifest, data, digest, f"{self.root}/{name}")

    def page(self, digest: str, at_most: int) -> Page:
        """A page of a manifest, of ``at_most`` bytes."""
        name = f"pages/{digest}.json"
        return records.load_hashed(Page, self.storage.read(name, at_most), digest, f"{self.root}/{name}")

    def keys(self, split: str, page: int, digest: str, rows: int) -> np.ndarray:
        """One page of the key table: uint8 [rows, 16]."""
        name = f"keys/{split}-{page:08d}"
        data = self.storage.read(name, max(rows * KEY_BYTES, LOST))
        if sha256(data) != digest or len(data) != rows * KEY_BYTES:
            raise Corrupt(f"{self.root}/{name}: not the keys that were committed", hint=MEND)
        return np.frombuffer(data, np.uint8).reshape(-1, KEY_BYTES)

    def object(self, commit: Commit) -> bytes:
        """A shard's bytes, every one of them checked against the commit's block hashes."""
        name = f"objects/{commit.object}"
        where = f"{self.root}/{name} (unit {commit.unit})"
        if len(commit.blocks) != -(-commit.size // records.BLOCK):
            raise Corrupt(f"{where}: {len(commit.blocks)} block hashes for {commit.size} bytes")
        if records.root_hash(commit.blocks) != commit.object.partition(".")[0]:
            raise Corrupt(f"{where}: its name is not the root of its block hashes")
        data = self.storage.read(name, commit.size + records.BLOCK)  # a little more is damage, much more an attack
        if len(data) != commit.size:
            raise Corrupt(f"{where}: {len(data)} bytes, expected {commit.size}", hint=MEND)
        found = records.block_hashes(data)
        if found != commit.blocks:
            bad = next(i for i, (a, b) in enumerate(zip(found, commit.blocks, strict=True)) if a != b)
            first, last = bad * records.BLOCK, min(len(data), (bad + 1) * records.BLOCK)
            raise Corrupt(f"{where}: bytes {first} to {last} are not those that were committed", hint=MEND)
        return data

    def _pointer(self, name: str) -> str | None:
        if self.storage.size(name) is None:
            with contextlib.suppress(Corrupt):  # it is not there; what is no plain file is unsafe, and not the same
                self.storage.read(name, 4096)
            return None
        text = self.storage.read(name, 4096).decode("latin-1")
        if not text.endswith("\n") or not _HEX.fullmatch(text[:-1]):
            raise Corrupt(f"{self.root}/{name}: {text[:70]!r} is not a digest and the end of its line", hint=MEND)
        return text[:-1]


def _other_samples(problem: str) -> Mismatch:
    return Mismatch(
        f"{problem}, and the keys of these samples are not those that it held: the source has changed",
        hint="restore the source, or capture it as it is now into another directory",
    )


def _bounded(root: str, what: str, data: bytes, most: int) -> bytes:
    """The bytes of a record; UsageError, before it is written, for one that is larger than what is read."""
    if len(data) > most:
        raise UsageError(
            f"{root}: its {what} would take {len(data)} bytes, at most {most} are read",
            hint="capture the splits into several caches, or use fewer members or shorter names",
        )
    return data


def unit_of(name: str) -> str:
    """The unit whose commit has this name; what is no commit is its own name, which is no unit's."""
    return name.removeprefix("commits/").removesuffix(".json") if name.endswith(".json") else name


_UNIT = re.compile(r"(\w+)-v\d+-(\d+)\..+", re.ASCII)


def _expected(held: bytes) -> str | None:
    """The SHA-256 that keys must have to take the place of a damaged page, if that is what stands there."""
    match = _LOST.fullmatch(held)
    return None if match is None else match[1].decode()


def page_of(unit: str) -> tuple[str, int]:
    """The split and the key page that a unit belongs to, from its name."""
    match = _UNIT.fullmatch(unit)
    if match is None:
        raise Corrupt(f"{unit[:200]!r} is no name of a unit")
    return match[1], int(match[2])


def is_url(place: str | Path) -> bool:
    return "://" in str(place)


def location(place: str) -> str:
    """Where a cache is, from any working directory."""
    return place if is_url(place) else str(Path(place).absolute())


def open_storage(place: str | Path) -> Storage:
    """A directory, or a bucket where ``place`` is a URL (s3://…, gs://…)."""
    if is_url(place):
        from ensemble_distill.store.remote import RemoteStorage

        return RemoteStorage(str(place))
    return LocalStorage(place)


def open_store(place: str | Path, *, create: bool = False, mend: bool = False) -> Store:
    """The store at a place; UsageError if there is none, Mismatch if something else is there, Corrupt if PLAN is lost.

    ``mend``: for those who put PLAN back.
    """
    store = Store(open_storage(place))
    if isinstance(store.storage, LocalStorage):
        _check_directory(store.storage.path, create, mend)
    elif not mend and store.plan_digest() is None:
        if store.current() is not None or next(store.committed(), None) is not None:
            raise _lost(store.root)
        if not create:
            raise UsageError(f"{place} holds no cache: there is no PLAN", hint="make it with `ensemble-distill cache`")
    return store


def _lost(root: str | Path) -> Corrupt:
    return Corrupt(f"{root}/PLAN is lost", hint=f"`ensemble-distill repair {root}` puts it back")


def trust(store: Store, expected: str | None) -> str | None:
    """The digest of the manifest in force, or None; Mismatch unless it is the one that the caller trusts (None: any).

    To be used from here on: CURRENT may name another when it is read again.
    """
    digest = store.current()
    if expected is not None and digest != expected:
        raise Mismatch(
            f"{store.root}: its manifest digest is {digest}, expected {expected}",
            hint="this is not the cache that you pinned: look at it with `ensemble-distill inspect`",
        )
    return digest


def _check_directory(path: Path, create: bool, mend: bool) -> None:
    if path.is_dir():
        try:
            held = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")}
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}", hint="check its permissions") from error
        # A first capture or copy killed while it wrote its plan leaves plans/, calibrations/, leases/ and nothing else.
        enough = mend and held & {"plans", "commits", "CURRENT"}
        if "PLAN" not in held and not enough and not (create and held <= {"plans", "calibrations", "leases"}):
            if {"commits", "objects"} <= held or "CURRENT" in held:
                raise _lost(path)
            raise Mismatch(
                f"{path} is no cache: it has no PLAN",
                hint="choose an empty or a new directory"
                if create
                else "give the --out directory of `ensemble-distill cache`",
            )
    elif path.exists():
        raise Mismatch(f"{path} is a file, expected a cache directory", hint="give a directory")
    elif not create:
        raise UsageError(f"{path}: no such directory", hint="make the cache with `ensemble-distill cache`")
