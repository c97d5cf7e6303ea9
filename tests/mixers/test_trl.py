import pytest
import torch

from ssmtune.mixers import unpatch

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
LENGTHS = (7, 3, 12, 5, 9, 4)


@pytest.fixture
def rows(tokens):
    return [tokens(1, 20 + length)[0, :length] for length in LENGTHS]


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(64)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w2")), pad_token="w0", eos_token="w1"
    )


@pytest.mark.parametrize(
    "options",
    [{"packing": True, "max_length": 20}, {"padding_free": True, "max_length": None}],
    ids=["packing", "padding-free"],
)
@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "jamba", "zamba"])
def test_sft_trainer(make_pair, tokenizer, rows, tmp_path, family, options):
    # Unless told otherwise trl adds the loss that balances experts.
    _, ours = make_pair(family, **({"router_aux_loss_coef": 0.0} if family == "jamba" else {}))
    losses = [ours(row[None], labels=row[None]).loss.item() * (len(row) - 1) for row in rows]
    expected = sum(losses) / sum(length - 1 for length in LENGTHS)
    arguments = trl.SFTConfig(
        tmp_path, per_device_train_batch_size=6, max_steps=1, gradient_checkpointing=True,
        report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, **options,
    )  # fmt: skip
    data = datasets.Dataset.from_dict({"input_ids": [row.tolist() for row in rows]})
    seen = {}
    hook = ours.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)

    def loss_of_a_step(model):
        trainer = trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        trainer.train()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        return trainer.state.log_history[-1]["train_loss"]

    assert loss_of_a_step(ours) == pytest.approx(expected, rel=1e-5)
    assert seen["input_ids"].shape == (1, sum(LENGTHS))
    hook.remove()
    unpatch(ours)
    if family == "zamba":
        with pytest.raises(ValueError, match="can't keep packed sequences apart"):
            loss_of_a_step(ours)
    else:
        assert abs(loss_of_a_step(ours) - expected) > 5e-4
