"""Commit protocol and integrity, over a storage. No torch: a cache can be checked without it."""
