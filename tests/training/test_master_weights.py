import copy
import os
import signal

import pytest
import torch
from transformers import TrainerCallback

from ssmtune.config import TrainConfig
from ssmtune.data import Example
from ssmtune.master_weights import MasterAdamW
from ssmtune.methods import apply_method
from ssmtune.models import load_model
from ssmtune.training import TrainingInterrupted, train

KINDS = (torch.optim.AdamW, MasterAdamW)


class InterruptAtThree(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)


def parameters(*shapes, dtype=torch.bfloat16):
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def step(optimizer, known, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in known:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    optimizer.step()


def test_small_updates_add_up():
    known = [torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2)]
    optimizers = [kind([p], lr=1e-4, weight_decay=0) for kind, p in zip(KINDS, known, strict=True)]
    for _ in range(100):
        for optimizer, parameter in zip(optimizers, known, strict=True):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    assert known[0].tolist() == [1, 1, 1]
    assert known[1].tolist() == [torch.tensor(0.99, dtype=torch.bfloat16)] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_adamw_in_float32_rounded_after_every_step(dtype):
    narrow = [*parameters((5, 3), (7,), dtype=dtype), *parameters((2,), dtype=torch.float32)]
    wide = [torch.nn.Parameter(parameter.detach().float()) for parameter in narrow]
    options = {"lr": 1e-2, "betas": (0.8, 0.9), "weight_decay": 0.1}
    ours, theirs = MasterAdamW(narrow, **options), torch.optim.AdamW(wide, **options)
    for seed in range(5):
        step(ours, narrow, seed)
        for parameter, copied in zip(narrow, wide, strict=True):
            copied.grad = parameter.grad.float()
        theirs.step()
        for parameter, copied in zip(narrow, wide, strict=True):
            assert parameter.dtype == parameter.grad.dtype and torch.equal(parameter, copied.to(parameter.dtype))


def test_its_state_goes_on_to_the_bit():
    known = parameters((5, 3), (7,))
    optimizer = MasterAdamW(known, lr=1e-4)
    step(optimizer, known, 0)
    others = copy.deepcopy(known)
    again = MasterAdamW(others, lr=1.0)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(1, 200):
        step(optimizer, known, seed)
        step(again, others, seed)
    assert all(map(torch.equal, known, others))


def test_a_bfloat16_model_is_trained_through_it(tiny_checkpoint, tmp_path):
    examples = [Example("the sea is", " blue"), Example("the sun is", " red")] * 4

    def run(out, lr=1e-4, **options):
        model, tokenizer = load_model(tiny_checkpoint, "bfloat16")
        model = apply_method(model, "bitfit")
        before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        config = TrainConfig(steps=6, batch_size=2, lr=lr, save_every=2, dtype="bfloat16")
        train(model, tokenizer, examples, [], config, tmp_path / out, progress=False, **options)
        return before, [p for p in model.parameters() if p.requires_grad]

    before, after = run("whole")
    assert all(p.dtype == torch.bfloat16 for p in after)
    assert not all(map(torch.equal, before, after))

    with pytest.raises(TrainingInterrupted):
        run("parts", callbacks=[InterruptAtThree()])
    assert all(map(torch.equal, run("parts", resume=True)[1], after))
