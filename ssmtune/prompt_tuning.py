"""Prompt tuning that is right on Mamba: trainable vectors in front of the embeddings of a text.

peft recognises the first step of generation by `past_key_values`, which Mamba calls `cache_params`; so it would put the
prompt in front of every new token. It also puts the prompt in front of the pads of a left-padded batch, where the pads
would separate it from the text. Both are put right here for one model; its configuration and its files remain peft's.
"""

from __future__ import annotations

import inspect

import torch
from peft import PeftModelForCausalLM, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from ssmtune.data import IGNORED


def add_prompt(model: nn.Module, virtual_tokens: int) -> PeftModelForCausalLM:
    """Give a model a trainable prompt, which starts as the embeddings of random tokens."""
    config = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=virtual_tokens,
        prompt_tuning_init="SAMPLE_VOCAB",
        # prompt tuning has no use for it, but peft insists and Mamba has no attention heads
        num_attention_heads=getattr(model.config, "num_attention_heads", None) or 1,
    )
    return repair(get_peft_model(model, config))


def repair(model: nn.Module) -> nn.Module:
    """Make a prompt-tuned PeftModel whose base caches states in `cache_params` generate correctly.

    Swaps the class of this one instance; any other model is returned as it is. Call it after
    `PeftModel.from_pretrained`; `ssmtune.models.load_adapter` does so by itself.
    """
    if type(model) is not PeftModelForCausalLM or not model.active_peft_config.is_prompt_learning:
        return model
    if "cache_params" in inspect.signature(model.base_model.forward).parameters:
        model.__class__ = StateSpacePromptModel
    return model


class StateSpacePromptModel(PeftModelForCausalLM):
    """A PeftModelForCausalLM that puts its prompt right before each text, and only once."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        cache_params=None,
        **kwargs,
    ):
        """Run the base model on the prompt and a text; logits come first for the virtual tokens, then for the text."""
        inputs = {"attention_mask": attention_mask, "labels": labels}
        if cache_params is not None and cache_params.has_previous_state():
            inputs |= {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        else:
            embeddings = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
            inputs = self._with_prompt(embeddings, attention_mask, labels)
        return self.base_model(cache_params=cache_params, **inputs, **kwargs)

    def prepare_inputs_for_generation(self, *args, **kwargs) -> dict:
        """The base model's inputs for one step of generation, with the prompt if nothing is cached yet."""
        inputs = self.base_model_prepare_inputs_for_generation(*args, **kwargs)
        cache = inputs.get("cache_params")
        if cache is not None and cache.has_previous_state():
            return inputs
        embeddings = inputs.pop("inputs_embeds", None)
        input_ids = inputs.pop("input_ids", None)
        if embeddings is None:
            embeddings = self.word_embeddings(input_ids)
        return inputs | self._with_prompt(embeddings, inputs.pop("attention_mask", None))

    def _with_prompt(self, embeddings: Tensor, attention_mask: Tensor | None, labels: Tensor | None = None) -> dict:
        batch, length, _ = embeddings.shape
        prompt = self.get_prompt(batch_size=batch).to(embeddings.dtype)
        virtual = prompt.shape[1]
        embeddings = torch.cat([prompt, embeddings], dim=1)
        if labels is not None:
            labels = torch.cat([labels.new_full((batch, virtual), IGNORED), labels], dim=1)
        if attention_mask is not None:
            pads = attention_mask.cumsum(1).eq(0).sum(1, keepdim=True)
            attention_mask = torch.cat([attention_mask.new_ones(batch, virtual), attention_mask], dim=1)
            # the pads on the left of a row go first, then the prompt, then the text
            position = torch.arange(virtual + length, device=embeddings.device).expand(batch, -1)
            order = torch.where(position < pads, position + virtual, position - pads)
            order = torch.where(position < pads + virtual, order, position)
            embeddings = embeddings.gather(1, order[..., None].expand_as(embeddings))
            attention_mask = attention_mask.gather(1, order)
            labels = labels.gather(1, order) if labels is not None else None
        return {"inputs_embeds": embeddings, "attention_mask": attention_mask, "labels": labels}
