"""Initial State Tuning."""

from ssmtune.tuners.initial_state.cache import initial_state_from_text, starting_cache
from ssmtune.tuners.initial_state.config import InitialStateConfig
from ssmtune.tuners.initial_state.layer import InitialStateLayer
from ssmtune.tuners.initial_state.model import InitialStateModel
from ssmtune.tuners.initial_state.s0 import load_s0_states

__all__ = [
    "InitialStateConfig",
    "InitialStateLayer",
    "InitialStateModel",
    "initial_state_from_text",
    "load_s0_states",
    "starting_cache",
]
