"""Initial State Tuning."""

from ssmtune.tuners.initial_state.cache import initial_state_from_text, starting_cache
from ssmtune.tuners.initial_state.config import InitialStateConfig
from ssmtune.tuners.initial_state.layer import InitialStateLayer
from ssmtune.tuners.initial_state.model import InitialStateModel

__all__ = [
    "InitialStateConfig",
    "InitialStateLayer",
    "InitialStateModel",
    "initial_state_from_text",
    "starting_cache",
]
