from __future__ import annotations

from ssmtune.mixers import StateInputs
from ssmtune.tuners.state_tuner import StateTunerLayer


class InitialStateLayer(StateTunerLayer):
    """The initial states (dim, dstate) of one mixer."""

    prefix = "initial_state_"
    adapter_layer_names = ("initial_state_h", "initial_state_A", "initial_state_B")

    def state_inputs(self) -> StateInputs:
        return StateInputs(initial_state=self.active_sum(self.matrix))
