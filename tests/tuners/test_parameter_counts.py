"""The numbers of trainable parameters on the released Mamba sizes, counted on the meta device."""

import pytest
import torch
from peft import get_peft_model
from transformers import MambaConfig, MambaForCausalLM

from ssmtune.tuners import InitialStateConfig, StateOffsetConfig

# name: hidden size, layers, parameters of the base; then those of the dense matrix and of the vector
SIZES = {
    "130m": (768, 24, 129_135_360, 589_824, 36_864),
    "370m": (1024, 48, 371_516_416, 1_572_864, 98_304),
    "790m": (1536, 48, 793_204_224, 2_359_296, 147_456),
    "1.4b": (2048, 48, 1_372_178_432, 3_145_728, 196_608),
    "2.8b": (2560, 64, 2_768_345_600, 5_242_880, 327_680),
}
# per cent of base and adapter together: matrix, vector, rank 1, 4 and 8
PERCENT = {
    "130m": ("0.455", "0.029", "0.029", "0.115", "0.230"),
    "370m": ("0.422", "0.026", "0.027", "0.107", "0.213"),
    "790m": ("0.297", "0.019", "0.019", "0.075", "0.149"),
    "1.4b": ("0.229", "0.014", "0.014", "0.058", "0.115"),
    "2.8b": ("0.189", "0.012", "0.012", "0.047", "0.095"),
}


@pytest.mark.parametrize("size", SIZES)
def test_trainable_parameters(size):
    hidden_size, layers, base, matrix, vector = SIZES[size]
    with torch.device("meta"):
        model = MambaForCausalLM(MambaConfig(vocab_size=50280, hidden_size=hidden_size, num_hidden_layers=layers))
    assert model.num_parameters() == base
    dim, dstate = 2 * hidden_size, 16
    cases = [
        (StateOffsetConfig(), matrix, PERCENT[size][0]),
        (InitialStateConfig(), matrix, PERCENT[size][0]),
        (StateOffsetConfig(target="y"), vector, PERCENT[size][1]),
        (StateOffsetConfig(rank=1), layers * (dim + dstate), PERCENT[size][2]),
        (StateOffsetConfig(rank=4), 4 * layers * (dim + dstate), PERCENT[size][3]),
        (InitialStateConfig(rank=8), 8 * layers * (dim + dstate), PERCENT[size][4]),
    ]
    for config, expected, percent in cases:
        adapted = get_peft_model(model, config)
        trainable, total = adapted.get_nb_trainable_parameters()
        assert (trainable, total) == (expected, base + expected), config
        assert f"{100 * trainable / total:.3f}" == percent, config
        assert all(p.is_meta for p in adapted.parameters())
        assert adapted.unload() is model
