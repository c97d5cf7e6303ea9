"""State-offset Tuning."""

from ssmtune.tuners.state_offset.config import StateOffsetConfig
from ssmtune.tuners.state_offset.layer import StateOffsetLayer
from ssmtune.tuners.state_offset.model import StateOffsetModel

__all__ = ["StateOffsetConfig", "StateOffsetLayer", "StateOffsetModel"]
