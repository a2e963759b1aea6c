"""Opening a cache as the options of ``reading`` say."""

from __future__ import annotations

from ensemble_distill.cache.cache import Cache, open_cache


def opened(
    path: str,
    *,
    expect_digest: str | None,
    allow_partial: bool,
    memory: int | None,
    copies: str | None,
    copies_size: int,
    manifest: str | None,
) -> Cache:
    """The cache at a path or URL; sizes in MB, as people give them."""
    return open_cache(
        path,
        memory=memory and memory * 1_000_000,
        expect_digest=expect_digest,
        copies=copies,
        copies_size=copies_size * 1_000_000,
        allow_partial=allow_partial,
        manifest=manifest,
    )
