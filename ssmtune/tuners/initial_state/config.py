from __future__ import annotations

from dataclasses import dataclass

from ssmtune.tuners.registration import add_peft_type
from ssmtune.tuners.state_tuner import StateTunerConfig


@dataclass
class InitialStateConfig(StateTunerConfig):
    """Config of Initial State Tuning: a trained state that every sequence starts from.

        h_0 = initial_state       (dim, dstate), or B A of a rank; zero in the pre-trained model

    A continued sequence (a cache, a step of generation) goes on from its own state, not from this one.

    Args:
        rank: None for a whole matrix, or the rank of a low-rank one.
        alpha: scales the low-rank product by alpha / rank.
        init_weights: start at zero.
        target_modules: mixers to adapt; all if None.
        exclude_modules: mixers to leave alone.
        layers_to_transform: layers to adapt; all if None.
        layers_pattern: where layers_to_transform counts.
        modules_to_save: other modules trained in full.

    Raises:
        ValueError: a value is out of range, or does not go with another.
    """

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = add_peft_type("INITIAL_STATE")
