from __future__ import annotations

import torch
from torch import Tensor, nn


class Prefix(nn.Module):
    """Trained virtual tokens that enter one mixer before a text, their outputs dropped.

    All that a text sees of them is the state and the inputs of the convolution that they leave behind:

        h_0, conv = mixer.states_after(tokens)        or of tokens + outer(tanh(inner(tokens))), outer zero at first

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
        size = mixer.out_proj.out_features
        # As large as what the norm before a mixer gives; `prefix_from_tokens` has better ones.
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
        state, conv = mixer.states_after(tokens.unsqueeze(0).to(mixer.out_proj.weight.dtype))
        return {"h": state[0], "conv": conv[0]}
