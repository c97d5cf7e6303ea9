"""Tasks with a fixed set of answers, measured by which answer the model finds likeliest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ssmtune.data import Example, encode_prompt
from ssmtune.tasks.task import Task


@dataclass(frozen=True)
class ChoiceTask(Task):
    """Accuracy of the likeliest of `choices`; every answer is valid by construction.

    The likelihood is that of the whole answer with its end-of-text token: names may share their first tokens, and the
    end makes no answer the beginning of another. It is not divided by the length: it is the very probability that
    training raises, and dividing would favour long names whose last tokens follow from their first.
    """

    def answers(self, model, tokenizer, examples: Sequence[Example], batch_size: int = 32) -> list[str]:
        return self.predict(model, tokenizer, [example.prompt for example in examples], batch_size)

    def score(self, answers: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        correct = sum(answer == example.target for answer, example in zip(answers, examples, strict=True))
        return {"accuracy": 100.0 * correct / max(1, len(examples))}

    def predict(self, model, tokenizer, prompts: Sequence[str], batch_size: int = 32) -> list[str]:
        """The likeliest choice for each prompt.

        An answer is at most as likely as its first token. So answers are scored in the order of their first tokens,
        and an example is settled as soon as no answer left can win: the result of scoring all of them, at a fraction
        of the cost.
        """
        from ssmtune.generation import target_log_likelihood

        logits, log_total = first_token_logits(model, tokenizer, prompts, self.choices, self.max_length, batch_size)
        bounds = logits - log_total[:, None]
        order = bounds.argsort(dim=1, descending=True, stable=True).tolist()
        best = [(-math.inf, self.choices[row[0]]) for row in order]
        open_examples = list(range(len(prompts)))
        for rank in range(len(self.choices)):
            open_examples = [i for i in open_examples if bounds[i, order[i][rank]].item() > best[i][0]]
            if not open_examples:
                break
            candidates = [self.choices[order[i][rank]] for i in open_examples]
            scores = target_log_likelihood(
                model,
                tokenizer,
                [prompts[i] for i in open_examples],
                candidates,
                batch_size,
                max_length=self.max_length,
                add_eos=True,
            )
            for i, candidate, score in zip(open_examples, candidates, scores, strict=True):
                if score.log_likelihood > best[i][0]:
                    best[i] = (score.log_likelihood, candidate)
        return [candidate for _, candidate in best]


def first_token_logits(
    model, tokenizer, prompts: Sequence[str], choices: Sequence[str], max_length: int, batch_size: int = 32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the first token of each choice after each prompt, and the logarithm of what all tokens come to.

    Returns:
        (prompts, choices) and (prompts,), float32; their difference is the log-probability.
    """
    first = [tokenizer(choice, add_special_tokens=False)["input_ids"][0] for choice in choices]
    encoded = [encode_prompt(tokenizer, prompt, max_length) for prompt in prompts]
    found, log_total = torch.empty(len(prompts), len(choices)), torch.empty(len(prompts))
    # Alike lengths together: less padding, and logits are needed near the end of each row only.
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    device, training = next(model.parameters()).device, model.training
    model.eval()
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            lengths = torch.tensor([len(encoded[i]) for i in rows])
            width = int(lengths.max())
            # Padded on the right, where nothing causal can see it; the pad token's value does not matter.
            input_ids = torch.tensor([encoded[i] + [0] * (width - len(encoded[i])) for i in rows])
            mask = (torch.arange(width) < lengths[:, None]).long()
            logits = model(
                input_ids=input_ids.to(device),
                attention_mask=mask.to(device),
                use_cache=False,
                logits_to_keep=width - int(lengths.min()) + 1,
            ).logits
            # Counted from the end: prompt tuning puts its own tokens in front.
            last = logits[torch.arange(len(rows)), (logits.shape[1] - 1 - (width - lengths)).to(device)].float()
            found[rows], log_total[rows] = last[:, first].cpu(), last.logsumexp(-1).cpu()
    model.train(training)
    return found, log_total
