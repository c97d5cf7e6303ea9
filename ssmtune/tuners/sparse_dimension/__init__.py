"""Sparse dimension tuning."""

from ssmtune.tuners.sparse_dimension.config import SparseDimensionConfig
from ssmtune.tuners.sparse_dimension.layer import SparseDimensionLayer
from ssmtune.tuners.sparse_dimension.model import SparseDimensionModel
from ssmtune.tuners.sparse_dimension.selection import choose_dimensions

__all__ = ["SparseDimensionConfig", "SparseDimensionLayer", "SparseDimensionModel", "choose_dimensions"]
