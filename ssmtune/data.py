"""Examples of a prompt and a target: read from files, and made into batches of tokens."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ssmtune.config import ConfigError, nearest
from ssmtune.rows import rows_of

if TYPE_CHECKING:
    import torch

IGNORED = -100


@dataclass(frozen=True)
class Example:
    """A prompt, the target that follows it character for character, and further accepted targets.

    `group` is what a metric needs to know of the example besides: the part of a test set, or the database of a query.
    """

    prompt: str
    target: str
    references: tuple[str, ...] = ()
    group: str = ""


def load_examples(
    path: str | Path,
    template: str = "{prompt}",
    target: str = "completion",
    *,
    split: str = "train",
    limit: int | None = None,
) -> list[Example]:
    """Read examples from a JSONL, CSV or TSV file, or from a dataset on the hub.

    A prompt that does not end in white space and its target are joined by one space, which belongs to the target: that
    is where byte-pair tokenizers put it.

    Args:
        path: a local file, or else a name on the hub (needs the `datasets` package).
        template: the prompt, with `{column}` for the columns of the data; `""` for none.
        target: the column to be learnt, or a template with `{column}` in it.
        split: split of a dataset on the hub.
        limit: read at most this many.

    Raises:
        ConfigError: no such file, or a column that is not in it.
        ValueError: a broken line, with its number, or no example at all.
    """
    prompt_parts = _parse_template(template, "template")
    target_parts = _parse_template(target, "target") if "{" in target else [("", target)]
    examples: list[Example] = []
    for where, row in rows_of(path, split):
        if limit is not None and len(examples) >= limit:
            break
        for _, column in [*prompt_parts, *target_parts]:
            if column is not None and column not in row:
                raise ConfigError(
                    f"{path}: {where} has no column {column!r}{nearest(column, row)}\n"
                    f"  Its columns: {', '.join(map(str, row)) or 'none'}. Set --data.template and --data.target."
                )
        prompt = _substitute(prompt_parts, row)
        answer = _substitute(target_parts, row)
        if not answer.strip():
            raise ValueError(
                f"{path}: {where} has an empty target ({target!r}).\n"
                "  There is nothing to learn from it. Remove the row, or choose another column with --data.target."
            )
        if prompt and not prompt[-1].isspace() and not answer[0].isspace():
            answer = f" {answer}"
        examples.append(Example(prompt, answer))
    if not examples:
        raise ValueError(f"{path} holds no examples.\n  Give a file with one example per line or row.")
    return examples


def hold_out(examples: Sequence[Example], fraction: float, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Split examples into those to train on and a random share to evaluate on, at least one unless it is 0."""
    count = min(len(examples) - 1, max(1, round(len(examples) * fraction))) if fraction > 0 else 0
    chosen = set(random.Random(seed).sample(range(len(examples)), count))
    kept = [example for index, example in enumerate(examples) if index not in chosen]
    return kept, [examples[index] for index in sorted(chosen)]


@dataclass(frozen=True)
class Encoded:
    """One example as tokens.

    Args:
        input_ids: prompt, target and end of text.
        labels: the same with -100 on the prompt, so that the loss is on the target alone.
        prompt_cut: tokens lost from the beginning of the prompt.
        target_cut: tokens lost from the end of the target.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_cut: int = 0
    target_cut: int = 0


def encode(tokenizer, example: Example, max_length: int | None = None, *, add_eos: bool = True) -> Encoded:
    """Tokenize prompt and target on their own, so that the border between them is the same in training and generation.

    Too long an example loses the beginning of its prompt; only a target that does not fit by itself loses its end.
    """
    prompt, start = _tokens(tokenizer, example.prompt), _start(tokenizer)
    return _join(tokenizer, prompt, _tokens(tokenizer, example.target), start, max_length, add_eos)


def encode_target(tokenizer, target: str, max_length: int | None = None) -> list[int]:
    """Tokens of a target and end of text, or as many of them as `max_length` leaves."""
    return _ended(tokenizer, _tokens(tokenizer, target))[:max_length]


def _ended(tokenizer, target: list[int]) -> list[int]:
    return target if tokenizer.eos_token_id is None else [*target, tokenizer.eos_token_id]


def _join(
    tokenizer, prompt: list[int], target: list[int], start: list[int], max_length: int | None, add_eos: bool
) -> Encoded:
    prompt = _never_empty(tokenizer, start + prompt)
    if add_eos:
        target = _ended(tokenizer, target)
    prompt_cut = target_cut = 0
    if max_length is not None and len(prompt) + len(target) > max_length:
        # one token of context stays: the first token of the target has to be predicted from something
        target_cut = max(0, len(target) - (max_length - 1))
        target = target[: max_length - 1]
        room = max_length - len(target)
        prompt_cut = len(prompt) - room
        prompt = _cut(prompt, room, start)
    return Encoded(prompt + target, [IGNORED] * len(prompt) + target, prompt_cut, target_cut)


def encode_prompt(tokenizer, prompt: str, max_length: int | None = None) -> list[int]:
    """Tokens of a prompt, never none: an empty one becomes the token that starts or separates texts."""
    start = _start(tokenizer)
    tokens = _never_empty(tokenizer, start + _tokens(tokenizer, prompt))
    return tokens if max_length is None or len(tokens) <= max_length else _cut(tokens, max_length, start)


def _cut(tokens: list[int], length: int, start: list[int]) -> list[int]:
    """The end of a prompt, behind what every text starts with."""
    return start + tokens[len(tokens) - (length - len(start)) :]


def _start(tokenizer) -> list[int]:
    """What every text starts with: the beginning-of-text token where the tokenizer puts one, as Llama's do."""
    if tokenizer.bos_token_id is None:
        return []
    first = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def _tokens(tokenizer, text: str | list[str]) -> list:
    """Tokens of a text, or of each of many: at once, which is several times as fast."""
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text != [] else []


