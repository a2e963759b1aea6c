"""Relations between samples: distances and angles (Park et al. 2019), similarities (Tung & Mori 2019).

    ensemble-distill cache pipelines/relational.py --out caches/all --limit 20000
    ensemble-distill train pipelines/relational.py --cache caches/all --out runs/relational --limit 20000
    ensemble-distill train pipelines/relational.py:similarity --cache caches/all --out runs/similarity --limit 20000

The four teachers' pooled features stand side by side: a relation does not ask how wide a feature is.
"""

import ensemble_distill as ed
from parts.one_cache import SOFT, cache, data, every, taught

__all__ = ["cache", "contrastive", "data", "similarity", "train"]

POOLS = {"tap": every("pool"), "combine": "concat", "module": "pool"}


def train() -> ed.TrainConfig:
    return taught(SOFT | {"relations": ed.Relational(**POOLS, distance=1, angle=2, weight=25)})


def similarity() -> ed.TrainConfig:
    return taught(SOFT | {"similarity": ed.SimilarityPreserving(**POOLS, weight=3000)})


def contrastive() -> ed.TrainConfig:
    """CRD (Tian et al. 2020), with the other rows of a batch as negatives."""
    return taught(SOFT | {"contrastive": ed.Contrastive(**POOLS, weight=0.1)})
