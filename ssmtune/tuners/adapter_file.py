"""Checks of stored adapters, so that a wrong or damaged file is an error that says what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open


def check_readable(folder: str | Path) -> None:
    """Raise if the safetensors file of an adapter folder is cut off or otherwise damaged.

    Args:
        folder: a local adapter folder; anything without such a file (a name on the Hub) is left to peft.

    Raises:
        ValueError: the file cannot be opened.
    """
    path = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"cannot read {path} ({path.stat().st_size} bytes): {error}.\n"
            "  The file is cut off or not a safetensors file, as after a full disk or an interrupted copy.\n"
            "  Copy or save the adapter again."
        ) from None


@contextmanager
def naming(adapter_name: str) -> Iterator[None]:
    """Let an error say which of several adapters it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"adapter {adapter_name!r}: {error}") from None


def adapted_place(key: str) -> str:
    """`base_model.model.backbone.layers.0.mixer.adapter.tensor.default` -> `tensor of backbone.layers.0.mixer`."""
    mixer, _adapter, tensor, _adapter_name = key.removeprefix("base_model.model.").rsplit(".", 3)
    return f"{tensor} of {mixer}"


def check_tensors(
    expected: Mapping[str, torch.Tensor],
    found: Mapping[str, torch.Tensor],
    prefix: str,
    base: str | None,
    place: Callable[[str], str] = adapted_place,
) -> None:
    """Raise unless an adapter's stored tensors are the ones the model has a place for, and finite.

    Args:
        expected: the model's own adapter tensors, by state-dict key.
        found: the stored tensors, by the same keys; keys of other methods and modules are passed over.
        prefix: what the names of this method's tensors begin with.
        base: the model the adapter was trained for, if known.
        place: what a message calls the tensor of a key.

    Raises:
        ValueError: a tensor is missing, has no place, has another shape, or holds NaN or infinity.
    """
    remedy = "Load it on the model it was trained for" + (f": {base!r}." if base else ".")
    for key, tensor in expected.items():
        if key in found and found[key].shape != tensor.shape:
            raise ValueError(
                f"{place(key)} has shape {tuple(found[key].shape)} in the adapter file, "
                f"this model needs {tuple(tensor.shape)}.\n"
                f"  The adapter was trained on a model of other sizes. {remedy}"
            )
    missing = [key for key in expected if key not in found]
    if missing:
        raise ValueError(
            f"the adapter file lacks {len(missing)} of {len(expected)} tensors, first {place(missing[0])}.\n"
            f"  It was trained on fewer layers than are adapted here, or is incomplete. {remedy}"
        )
    unplaced = [key for key in found if f".{prefix}" in key and key not in expected]
    if unplaced:
        raise ValueError(
            f"the adapter file has {len(unplaced)} tensors that this model has no place for, "
            f"first {unplaced[0].removeprefix('base_model.model.')}.\n"
            f"  It was trained on other layers than are adapted here. {remedy}"
        )
    for key in expected:
        # A model on the meta device is loaded in shape only.
        if found[key].is_meta or all(map(torch.isfinite, found[key].aminmax())):
            continue
        bad = int((~torch.isfinite(found[key])).sum())
        raise ValueError(
            f"{place(key)} holds {bad} values in the adapter file that are NaN or infinite.\n"
            "  Training diverged or the file is damaged. Use an earlier checkpoint, or train with a lower rate."
        )
