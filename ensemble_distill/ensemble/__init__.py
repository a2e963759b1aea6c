"""Ensembles: members loaded, run together, and combined."""
