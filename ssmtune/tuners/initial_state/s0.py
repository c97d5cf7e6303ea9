"""States that the package s0-tuning has saved, as adapters of Initial State Tuning."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from ssmtune.mixers import find_mixers, patched_class, state_shape
from ssmtune.reasons import reading_files_of
from ssmtune.tuners.initial_state.config import InitialStateConfig
from ssmtune.tuners.initial_state.model import InitialStateModel

_FILES = ("states.safetensors", "states.pt")
_SCALES = {"mamba2": 0.65, "gated_delta_net": 0.07}
"""What s0-tuning takes for alpha where none was set, by what meta.json calls the architecture."""


def load_s0_states(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> PeftModel:
    """Load states that `S0Trainer.save` of s0-tuning 0.1 wrote, as an adapter of Initial State Tuning.

        h_0 = alpha S_0, or alpha S_0 / |S_0| where S0Config.normalize was set

    The states go into the adapter as they were trained, and alpha is its `inference_scale`. So in evaluation mode the
    model is what `S0Trainer.activate` makes of it, and training goes on from where it was. S0 tuning is described in
    https://arxiv.org/abs/2604.01168.

    Args:
        model: the model the states were trained on, or a `PeftModel` of Initial State Tuning around it.
        folder: what was saved: states.safetensors (or states.pt), and config.json and meta.json if they are there.
        adapter_name: the name of the new adapter.

    Returns:
        The model with the adapter, in evaluation mode.

    Raises:
        ValueError: the folder is no such one, or its states do not fit the model.

    Example:
        >>> base = AutoModelForCausalLM.from_pretrained("tiiuae/Falcon-H1-7B-Instruct")
        >>> model = ssmtune.load_s0_states(base, "my_s0_states")
        >>> model.save_pretrained("adapter")
    """
    states, settings, kind = _read(Path(folder))
    if kind not in _SCALES:
        raise ValueError(
            f"the states in {folder} are of the architecture {kind!r}, which is not known here.\n"
            f"  Those of {' and '.join(_SCALES)} are. Train others anew, by InitialStateConfig."
        )
    numbers = ((re.search(r"\.(\d+)\.", name), mixer) for name, mixer in find_mixers(model))
    mixers = {int(number[1]): mixer for number, mixer in numbers if number}
    _check_fit(folder, states, {layer: _stored_shape(mixer) for layer, mixer in mixers.items()})
    scale = settings.get("alpha")
    config = InitialStateConfig(
        task_type="CAUSAL_LM",
        inference_scale=_SCALES[kind] if scale is None else scale,
        layers_to_transform=None if states.keys() == mixers.keys() else sorted(states),
    )
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
        model.set_adapter(adapter_name)
    else:
        model = get_peft_model(model, config, adapter_name=adapter_name)
    for layer, state in states.items():
        adapter = mixers[layer]._modules[InitialStateModel.child_name]
        if settings.get("normalize") and state.norm() > 0:
            state = state / state.norm()
        with torch.no_grad():
            adapter.tensors("h")[adapter_name].copy_(mixers[layer].as_cached(state).flatten(0, -2))
    return model.eval()


def _read(folder: Path) -> tuple[dict[int, Tensor], dict[str, Any], str]:
    """The states by layer, the settings of their training, and the kind of their mixers."""
    file = next((folder / name for name in _FILES if (folder / name).is_file()), folder / _FILES[0])
    needs = f"{' or '.join(_FILES)}, with a tensor for each layer alone"
    remedy = "Pass the folder that S0Trainer.save wrote; save it again with s0-tuning 0.1 if it is older."
    with reading_files_of("states of s0-tuning", folder, needs, remedy):
        settings, meta = (
            json.loads(path.read_text(encoding="utf-8")) if (path := folder / name).is_file() else {}
            for name in ("config.json", "meta.json")
        )
        stored = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
        return {int(layer): state.float() for layer, state in stored.items()}, settings, meta.get("arch", "mamba2")


def _stored_shape(mixer: nn.Module) -> tuple[int, ...]:
    """The axes of a state as s0-tuning has it, which are those of a cache without the batch."""
    return tuple(patched_class(mixer).as_cached(torch.empty(state_shape(mixer), device="meta")).shape)


def _check_fit(folder: str | Path, states: dict[int, Tensor], shapes: dict[int, tuple[int, ...]]) -> None:
    odd = next((layer for layer, state in states.items() if shapes.get(layer) != tuple(state.shape)), None)
    if odd is not None or not states:
        found = f"{tuple(states[odd].shape)} for layer {odd}" if states else "none at all"
        needed = f"{shapes[odd]} there" if odd in shapes else f"mixers in the layers {sorted(shapes)}"
        raise ValueError(
            f"the states in {folder} do not fit: {found}, and this model has {needed}.\n"
            "  They were trained on another model. Load them on that one."
        )
    bad = next((layer for layer, state in states.items() if not state.isfinite().all()), None)
    if bad is not None:
        raise ValueError(
            f"the state of layer {bad} in {folder} holds NaN or infinity.\n"
            "  Its training diverged, or the file is damaged. Train it again, with a smaller rate."
        )
