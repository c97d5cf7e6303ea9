from __future__ import annotations

from dataclasses import dataclass, field

from ssmtune.tuners.registration import add_peft_type
from ssmtune.tuners.state_config import StateTunerConfig


@dataclass
class StateOffsetConfig(StateTunerConfig):
    """Config of State-offset Tuning: a trained offset, read at every step, carried by none.

        target "h":  y_t = C_t (h_t + offset) + D u_t         offset (dim, dstate), or B A of a rank
        target "y":  y_t = C_t h_t + D u_t + offset           offset (dim,)

    Args:
        target: "h" or "y".
        virtual_tokens: None, or how many virtual tokens per mixer to train in place of the offset (iterative suffix
            tuning): what they leave behind is the offset. They are folded into it when the adapter is saved. With
            `reparametrize` they go through an MLP. Only with target "h".
        rank: None for a whole matrix, or the rank of a low-rank one. Only with target "h".
        alpha: scales the low-rank product by alpha / rank.
        dropout: share of the rank terms of the low-rank product that a training step leaves out.
        reparametrize: hidden units of an MLP to train the tensor through; None trains the tensor itself.
        init_weights: start at zero.
        target_modules: mixers to adapt; all if None.
        exclude_modules: mixers to leave alone.
        layers_to_transform: layers to adapt; all if None.
        layers_pattern: where layers_to_transform counts.
        modules_to_save: other modules trained in full.

    Raises:
        ValueError: a value is unknown, out of range, or does not go with another.

    Source: Kang et al., State-offset Tuning: State-based Parameter-Efficient Fine-Tuning for State Space Models, 2025.
    """

    target: str = field(
        default="h",
        metadata={"help": "h adds a (dim, dstate) offset to the state where it is read, y a (dim,) one to the output."},
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = add_peft_type("STATE_OFFSET")
        if self.target not in ("h", "y"):
            raise ValueError(
                f"target must be 'h' or 'y', got {self.target!r}.\n"
                "  'h' adds an offset to the state where it is read, 'y' to the output of the scan."
            )
        if self.target == "y" and self.virtual_tokens is not None:
            raise ValueError(
                f"virtual_tokens={self.virtual_tokens} does not go with target 'y': what tokens leave is a state.\n"
                "  Leave virtual_tokens out, or use target 'h'."
            )
        if self.target == "y" and self.rank is not None:
            raise ValueError(
                f"rank={self.rank} does not go with target 'y': that offset is a vector, which has no rank.\n"
                "  Leave rank out, or use target 'h'."
            )

    @property
    def title(self) -> str:
        return f"State-offset Tuning ({self.target})"

    @property
    def formula(self) -> str:
        return "y_t = C_t (h_t + offset) + D u_t" if self.target == "h" else "y_t = C_t h_t + D u_t + offset"

    @property
    def card_tags(self) -> list[str]:
        return ["state-offset-tuning"]

    def card_settings(self) -> dict[str, str]:
        settings = super().card_settings()
        if self.target == "y":
            del settings["rank"]
        return {"target": f"`{self.target}`", **settings}
