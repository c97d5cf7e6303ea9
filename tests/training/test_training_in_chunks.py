import dataclasses

import pytest

from ssmtune.config import ConfigError, TrainConfig
from ssmtune.data import Example
from ssmtune.methods import apply_method
from ssmtune.models import load_model
from ssmtune.training import train

EXAMPLES = [Example(f"number {i} " * (1 + i % 3) + "is", " even" if i % 2 == 0 else " odd") for i in range(16)]
CONFIG = TrainConfig(steps=6, batch_size=4, lr=5e-3)
TRUNCATED = dataclasses.replace(CONFIG, chunk_length=3, chunk_gradients="truncated")


def run(checkpoint, method, config):
    model, tokenizer = load_model(checkpoint)
    model = apply_method(model, method, None, config.seed)
    result = train(model, tokenizer, EXAMPLES[:12], EXAMPLES[12:], config, None, progress=False)
    return dict(model.named_parameters()), result


@pytest.mark.parametrize("method, accumulation", [("lora", 1), ("initial-state", 2)])
def test_chunks_train_the_same_weights(tiny_checkpoint, assert_close, method, accumulation):
    config = dataclasses.replace(CONFIG, accumulation=accumulation)
    whole, expected = run(tiny_checkpoint, method, config)
    exact, result = run(tiny_checkpoint, method, dataclasses.replace(config, chunk_length=3))
    for name, parameter in whole.items():
        assert_close(name, parameter, exact[name], 1e-4)
    assert result.train_loss == pytest.approx(expected.train_loss, rel=1e-5)
    assert result.dev_loss == pytest.approx(expected.dev_loss, rel=1e-5)
    truncated, _ = run(tiny_checkpoint, method, dataclasses.replace(TRUNCATED, accumulation=accumulation))
    with pytest.raises(AssertionError):
        for name, parameter in whole.items():
            assert_close(name, parameter, truncated[name], 1e-2)


@pytest.mark.parametrize("key, value", [("gradient_checkpointing", True), ("optimizer", "mezo")])
def test_chunks_go_with_neither_checkpoints_nor_mezo(tiny_checkpoint, key, value):
    with pytest.raises(ConfigError, match=f"train.chunk_length is 3, and train.{key} is {str(value).lower()}"):
        run(tiny_checkpoint, "lora", dataclasses.replace(TRUNCATED, **{key: value}))


def test_a_prompt_is_refused_before_anything_is_trained(tiny_checkpoint):
    with pytest.raises(ValueError, match="PROMPT_TUNING cannot be trained in chunks"):
        run(tiny_checkpoint, "prompt-tuning", TRUNCATED)
