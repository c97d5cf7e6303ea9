"""Between adapters and transformers caches: a text read into an initial state, an initial state as a starting cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel

from ssmtune.mixers import find_mixers, patched_class, state_shape
from ssmtune.mixers.cache import read_states
from ssmtune.tuners.initial_state.layer import InitialStateLayer
from ssmtune.tuners.initial_state.model import InitialStateModel
from ssmtune.tuners.mixer_layer import as_base


def initial_state_from_text(model: nn.Module, tokenizer: Any, text: str, adapter_name: str | None = None) -> int:
    """Let an adapter of Initial State Tuning begin where the model stands after reading a text.

    The model reads it with the initial states switched off, and what its mixers then hold becomes the adapter, in place
    of what that held. With `conv_state=True` the model from then on goes on from the text exactly, as if it stood
    before every sequence; without, the first tokens see zeros in the convolution. An adapter of a rank gets the nearest
    states of that rank. What attention layers have read is no part of an initial state.

    Args:
        model: a model with such an adapter on its mixers.
        tokenizer: the tokenizer of the model, called with the text alone; it adds what special tokens it adds.
        text: the text.
        adapter_name: the adapter; may be left out where one is active.

    Returns:
        The number of tokens read.

    Raises:
        ValueError: there is no such adapter, the text has no tokens, or the model is none of transformers.
    """
    mixers = _adapted_mixers(model)
    if adapter_name is None:
        active = {name for _, layer in mixers for name in layer.active_adapters if name in layer.available_adapters}
        if len(active) != 1:
            raise ValueError(
                f"cannot tell which adapter gets the text: {sorted(active) or 'none'} of Initial State Tuning active.\n"
                "  Add one by get_peft_model(model, InitialStateConfig(...)), or pass adapter_name."
            )
        (adapter_name,) = active
    mixers = [(mixer, layer) for mixer, layer in mixers if adapter_name in layer.available_adapters]
    if not mixers:
        raise ValueError(
            f"the model has no adapter {adapter_name!r} of Initial State Tuning.\n"
            "  Add one by get_peft_model(model, InitialStateConfig(...)), or pass the name of one it has."
        )
    input_ids = torch.as_tensor(tokenizer(text)["input_ids"], dtype=torch.long).reshape(1, -1)
    if not input_ids.numel():
        raise ValueError(
            f"the text {text!r} has no tokens, so there is nothing to begin with.\n"
            "  Pass a text, or leave the adapter at zero."
        )
    with as_base(model, [layer for _, layer in mixers]), torch.no_grad():
        output = model(input_ids=input_ids.to(mixers[0][0].conv1d.weight.device), use_cache=True)
    cache = output.get("cache_params", output.get("past_key_values"))
    for mixer, layer in mixers:
        context, state = read_states(cache, mixer.layer_idx, mixer.conv_kernel_size)
        # States that another adapter has beside those of the mixer come after these.
        state = mixer.as_cached(state)[..., : layer.dstate]
        layer.assign("h", adapter_name, state.reshape(layer.dim, layer.dstate))
        if adapter_name in layer.tensors("conv"):
            layer.assign("conv", adapter_name, context[0])
    return input_ids.shape[1]


@torch.no_grad()
def starting_cache(model: nn.Module, batch_size: int = 1) -> Cache:
    """Put the active adapters of Initial State Tuning into a transformers cache.

    A model without the adapters that starts from this cache gives what the model with them gives in evaluation mode, at
    no cost. It has to
    be patched by `ssmtune.patch`: transformers' own Mamba mixers drop the state when they read several tokens. With a
    learned convolution state, prompts must not begin with pads.

    Every call that generates writes into the cache it is given: make one for each.

    Args:
        model: the model with the adapters.
        batch_size: the number of rows: prompts times num_beams or num_return_sequences.

    Returns:
        The cache, to be passed as `cache_params` (Mamba, Falcon Mamba) or `past_key_values` (others).

    Raises:
        ValueError: the model has no such adapter, or is none of transformers.

    Example:
        >>> cache = ssmtune.starting_cache(model, batch_size=2)
        >>> base.generate(input_ids, cache_params=cache)
    """
    adapted = {id(mixer): layer for mixer, layer in _adapted_mixers(model)}
    mixers = [mixer for _, mixer in find_mixers(model)]
    config = next(module.config for module in model.modules() if hasattr(module, "config"))
    cache = DynamicCache(config=config)
    for mixer in mixers:
        weight = mixer.conv1d.weight
        conv = weight.new_zeros(batch_size, weight.shape[0], mixer.conv_kernel_size)
        state = weight.new_zeros(batch_size, *state_shape(mixer), dtype=torch.float32)
        if (layer := adapted.get(id(mixer))) is not None:
            training = layer.training
            inputs = layer.eval().state_inputs()
            layer.train(training)
            if inputs.initial_state is not None:
                state += inputs.initial_state.view(state.shape[1:])
            if inputs.conv_state is not None:
                conv[..., 1:] = inputs.conv_state
        cache.update_conv_state(conv, mixer.layer_idx, conv_kernel_size=mixer.conv_kernel_size)
        cache.update_recurrent_state(patched_class(mixer).as_cached(state), mixer.layer_idx)
    return cache


def _adapted_mixers(model: nn.Module) -> list[tuple[nn.Module, InitialStateLayer]]:
    mixers = [(mixer, mixer._modules.get(InitialStateModel.child_name)) for _, mixer in find_mixers(model)]
    mixers = [(mixer, layer) for mixer, layer in mixers if isinstance(layer, InitialStateLayer)]
    if not mixers:
        raise ValueError(
            f"{type(model).__name__} has no adapter of Initial State Tuning.\n"
            "  Add one by get_peft_model(model, InitialStateConfig(...)), or load one."
        )
    if not any(isinstance(module, PreTrainedModel) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} is no model of transformers, whose caches this is for.\n"
            "  Convert one of mamba_ssm by ssmtune.from_mamba_ssm(model); adapters fit both."
        )
    return mixers
