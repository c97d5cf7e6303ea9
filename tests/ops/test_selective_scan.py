"""selective_scan against the plain recurrence in float64: out, last_state and every gradient."""

import itertools
import random
from dataclasses import dataclass

import pytest
import torch
from numerics import assert_close, error_ratio

from ssmtune.ops import selective_scan
from ssmtune.ops.reference import selective_scan_reference

OPTIONAL = ("D", "z", "delta_bias", "initial_state", "state_offset", "output_offset")
LAYOUTS = ("first", "last", "last", "first-strided", "last-strided", "odd")
SEQLENS = (1, 1, 2, 3, 7, 17, 31, 63, 64, 65, 100, 129)
# for an interpreter, whose chunks are of 4 steps
FEW_STEPS = (1, 1, 2, 3, 4, 5, 8, 9)
# the gradient of the initial state is a product of all decays, each rounded to float32 by up to 2**-24
ERROR_PER_STEP = {"dinitial_state": 2**-25}


@dataclass(frozen=True)
class Case:
    seed: int
    sizes: tuple[int, int, int, int]
    dtype: torch.dtype
    optional: tuple[str, ...]
    per_row: tuple[str, ...]
    layouts: tuple[tuple[str, str], ...]
    delta_softplus: bool
    loss: str
    groups: int | None
    lengths: tuple[int, ...] | None

    def __str__(self) -> str:
        sizes = "-".join(f"{letter}{size}" for letter, size in zip("BDLN", self.sizes, strict=True))
        flags = [name if name not in self.per_row else f"{name}*" for name in self.optional]
        flags += ["softplus"] if self.delta_softplus else []
        flags += [f"groups{self.groups}"] if self.groups else []
        flags += [f"packed{len(self.lengths)}"] if self.lengths else []
        return "-".join([f"{self.seed}", sizes, *flags, self.loss, str(self.dtype).removeprefix("torch.")])


def random_case(seed: int, seqlens: tuple[int, ...] = SEQLENS) -> Case:
    chance = random.Random(seed)
    # not a single channel: a gradient of one number may cancel to almost nothing, and is then no scale for its error
    batch, dim = chance.choice((1, 1, 2, 3)), chance.choice((3, 5, 8, 15, 16, 17, 20, 33, 48))
    seqlen, dstate = chance.choice(seqlens), chance.randint(1, 40)
    dstate = chance.choice((8, 16, dstate, dstate))
    if chance.random() < 0.1:
        dim, dstate = min(dim, 17), chance.choice((64, 65, 100, 128, 128, 255, 256))
    lengths = None
    if chance.random() < 0.3:
        lengths = tuple(chance.choice(seqlens) for _ in range(chance.randint(1, 5)))
        batch, seqlen = 1, sum(lengths)
    groups = chance.choice([n for n in range(1, dim + 1) if dim % n == 0]) if chance.random() < 0.3 else None
    optional = tuple(name for name in OPTIONAL if chance.random() < 0.6)
    return Case(
        seed=seed,
        sizes=(batch, dim, seqlen, dstate),
        dtype=chance.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16)),
        optional=optional,
        per_row=tuple(name for name in optional if name in OPTIONAL[3:] and chance.random() < 0.5),
        layouts=tuple((name, chance.choice(LAYOUTS)) for name in ("u", "delta", "B", "C", "z", "dout")),
        delta_softplus=chance.random() < 0.7,
        loss=chance.choice(("both", "both", "out", "last_state")),
        groups=groups,
        lengths=lengths,
    )


CASES = [random_case(seed) for seed in range(300)]
# each group takes programs of its own
SHORT_CASES = [case for seed in range(1000, 1045) if ((case := random_case(seed, FEW_STEPS)).groups or 1) <= 6]
# one after the other where they share what is expected
CASES_OF_BACKENDS = [(backend, case) for case in CASES for backend in ("reference", "cpu")]
CASES_OF_BACKENDS += [("triton", case) for case in SHORT_CASES]


