"""Direct preference optimization, with the prompt of a chosen and a rejected answer run once.

Rows have TRL's columns: `prompt`, `chosen` and `rejected`, each a text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ssmtune.data import Collator, Encoded, encode_prompt, encode_target
from ssmtune.likelihood import evaluating, pad_id
from ssmtune.prefix_sharing import continuation_log_likelihoods

ANSWERS = ("chosen", "rejected")


@dataclass(frozen=True)
class PreferenceCollator:
    """Rows of prompt, chosen and rejected as a batch whose prompts are there once.

    Prompts and answers are tokenized on their own and joined as they are; an answer gets the end-of-text token.

    Args:
        tokenizer: of the model.
        max_prompt_length: tokens of a prompt that are kept, from its end; None for all.
        max_answer_length: tokens of an answer that are kept, from its beginning; None for all.
    """

    tokenizer: Any
    max_prompt_length: int | None = None
    max_answer_length: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, str]]) -> dict[str, Tensor]:
        """Returns what `continuation_log_likelihoods` takes; of each prompt the chosen continuation comes first.

        Raises:
            ValueError: a column is missing, or holds messages instead of text.
        """
        for row in rows:
            _check_columns(row)
        prompts = [encode_prompt(self.tokenizer, row["prompt"], self.max_prompt_length) for row in rows]
        answers = [encode_target(self.tokenizer, row[name], self.max_answer_length) for row in rows for name in ANSWERS]
        padding = pad_id(self.tokenizer)
        prompts, answers = (
            Collator(padding, side)([Encoded(ids, ids) for ids in texts])
            for side, texts in (("left", prompts), ("right", answers))
        )
        return {
            "prompt_ids": prompts["input_ids"],
            "prompt_mask": prompts["attention_mask"],
            "continuation_ids": answers["input_ids"].unflatten(0, (-1, len(ANSWERS))),
            "continuation_mask": answers["attention_mask"].unflatten(0, (-1, len(ANSWERS))),
        }


class DpoLoss(NamedTuple):
    """The mean loss of a batch, and of each prompt the margin: how much the model has moved from the reference towards
    the chosen answer and away from the rejected one, times beta."""

    loss: Tensor
    margins: Tensor


def dpo_loss(
    model: nn.Module, batch: Mapping[str, Tensor], *, beta: float = 0.1, reference: nn.Module | Tensor | None = None
) -> DpoLoss:
    """The loss of direct preference optimization, with one run of each prompt for both of its answers.

        -log sigmoid(beta (log p(chosen) / p_ref(chosen) - log p(rejected) / p_ref(rejected)))

    Args:
        model: what is trained; see `ssmtune.shared_prefix_logits` for which models can share prompts.
        batch: of `PreferenceCollator`.
        beta: how little the model may move from the reference.
        reference: a model; its log-likelihoods (batch, 2), which `continuation_log_likelihoods` gives, computed
            before; or None for the model itself with its adapters of peft switched off.

    Returns:
        The loss and the margins (batch,).

    Raises:
        ValueError: there is neither a reference nor an adapter to switch off.

    Source: Rafailov et al., Direct Preference Optimization, 2023.

    Example:
        >>> for batch in DataLoader(rows, batch_size=4, collate_fn=ssmtune.PreferenceCollator(tokenizer)):
        ...     ssmtune.dpo_loss(model, batch).loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """
    if not isinstance(reference, Tensor):
        reference = _reference_log_likelihoods(model, batch, reference)
    gains = continuation_log_likelihoods(model, batch) - reference
    margins = beta * (gains[:, 0] - gains[:, 1])
    return DpoLoss(-F.logsigmoid(margins).mean(), margins.detach())


def _reference_log_likelihoods(model: nn.Module, batch: Mapping[str, Tensor], reference: nn.Module | None) -> Tensor:
    if reference is not None:
        with evaluating(reference):
            return continuation_log_likelihoods(reference, batch)
    if not hasattr(model, "disable_adapter"):
        raise ValueError(
            f"dpo_loss got no reference, and {type(model).__name__} has no adapters that could be switched off.\n"
            "  The loss says how far a model moves from another. Pass reference: a frozen copy, or log-likelihoods."
        )
    with evaluating(model), model.disable_adapter():
        return continuation_log_likelihoods(model, batch)


def _check_columns(row: Mapping[str, Any]) -> None:
    for name in ("prompt", *ANSWERS):
        if not isinstance(row.get(name), str):
            held = f"holds a {type(row[name]).__name__}" if name in row else "is missing"
            raise ValueError(
                f"the column {name!r} of a preference {held}; the columns are {', '.join(map(repr, row)) or 'none'}.\n"
                "  Each of prompt, chosen and rejected is a text. Messages become texts by the chat template of the "
                "tokenizer."
            )
