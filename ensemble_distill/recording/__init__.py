"""Stage 1: run the ensemble once over the sources and commit what it said."""
