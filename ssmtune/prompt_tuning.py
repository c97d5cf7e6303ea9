"""Prompt tuning that is right on state-space models: trainable vectors in front of the embeddings of a text.

peft recognises the first step of generation by `past_key_values`, which Mamba calls `cache_params`; so it would put the
prompt in front of every new token, and on every model in front of each piece of a text handed over with a cache. It
also puts the prompt in front of the pads of a left-padded batch, where the pads would separate it from the text. All
three are put right here for one model; its configuration and its files remain peft's.
"""

from __future__ import annotations

import inspect

import torch
from peft import PeftModelForCausalLM, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from ssmtune.data import IGNORED
from ssmtune.mixers import find_mixers


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


def repair(model: nn.Module) -> nn.Module:
    """Make a prompt-tuned PeftModel generate correctly, if its base caches states or has mixers to patch.

    Swaps the class of this one instance; any other model is returned as it is. Call it after
    `PeftModel.from_pretrained`; `ssmtune.models.load_adapter` does so by itself.
    """
    if type(model) is not PeftModelForCausalLM or not model.active_peft_config.is_prompt_learning:
        return model
    if cache_name(model.base_model) == "cache_params" or find_mixers(model.base_model):
        model.__class__ = StateSpacePromptModel
    return model


def cache_name(base: nn.Module) -> str:
    """What the model calls its cache: `cache_params`, or `past_key_values` where it has attention too."""
    known = inspect.signature(base.forward).parameters
    return "cache_params" if "cache_params" in known else "past_key_values"


class StateSpacePromptModel(PeftModelForCausalLM):
    """A PeftModelForCausalLM that puts its prompt right before each text, and only once."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ):
        """Run the base model on the prompt and a text; logits come first for the virtual tokens, then for the text."""
        inputs = {"attention_mask": attention_mask, "labels": labels, **kwargs}
        if self._continues(inputs):
            inputs |= {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        else:
            embeddings = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
            inputs |= self._with_prompt(embeddings, attention_mask, labels)
        return self.base_model(**inputs)

    def prepare_inputs_for_generation(self, *args, **kwargs) -> dict:
        """The base model's inputs for one step of generation, with the prompt if nothing is cached yet."""
        inputs = self.base_model_prepare_inputs_for_generation(*args, **kwargs)
        if self._continues(inputs):
            return inputs
        embeddings = inputs.pop("inputs_embeds", None)
        input_ids = inputs.pop("input_ids", None)
        if embeddings is None:
            embeddings = self.word_embeddings(input_ids)
        return inputs | self._with_prompt(embeddings, inputs.pop("attention_mask", None))

    def _continues(self, inputs: dict) -> bool:
        """Whether a cache already holds the prompt; if so, makes the mask of attention layers cover it too."""
        # They count the text alone. Without them the base counts from what it is given and has cached.
        inputs.pop("position_ids", None)
        name = cache_name(self.base_model)
        cache = inputs.get(name)
        if cache is None or not cache.has_previous_state():
            return False
        mask = inputs.get("attention_mask")
        if mask is not None and name == "past_key_values":
            inputs["attention_mask"] = mask_with_prompt(mask, self.active_peft_config.num_virtual_tokens)[0]
        return True

    def _with_prompt(self, embeddings: Tensor, attention_mask: Tensor | None, labels: Tensor | None = None) -> dict:
        batch = embeddings.shape[0]
        prompt = self.get_prompt(batch_size=batch).to(embeddings.dtype)
        virtual = prompt.shape[1]
        embeddings = torch.cat([prompt, embeddings], dim=1)
        if labels is not None:
            labels = torch.cat([labels.new_full((batch, virtual), IGNORED), labels], dim=1)
        if attention_mask is not None:
            attention_mask, order = mask_with_prompt(attention_mask, virtual)
            embeddings = embeddings.gather(1, order[..., None].expand_as(embeddings))
            labels = labels.gather(1, order) if labels is not None else None
        return {"inputs_embeds": embeddings, "attention_mask": attention_mask, "labels": labels}


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
