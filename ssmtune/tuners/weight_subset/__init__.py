"""Training some of a model's own tensors, stored as an adapter."""

from ssmtune.tuners.weight_subset.config import WeightSubsetConfig
from ssmtune.tuners.weight_subset.model import WeightSubsetModel

__all__ = ["WeightSubsetConfig", "WeightSubsetModel"]
