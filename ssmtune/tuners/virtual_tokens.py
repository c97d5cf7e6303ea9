"""Training a state as what virtual tokens leave behind: prefix tuning, and iterative suffix tuning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ssmtune.mixers import find_mixers
from ssmtune.tuners.mixer_layer import as_base


class VirtualTokens(nn.Module):
    """Trained virtual tokens that enter one mixer, their outputs dropped.

    All that a text after them sees is the state and the inputs of the convolution that they leave behind:

        h, conv = mixer.states_after(tokens)          or of tokens + outer(tanh(inner(tokens))), outer zero at first

    Args:
        mixer: the mixer that they enter.
        tokens: their number.
        hidden: units of an MLP that the tokens go through, or None for none.
        device: of the parameters.
    """

    def __init__(self, mixer: nn.Module, tokens: int, hidden: int | None, device: torch.device):
        super().__init__()
        # In a tuple, so that the mixer does not become a child of its own descendant.
        self.mixer = (mixer,)
        size = mixer.hidden_size
        # As large as what the norm before a mixer gives; `start_from_tokens` has better ones.
        self.tokens = nn.Parameter(torch.randn(tokens, size, device=device))
        self.inner = self.outer = None
        if hidden is not None:
            self.inner = nn.Linear(size, hidden, device=device)
            self.outer = nn.Linear(hidden, size, device=device)
            nn.init.zeros_(self.outer.weight)
            nn.init.zeros_(self.outer.bias)
        self._folded: tuple[list[tuple[int, int]], dict[str, Tensor]] | None = None

    def forward(self) -> dict[str, Tensor]:
        """The state "h" (dim, dstate) and the inputs "conv" (dim, width - 1) of the convolution that they leave."""
        if torch.is_grad_enabled():
            return self._run()
        # Generation asks at every token. Every change of a tensor in place counts its version up.
        made_from = [(id(parameter), parameter._version) for parameter in self.mixer[0].parameters()]
        if self._folded is None or self._folded[0] != made_from:
            self._folded = made_from, self._run()
        return self._folded[1]

    def _run(self) -> dict[str, Tensor]:
        (mixer,) = self.mixer
        tokens = self.tokens
        if self.inner is not None:
            tokens = tokens + self.outer(torch.tanh(self.inner(tokens)))
        state, conv = mixer.states_after(tokens.unsqueeze(0).to(mixer.conv1d.weight.dtype))
        return {"h": state[0], "conv": conv[0]}


@torch.no_grad()
def start_from_tokens(model: nn.Module, input_ids: Tensor) -> None:
    """Let virtual tokens begin as what each mixer sees of a text.

    Args:
        model: a model with an adapter that has `virtual_tokens`.
        input_ids: (1, virtual_tokens).
    """
    owners = [
        (mixer, layer, known)
        for _, mixer in find_mixers(model)
        for layer in mixer.children()
        if (known := getattr(layer, "virtual_tokens", None))
    ]
    seen: list[Tensor] = []

    def see(_, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    hooks = [mixer.register_forward_pre_hook(see, with_kwargs=True) for mixer, _, _ in owners]
    try:
        with as_base(model, [layer for _, layer, _ in owners]):
            model(input_ids=input_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for (_, _, known), hidden_states in zip(owners, seen, strict=True):
        for virtual in known.values():
            virtual.tokens.copy_(hidden_states[0])