def _never_empty(tokenizer, tokens: list[int]) -> list[int]:
    if tokens:
        return tokens
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ValueError(
            "the prompt is empty and the tokenizer has no token that begins or ends a text.\n"
            "  The first token would have to be predicted from nothing. Give a prompt."
        )
    return [start]


@dataclass
class EncodedExamples:
    """A dataset of encoded examples that knows what was cut; an empty target cannot occur in it."""

    items: list[Encoded] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Encoded:
        return self.items[index]

    @property
    def tokens(self) -> int:
        return sum(len(item.input_ids) for item in self.items)

    def cut_report(self, max_length: int) -> str | None:
        """A sentence on what `max_length` cut, or None."""
        prompts = sum(item.prompt_cut > 0 for item in self.items)
        targets = sum(item.target_cut > 0 for item in self.items)
        if not prompts and not targets:
            return None
        return f"max_length={max_length} cut the beginning of {prompts} prompts and the end of {targets} targets"


def encode_all(tokenizer, examples: Iterable[Example], max_length: int | None = None) -> EncodedExamples:
    """Encode examples for training."""
    examples = list(examples)
    prompts = _tokens(tokenizer, [example.prompt for example in examples])
    targets = _tokens(tokenizer, [example.target for example in examples])
    start = _start(tokenizer)
    return EncodedExamples(
        [
            _join(tokenizer, prompt, target, start, max_length, add_eos=True)
            for prompt, target in zip(prompts, targets, strict=True)
        ]
    )


@dataclass(frozen=True)
class Collator:
    """Pad encoded examples to the longest of a batch.

    Args:
        pad_id: the token to pad with; it is masked and never a label.
        side: "right" for training; "left" for generation, where every row must end with its last real token.
    """

    pad_id: int
    side: Literal["left", "right"] = "right"

    def __call__(self, batch: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """Returns input_ids, attention_mask and labels, each (batch, seqlen)."""
        import torch

        width = max(len(item.input_ids) for item in batch)

        def padded(rows: list[list[int]], value: int) -> torch.Tensor:
            fill = [[value] * (width - len(row)) for row in rows]
            pairs = zip(rows, fill, strict=True)
            return torch.tensor([row + pad if self.side == "right" else pad + row for row, pad in pairs])

        return {
            "input_ids": padded([item.input_ids for item in batch], self.pad_id),
            "attention_mask": padded([[1] * len(item.input_ids) for item in batch], 0),
            "labels": padded([item.labels for item in batch], IGNORED),
        }


def _parse_template(template: str, name: str) -> list[tuple[str, str | None]]:
    try:
        return [(literal, column) for literal, column, _, _ in string.Formatter().parse(template)]
    except ValueError as error:
        raise ConfigError(
            f"data.{name} {template!r} cannot be read: {error}.\n"
            "  Columns are written {column}; double a brace that is meant as such: {{ or }}."
        ) from None


def _substitute(parts: list[tuple[str, str | None]], row: Mapping[str, Any]) -> str:
    text = []
    for literal, column in parts:
        text.append(literal)
        if column is not None and row[column] is not None:
            value = row[column]
            text.append(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return "".join(text)
