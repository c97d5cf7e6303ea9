from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from peft.config import PeftConfig

from ssmtune.tuners.adapter_file import check_readable
from ssmtune.tuners.registration import add_peft_type


@dataclass
class WeightSubsetConfig(PeftConfig):
    r"""Config for training some of a model's own tensors, such as its biases, and storing these alone.

    The tensors keep the type of the model. In bfloat16 updates the size of a usual learning rate round to nothing:
    `ssmtune train` therefore updates float32 copies (`ssmtune.master_weights.MasterAdamW`, for any loop).

    Args:
        parameters: regular expressions; a parameter is trained if one is found anywhere in its name, as `\.bias$` in
            `backbone.layers.0.mixer.conv1d.bias`.

    Raises:
        ValueError: there is no expression, or one is not valid.
    """

    parameters: list[str] = field(
        default_factory=list,
        metadata={"help": "Regular expressions; a parameter is trained if one is found anywhere in its name."},
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = add_peft_type("WEIGHT_SUBSET")
        if isinstance(self.parameters, str):
            self.parameters = [self.parameters]
        try:
            expressions = [re.compile(expression) for expression in self.parameters]
        except re.error as error:
            raise ValueError(
                f"parameters={self.parameters!r} holds what is not a regular expression: {error}.\n"
                r"  Each one is searched for in the names of the parameters, as in '\.bias$'."
            ) from None
        if not expressions:
            raise ValueError(
                "parameters is empty, so that nothing would be trained.\n"
                r"  Give regular expressions for the names of the parameters, as in ['\.bias$']."
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder=None, **kwargs):
        check_readable(Path(pretrained_model_name_or_path, subfolder or ""))
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    @property
    def is_adaption_prompt(self) -> bool:
        """True: then peft leaves switching off to the tuner, rather than to layers, of which this has none."""
        return True
