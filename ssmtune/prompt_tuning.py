"""Virtual tokens through peft, right under generation, caches and padding: in front of the embeddings of a text, or as
keys and values in front of its attention.

peft recognises the first step of generation by `past_key_values`, which Mamba calls `cache_params`; so it would put the
prompt in front of every new token, and on every model in front of each piece of a text handed over with a cache. It
also puts the prompt in front of the pads of a left-padded batch, where the pads would separate it from the text, and
counts pads as positions. All of it is put right here for one model; its configuration and its files remain peft's.
"""

from __future__ import annotations

import inspect

import torch
from peft import (
    PeftModelForCausalLM,
    PeftType,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor, nn
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from ssmtune.data import IGNORED

REPAIRED = (PeftType.PROMPT_TUNING, PeftType.P_TUNING, PeftType.PREFIX_TUNING)


def add_prompt(model: nn.Module, virtual_tokens: int) -> PeftModelForCausalLM:
    """Give a model a trainable prompt, which starts as the embeddings of random tokens."""
    config = PromptTuningConfig(prompt_tuning_init="SAMPLE_VOCAB", **_shared_settings(model, virtual_tokens))
    return repair(get_peft_model(model, config))


def add_encoded_prompt(model: nn.Module, virtual_tokens: int, hidden: int | None) -> PeftModelForCausalLM:
    """Give a model a prompt that is trained through an MLP (P-tuning), of as many hidden units or the model's size.

    A stored adapter holds what the MLP makes of it: to train one further is to train another model.

    Source: Liu et al., GPT Understands, Too, 2021.
    """
    config = PromptEncoderConfig(encoder_hidden_size=hidden, **_shared_settings(model, virtual_tokens))
    return repair(get_peft_model(model, config))


def _shared_settings(model: nn.Module, virtual_tokens: int) -> dict:
    return {
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": virtual_tokens,
        # prompts have no use for it, but peft insists and Mamba has no attention heads
        "num_attention_heads": getattr(model.config, "num_attention_heads", None) or 1,
    }


def add_prefix(model: nn.Module, virtual_tokens: int, hidden: int | None) -> PeftModelForCausalLM:
    """Give a transformer trainable keys and values in front of those of a text, in every layer.

    They start as those of random tokens; trained through an MLP of `hidden` units, at random.

    Source: Li and Liang, Prefix-Tuning, 2021.
    """
    from peft import initialize_kv_prefix_from_past_key_values

    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=virtual_tokens,
        prefix_projection=hidden is not None,
        encoder_hidden_size=hidden,
    )
    if hidden is not None:
        return repair(get_peft_model(model, config))
    tokens = torch.randint(model.config.vocab_size, (1, virtual_tokens)).to(model.device)
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
    adapted = repair(get_peft_model(model, config))
    initialize_kv_prefix_from_past_key_values(adapted, past_key_values=cache)
    return adapted


def repair(model: nn.Module) -> nn.Module:
    """Make a PeftModel with virtual tokens generate correctly.

    Swaps the class of this one instance; any other model is returned as it is. Call it after
    `PeftModel.from_pretrained`; `ssmtune.stored_adapters.load_adapter` does so by itself.
    """
    if type(model) is PeftModelForCausalLM and model.active_peft_config.peft_type in REPAIRED:
        model.__class__ = VirtualTokenModel
    return model


def cache_name(base: nn.Module) -> str:
    """What the model calls its cache: `cache_params`, or `past_key_values` where it has attention too."""
    known = inspect.signature(base.forward).parameters
    return "cache_params" if "cache_params" in known else "past_key_values"


