from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ssmtune.methods.needs import Need, nothing

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Args:
        name: what configurations and the command line call it.
        title: what tables and pictures call it.
        default_lr: the peak learning rate with AdamW.
        kind: what is trained: added states, virtual tokens, changes to weights, or every weight. Virtual tokens start
            at random; every other kind starts as the base model.
        apply: makes a model ready to be trained, given the options that are not left at their defaults.
        options: the keys of MethodConfig that mean something to it.
        needs: of a model; says why one cannot be trained so, or None if it can.
    """

    name: str
    title: str
    default_lr: float
    kind: Literal["state", "prompt", "weights", "full"]
    apply: Callable[[nn.Module, Mapping[str, Any]], nn.Module]
    options: tuple[str, ...] = ()
    needs: Need = nothing
