"""Parameter-efficient fine-tuning of state-space models.

Importing ssmtune registers its methods with peft, so that `PeftModel.from_pretrained` finds them. The public names
below are imported when they are first used.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path

__version__ = "0.1.0"

_HOME = {
    "selective_scan": "ops",
    "selective_state_update": "ops",
    "ssd_scan": "ops",
    "gated_delta_rule": "ops",
    "causal_conv1d": "ops",
    "causal_conv1d_update": "ops",
    "backend": "ops",
    "available_backends": "ops",
    "patch": "mixers",
    "unpatch": "mixers",
    "StateOffsetConfig": "tuners",
    "InitialStateConfig": "tuners",
    "AdditionalScanConfig": "tuners",
    "SparseDimensionConfig": "tuners",
    "WeightSubsetConfig": "tuners",
    "load_adapters": "tuners.several",
    "initial_state_from_text": "tuners.initial_state",
    "load_s0_states": "tuners.initial_state",
    "starting_cache": "tuners.initial_state",
    "from_mamba_ssm": "conversion",
    "to_mamba_ssm": "conversion",
    "shared_prefix_logits": "prefix_sharing",
    "dpo_loss": "dpo",
    "PreferenceCollator": "dpo",
    "chunked_backward": "long_inputs",
    "check_gradients": "gradcheck",
    "ConfigError": "config",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'ssmtune' has no attribute {name!r}")
    value = getattr(import_module(f"ssmtune.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


def _is_command_line() -> bool:
    """Whether this process is `ssmtune ...` or `python -m ssmtune ...`, whose verbs import what they need."""
    if Path(sys.argv[0]).stem == "ssmtune":
        return True
    # while the module of -m is looked up, sys.argv[0] is "-m"
    return sys.argv[0] == "-m" and ("-m", "ssmtune") in pairwise(sys.orig_argv)


# In a checkout that is not installed the Triton kernels lie beside this package, not in it.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "triton_kernels").is_dir() and (_checkout / "setup.py").is_file():
    __path__.append(str(_checkout))

if os.environ.get("SSMTUNE_LAZY", "0") in ("", "0") and not _is_command_line():
    import_module("ssmtune.tuners")
