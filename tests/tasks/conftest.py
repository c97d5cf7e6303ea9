import tarfile
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def byte_tokenizer():
    """One token per byte (so that every answer starts with the same token), and one that ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, **{letter: i + 1 for i, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


@pytest.fixture(scope="session")
def byte_model():
    """A tiny random Mamba over the tokens of `byte_tokenizer`, with logits far enough apart to have preferences."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=257, hidden_size=32, state_size=8, num_hidden_layers=2, pad_token_id=0, eos_token_id=0
    )
    model = MambaForCausalLM(config).eval()
    with torch.no_grad():
        model.backbone.embeddings.weight.mul_(10)
    return model


@pytest.fixture(scope="session")
def released(tmp_path_factory):
    """A folder with the files of the real releases, as far as they are at hand; skips where none are."""
    archive = Path(__file__).parents[3] / "shared" / "data" / "tasks.tar.xz"
    if not archive.exists():
        pytest.skip("the releases of the tasks are not at hand")
    folder = tmp_path_factory.mktemp("releases")
    with tarfile.open(archive) as members:
        members.extractall(folder, filter="data")
    return folder
