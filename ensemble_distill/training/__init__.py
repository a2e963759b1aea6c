"""Stage 2: train a student from a cache. Imports nothing of ``ensemble`` or ``recording``."""
