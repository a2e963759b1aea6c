"""Codecs at work: what members said to named arrays and back, each with the error that codec.py declares."""
