"""Codecs: targets to named arrays and back, each with a declared error."""
