"""Fine-tuning methods as peft tuners, registered with peft when this package is imported."""

from ssmtune.tuners.additional_scan import AdditionalScanConfig, AdditionalScanLayer, AdditionalScanModel
from ssmtune.tuners.initial_state import InitialStateConfig, InitialStateLayer, InitialStateModel
from ssmtune.tuners.registration import register
from ssmtune.tuners.sparse_dimension import SparseDimensionConfig, SparseDimensionLayer, SparseDimensionModel
from ssmtune.tuners.state_offset import StateOffsetConfig, StateOffsetLayer, StateOffsetModel
from ssmtune.tuners.transformers_loading import check_what_transformers_loads
from ssmtune.tuners.weight_subset import WeightSubsetConfig, WeightSubsetModel

register("state_offset", StateOffsetConfig, StateOffsetModel)
register("initial_state", InitialStateConfig, InitialStateModel)
register("weight_subset", WeightSubsetConfig, WeightSubsetModel)
register("additional_scan", AdditionalScanConfig, AdditionalScanModel)
register("sparse_dimension", SparseDimensionConfig, SparseDimensionModel)
check_what_transformers_loads()

__all__ = [
    "AdditionalScanConfig",
    "AdditionalScanLayer",
    "AdditionalScanModel",
    "InitialStateConfig",
    "InitialStateLayer",
    "InitialStateModel",
    "SparseDimensionConfig",
    "SparseDimensionLayer",
    "SparseDimensionModel",
    "StateOffsetConfig",
    "StateOffsetLayer",
    "StateOffsetModel",
    "WeightSubsetConfig",
    "WeightSubsetModel",
]