def run(scan, inputs, case, dtype=None, **kwargs):
    """Return out, last_state and the gradients of all inputs, computed in dtype."""
    inputs = {
        name: (tensor if dtype is None else tensor.to(dtype)).detach().requires_grad_()
        for name, tensor in inputs.items()
    }
    if case.lengths:
        kwargs["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(case.lengths)])
    out, last_state = scan(**inputs, delta_softplus=case.delta_softplus, **kwargs)
    generator = torch.Generator().manual_seed(case.seed)
    weights = {
        "out": torch.randn(out.shape, generator=generator, dtype=torch.float64).to(case.dtype).to(out.dtype),
        "last_state": torch.randn(last_state.shape, generator=generator).to(last_state.dtype),
    }
    results = {"out": out, "last_state": last_state}
    asked = ("out", "last_state") if case.loss == "both" else (case.loss,)
    gradients = torch.autograd.grad(
        [results[name] for name in asked],
        list(inputs.values()),
        [weights[name] for name in asked],
        allow_unused=True,
    )
    for (name, tensor), gradient in zip(inputs.items(), gradients, strict=True):
        results[f"d{name}"] = torch.zeros_like(tensor) if gradient is None else gradient
    return {name: result.detach() for name, result in results.items()}


_expected = {}


def expected_results(case, inputs):
    """Return the results in float64, and for each the error PyTorch itself makes in float32."""
    if case.seed not in _expected:
        exact = run(selective_scan_reference, inputs, case, torch.float64)
        single = run(selective_scan_reference, inputs, case, torch.float32)
        _expected[case.seed] = exact, {name: error_ratio(exact[name], single[name]) for name in exact}
    return _expected[case.seed]


@pytest.mark.parametrize(("backend", "case"), CASES_OF_BACKENDS, indirect=["backend"], ids=str)
def test_selective_scan(case, backend, scan_inputs, poison_empty):
    inputs = scan_inputs(
        *case.sizes,
        optional=case.optional,
        per_row=case.per_row,
        layouts=dict(case.layouts),
        delta_softplus=case.delta_softplus,
        dtype=case.dtype,
        seed=case.seed,
        groups=case.groups,
        rows=len(case.lengths) if case.lengths else None,
    )
    exact, single_error = expected_results(case, inputs)
    actual = run(selective_scan, inputs, case, return_last_state=True, backend=backend)

    assert actual["out"].dtype == case.dtype and actual["last_state"].dtype == torch.float32
    seqlen = max(case.lengths) if case.lengths else case.sizes[2]
    for name, value in actual.items():
        allowed = max(4 * single_error[name], 1e-6, ERROR_PER_STEP.get(name, 0) * seqlen)
        if value.dtype in (torch.bfloat16, torch.float16):
            # what rounding the exact result to this dtype costs
            allowed += 1.5 * error_ratio(exact[name], exact[name].to(value.dtype))
        assert_close(name, exact[name], value, allowed)


def gradcheck_inputs(scan_inputs, per_row=(), groups=None):
    return scan_inputs(2, 3 * (groups or 1), 5, 4, dtype=torch.float64, per_row=per_row, groups=groups)


@pytest.mark.parametrize("groups", [None, 1, 2], ids=["no-groups", "1-group", "2-groups"])
@pytest.mark.parametrize("per_row", [(), OPTIONAL[3:]], ids=["shared", "per-row"])
def test_selective_scan_gradcheck(scan_inputs, per_row, groups):
    inputs = {name: tensor.requires_grad_() for name, tensor in gradcheck_inputs(scan_inputs, per_row, groups).items()}

    def scan(*tensors):
        named = dict(zip(inputs, tensors, strict=True))
        return selective_scan(**named, delta_softplus=True, return_last_state=True)

    assert torch.autograd.gradcheck(scan, tuple(inputs.values()))


@pytest.mark.parametrize("wanted", [("state_offset",), ("output_offset",), ("D",), OPTIONAL[4:]], ids="-".join)
@pytest.mark.parametrize("groups", [None, 2], ids=["no-groups", "2-groups"])
@pytest.mark.parametrize("per_row", [(), OPTIONAL[3:]], ids=["shared", "per-row"])
def test_selective_scan_gradcheck_without_scan(scan_inputs, wanted, per_row, groups):
    inputs = gradcheck_inputs(scan_inputs, per_row, groups)

    def scan(*tensors):
        return selective_scan(**{**inputs, **dict(zip(wanted, tensors, strict=True))}, delta_softplus=True)

    assert torch.autograd.gradcheck(scan, tuple(inputs[name].requires_grad_() for name in wanted))


def test_selective_scan_reference_gradcheck(scan_inputs):
    inputs = {name: tensor.requires_grad_() for name, tensor in gradcheck_inputs(scan_inputs).items()}

    def scan(*tensors):
        return selective_scan_reference(**dict(zip(inputs, tensors, strict=True)), delta_softplus=True)

    assert torch.autograd.gradcheck(scan, tuple(inputs.values()))


def test_selective_scan_of_transformers(tiny_mamba):
    # a recurrence written by others, without offsets
    mixer = tiny_mamba.backbone.layers[0].mixer
    hidden = torch.randn(2, 9, 32)
    with torch.no_grad():
        expected = mixer(hidden)
        x, z = mixer.in_proj(hidden).transpose(1, 2).chunk(2, dim=1)
        x = torch.nn.functional.silu(mixer.conv1d(x)[..., :9])
        dt, B, C = mixer.x_proj(x.transpose(1, 2)).split([mixer.time_step_rank, 8, 8], dim=-1)
        out = selective_scan(
            x,
            (dt @ mixer.dt_proj.weight.T).transpose(1, 2),
            -torch.exp(mixer.A_log),
            B.transpose(1, 2),
            C.transpose(1, 2),
            mixer.D,
            z,
            mixer.dt_proj.bias,
            True,
        )
        actual = mixer.out_proj(out.transpose(1, 2))
    assert_close("mixer output", expected, actual, 1e-5)
