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
        virtual_tokens: they leave the offset behind (iterative suffix tuning). Only with target "h".
        rank: only with target "h".

    The other fields are those of `StateTunerConfig`.

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
