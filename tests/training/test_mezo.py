import copy
import os
import signal

import pytest
import torch
from transformers import TrainerCallback

from ssmtune.config import ConfigError, TrainConfig
from ssmtune.data import Example
from ssmtune.methods import apply_method
from ssmtune.mezo import MeZO, _mixed
from ssmtune.models import load_model
from ssmtune.training import TrainingInterrupted, train

EXAMPLES = [Example("the sea is", " blue"), Example("the sun is", " red")] * 4


class InterruptAtThree(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)


def quadratic():
    """Parameters in two groups, and half of their squared distance from a target, in float64."""
    parameters = [torch.nn.Parameter(torch.randn(3, 2).double()), torch.nn.Parameter(torch.randn(4).double())]
    targets = [torch.randn(3, 2).double(), torch.randn(4).double()]
    groups = [{"params": parameters[:1], "weight_decay": 0.5}, {"params": parameters[1:]}]
    return groups, parameters, lambda: sum((p - t).square().sum() / 2 for p, t in zip(parameters, targets, strict=True))


def test_it_steps_by_the_finite_difference_along_its_direction(assert_close):
    groups, parameters, loss = quadratic()
    optimizer = MeZO(groups, lr=1e-2, eps=1e-3, seed=7)
    for _ in range(3):
        before = [parameter.detach().clone() for parameter in parameters]
        # of a quadratic the central difference is exact: the gradient times z
        gradients = torch.autograd.grad(loss(), parameters)
        expected_loss = loss().detach()
        slopes = []
        for _batch in range(2):
            mean = optimizer.estimate(loss)
            slopes.append(optimizer.projected)
            assert all(torch.allclose(p, b, rtol=0, atol=1e-15) for p, b in zip(parameters, before, strict=True))
        assert slopes[1] == pytest.approx(2 * slopes[0], rel=1e-9)
        optimizer.step()
        generator = torch.Generator().manual_seed(_mixed(7, optimizer.param_groups[0]["steps"] - 1))
        z = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
        slope = 2 * sum((gradient * direction).sum() for gradient, direction in zip(gradients, z, strict=True))
        assert_close("loss", expected_loss + 1e-6 / 2 * sum(d.square().sum() for d in z), mean, 1e-12)
        for parameter, b, direction, decay in zip(parameters, before, z, (0.5, 0), strict=True):
            assert_close("parameter", b * (1 - 1e-2 * decay) - 1e-2 * slope * direction, parameter.detach(), 1e-9)


def test_it_converges_on_a_quadratic():
    _, parameters, loss = quadratic()
    optimizer = MeZO(parameters, lr=5e-2)
    for _ in range(600):
        optimizer.estimate(loss)
        optimizer.step()
    assert loss().item() < 1e-6


def test_other_steps_and_seeds_go_in_other_directions():
    moved = []
    for seed in (0, 1):
        parameter = torch.nn.Parameter(torch.zeros(5))
        optimizer = MeZO([parameter], lr=1.0, seed=seed)
        for _ in range(2):
            before = parameter.detach().clone()
            optimizer.estimate(lambda parameter=parameter: parameter.sum())
            optimizer.step()
            moved.append(torch.nn.functional.normalize(parameter.detach() - before, dim=0))
    overlaps = torch.stack(moved) @ torch.stack(moved).T
    assert overlaps.fill_diagonal_(0).abs().max() < 0.99


def test_its_state_goes_on_to_the_bit():
    _, parameters, loss = quadratic()
    optimizer = MeZO(parameters, lr=1e-2, seed=3)
    optimizer.estimate(loss)
    optimizer.step()
    kept, stored = copy.deepcopy(parameters), copy.deepcopy(optimizer.state_dict())
    results = []
    for again in (optimizer, MeZO(parameters, lr=1.0)):
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
        again.load_state_dict(copy.deepcopy(stored))
        for _ in range(3):
            again.estimate(loss)
            again.step()
        results.append([parameter.detach().clone() for parameter in parameters])
    assert all(map(torch.equal, *results))


def run(checkpoint, out, method="state-offset", dtype="float32", steps=6, **options):
    model, tokenizer = load_model(checkpoint, dtype)
    model = apply_method(model, method, {"dropout": 0.3} if method == "lora" else None)
    config = TrainConfig(
        steps=steps, batch_size=2, accumulation=2, lr=1e-3, save_every=2, optimizer="mezo", dtype=dtype
    )
    train(model, tokenizer, EXAMPLES, [], config, out, progress=False, **options)
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_interrupted_run_resumes_to_the_same_weights(tiny_checkpoint, tmp_path, method):
    whole = run(tiny_checkpoint, tmp_path / "whole", method)
    assert any(tensor.any() for tensor in whole.values())
    with pytest.raises(TrainingInterrupted):
        run(tiny_checkpoint, tmp_path / "parts", method, callbacks=[InterruptAtThree()])
    parts = run(tiny_checkpoint, tmp_path / "parts", method, resume=True)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_nothing_is_differentiated(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_, **__: pytest.fail("a backward pass"))
    run(tiny_checkpoint, None, steps=2)


def test_half_weights_are_refused(tiny_checkpoint):
    with pytest.raises(ValueError, match="cannot train weights of type torch.bfloat16") as error:
        run(tiny_checkpoint, None, "bitfit", "bfloat16")
    assert len(str(error.value).splitlines()) == 2


def test_the_rate_of_another_optimizer_is_not_taken(tiny_checkpoint, tmp_path):
    from ssmtune.cli.main import parse
    from ssmtune.cli.train import run as command

    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": " b"}\n')
    words = ["train", tiny_checkpoint, "--data", str(tmp_path / "data.jsonl"), "--train.optimizer", "mezo"]
    with pytest.raises(ConfigError, match="train.lr is not set, and the default of state-offset is one for AdamW"):
        command(parse(words))
