"""Opening a cache as the options of ``reading`` say."""

from __future__ import annotations

from ensemble_distill.cache.cache import Cache
from ensemble_distill.cache.opening import open_cache
from ensemble_distill.cli.options import Reading


def opened(path: str, reading: Reading) -> Cache:
    """The cache at a path or URL."""
    return open_cache(
        path,
        memory=reading.memory and reading.memory * 1_000_000,
        expect_digest=reading.expect_digest,
        copies=reading.copies,
        copies_size=reading.copies_size * 1_000_000,
        allow_partial=reading.allow_partial,
        manifest=reading.manifest,
    )