class VirtualTokenModel(PeftModelForCausalLM):
    """A PeftModelForCausalLM that puts its virtual tokens right before each text, and only once."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ):
        """Run the base model on virtual tokens and a text; those of a prompt have logits, before those of the text."""
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        return self.base_model(**self._with_virtual_tokens({**inputs, "labels": labels, **kwargs}))

    def prepare_inputs_for_generation(self, *args, **kwargs) -> dict:
        """The base model's inputs for one step of generation, with the virtual tokens if nothing is cached yet."""
        if kwargs.get("use_cache") is False:
            # transformers hands back the cache of the last step, which holds the prefix and a text that comes again
            kwargs.pop("past_key_values", None)
        return self._with_virtual_tokens(self.base_model_prepare_inputs_for_generation(*args, **kwargs))

    def _with_virtual_tokens(self, inputs: dict) -> dict:
        """What to call the base model with, given what there would be without virtual tokens."""
        name, prefix = cache_name(self.base_model), self.active_peft_config.peft_type == PeftType.PREFIX_TUNING
        # They count the text alone.
        inputs.pop("position_ids", None)
        if not _is_filled(inputs.get(name)):
            inputs |= self._with_prefix(inputs) if prefix else self._with_prompt(inputs)
        elif (mask := inputs.get("attention_mask")) is not None and name == "past_key_values":
            # The cache holds the virtual tokens, and the mask of attention layers has to cover them too.
            virtual = self.active_peft_config.num_virtual_tokens
            inputs["attention_mask"] = mask_with_prefix(mask, virtual) if prefix else mask_with_prompt(mask, virtual)[0]
        return inputs | self._positions(inputs)

    def _with_prompt(self, inputs: dict) -> dict:
        embeddings, mask, labels = (inputs.get(name) for name in ("inputs_embeds", "attention_mask", "labels"))
        if embeddings is None:
            embeddings = self.word_embeddings(inputs["input_ids"])
        batch = embeddings.shape[0]
        prompt = self.get_prompt(batch_size=batch).to(embeddings.dtype)
        virtual = prompt.shape[1]
        embeddings = torch.cat([prompt, embeddings], dim=1)
        if labels is not None:
            labels = torch.cat([labels.new_full((batch, virtual), IGNORED), labels], dim=1)
        if mask is not None:
            mask, order = mask_with_prompt(mask, virtual)
            embeddings = embeddings.gather(1, order[..., None].expand_as(embeddings))
            labels = labels.gather(1, order) if labels is not None else None
        return {"input_ids": None, "inputs_embeds": embeddings, "attention_mask": mask, "labels": labels}

    def _with_prefix(self, inputs: dict) -> dict:
        if self.training and any(getattr(module, "gradient_checkpointing", False) for module in self.modules()):
            raise ValueError(
                "prefix tuning cannot be trained with gradient checkpointing: transformers drops the cache there, "
                "and the prefix with it.\n  Switch gradient checkpointing off, or use prompt tuning."
            )
        mask, cache = inputs.get("attention_mask"), self.get_prompt(batch_size=_tokens(inputs).shape[0])
        if mask is not None:
            mask = mask_with_prefix(mask, self.active_peft_config.num_virtual_tokens)
        return {"past_key_values": cache, "attention_mask": mask}

    def _positions(self, inputs: dict) -> dict:
        """Positions that leave pads out, for a base that takes any; without a mask it counts by itself."""
        mask = inputs.get("attention_mask")
        if mask is None or "position_ids" not in inspect.signature(self.base_model.forward).parameters:
            return {}
        return {"position_ids": (mask.long().cumsum(1) - 1).clamp_min(0)[:, -_tokens(inputs).shape[1] :]}


def _tokens(inputs: dict) -> Tensor:
    return inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]


def _is_filled(cache: Cache | None) -> bool:
    if cache is None:
        return False
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers):
        return cache.has_previous_state()
    return cache.get_seq_length() > 0


def mask_with_prefix(attention_mask: Tensor, virtual: int) -> Tensor:
    """Put the columns of a prefix, which a cache holds, in front of all."""
    return torch.nn.functional.pad(attention_mask, (virtual, 0), value=1)


def mask_with_prompt(attention_mask: Tensor, virtual: int) -> tuple[Tensor, Tensor]:
    """Put the columns of a prompt between the pads on the left of each row and its text.

    Args:
        attention_mask: (batch, seqlen), zero at pads.
        virtual: the number of virtual tokens.

    Returns:
        The mask (batch, virtual + seqlen), and for each of its columns where it stood with the prompt in front of all.
    """
    batch, length = attention_mask.shape
    pads = attention_mask.cumsum(1).eq(0).sum(1, keepdim=True)
    attention_mask = torch.cat([attention_mask.new_ones(batch, virtual), attention_mask], dim=1)
    # the pads on the left of a row go first, then the prompt, then the text
    position = torch.arange(virtual + length, device=attention_mask.device).expand(batch, -1)
    order = torch.where(position < pads, position + virtual, position - pads)
    order = torch.where(position < pads + virtual, order, position)
    return attention_mask.gather(1, order), order
