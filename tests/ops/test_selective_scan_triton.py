"""What is Triton's own in the scan: rows split in segments, layouts taken as they are, the same bits every time.

That its results are right the other tests ask of every backend; here large and odd sizes on a GPU, where there is one.
"""

import os

import pytest
import torch
from numerics import assert_close, error_ratio

from ssmtune.ops import selective_scan
from ssmtune.ops.reference import selective_scan_reference

pytest.importorskip("triton")
kernels = pytest.importorskip("ssmtune.triton_kernels.selective_scan")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
OFFSETS = ("initial_state", "state_offset", "output_offset")
SEQUENCES = ("u", "delta", "B", "C", "z")

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


@pytest.fixture
def few_steps(request, monkeypatch):
    """Chunks of 4 steps, so that 9 cross their bounds."""
    if INTERPRETED:
        request.getfixturevalue("triton_interpreter")
    monkeypatch.setattr(kernels, "CHUNK_SIZE", 4)


@pytest.fixture
def split(few_steps, monkeypatch):
    """As on a GPU so large that each chunk gets a program."""
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: 1000)


def results(scan, inputs, dtype=None, **kwargs):
    """Return out, last_state and the gradients of all inputs, computed in dtype."""
    inputs = {name: (x if dtype is None else x.to(dtype)).detach().requires_grad_() for name, x in inputs.items()}
    out, last_state = scan(**inputs, delta_softplus=True, **kwargs)
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.randn(x.shape, generator=generator).to(torch.bfloat16).to(x.device, x.dtype) for x in (out, last_state)
    ]
    gradients = torch.autograd.grad([out, last_state], list(inputs.values()), weights)
    return {"out": out, "last_state": last_state, **{f"d{name}": x for name, x in zip(inputs, gradients, strict=True)}}


def triton_scan(**kwargs):
    return selective_scan(**kwargs, return_last_state=True, backend="triton")


def check(inputs, **kwargs):
    inputs = {name: x.to(DEVICE) for name, x in inputs.items()}
    exact = results(selective_scan_reference, inputs, torch.float64, **kwargs)
    single = results(selective_scan_reference, inputs, torch.float32, **kwargs)
    seqlen = inputs["u"].shape[2]
    for name, value in results(triton_scan, inputs, **kwargs).items():
        # all decays of a sequence, each rounded to float32, and their product once more
        allowed = max(4 * error_ratio(exact[name], single[name]), 1e-6, 2**-25 * seqlen * (name == "dinitial_state"))
        if value.dtype in (torch.bfloat16, torch.float16):
            allowed += 1.5 * error_ratio(exact[name], exact[name].to(value.dtype))
        assert_close(name, exact[name], value, allowed)


@pytest.mark.parametrize(
    "n_blocks, n_rows, batch, n_chunks, n_multiprocessors, expected",
    [
        # each of the 4 x 132 schedulers has a warp
        (528, 1, 1, 64, 132, 64),
        (128, 8, 8, 64, 132, 64),
        # 4 x 528 / 48 = 44 segments: of 2 chunks, as 64 chunks allow no 44 equal ones
        (48, 1, 1, 64, 132, 2),
        (48, 1, 1, 640, 132, 15),
        (527, 1, 1, 64, 132, 13),
        (48, 4, 4, 64, 132, 6),
        (1, 1, 1, 64, 132, 1),
        (1, 1, 1, 1, 132, 1),
        # packed sequences share the time that is split, and each begins with a segment of its own
        (48, 4, 1, 64, 132, 2),
        (48, 11, 1, 64, 132, 64),
        # the interpreter
        (1, 1, 1, 64, 0, 64),
    ],
)
def test_chunks_of_segment(n_blocks, n_rows, batch, n_chunks, n_multiprocessors, expected):
    assert kernels.chunks_of_segment(n_blocks, n_rows, batch, n_chunks, n_multiprocessors) == expected


@pytest.mark.parametrize(
    "block_d, dstate_offset, expected",
    [(32, False, 2), (16, False, 4), (8, False, 4), (4, False, 2), (2, False, 2), (16, True, 2), (8, True, 2)],
)
def test_steps_ahead(block_d, dstate_offset, expected):
    assert kernels.steps_ahead(block_d, dstate_offset) == expected


@pytest.mark.parametrize(
    "dim, dstate, groups, expected",
    [
        # block_n, block_d, n_blocks: 512 states and 32 channels at most, of one group
        (4096, 16, 1, (16, 32, 128)),
        (4096, 1, 1, (1, 32, 128)),
        (1000, 16, 1, (16, 32, 32)),
        (4096, 64, 1, (64, 8, 512)),
        (4096, 100, 1, (128, 4, 1024)),
        (4096, 256, 1, (256, 2, 2048)),
        (48, 16, 6, (16, 8, 1)),
    ],
)
def test_tile_of_a_program(dim, dstate, groups, expected):
    u, A = torch.empty(1, dim, 64, device="meta"), torch.empty(dim, dstate, device="meta")
    layout = kernels._layout(u, A, torch.empty(1, groups, 64, dstate, device="meta"), None)
    assert (layout.block_n, layout.block_d, layout.n_blocks) == expected


@pytest.mark.parametrize("per_row", [(), OFFSETS], ids=["shared", "per-row"])
@pytest.mark.parametrize("groups", [None, 2], ids=["no-groups", "2-groups"])
def test_segments_equal_the_recurrence(scan_inputs, split, poison_empty, per_row, groups):
    inputs = scan_inputs(2, 6, 11, 3, per_row=per_row, groups=groups)
    # slow decays, so that a segment feels the one before
    inputs["A"] = inputs["A"] * 1e-1
    check(inputs)


@pytest.mark.parametrize("per_row", [(), OFFSETS[:1], OFFSETS], ids=["shared", "initial-state", "per-row"])
@pytest.mark.parametrize("bounds", [(0, 9), (0, 4, 5, 13), (0, 1, 2, 10), (0, 7, 8, 12)], ids=str)
def test_packed_segments_equal_the_recurrence(scan_inputs, split, poison_empty, bounds, per_row):
    # sequences of one segment and of several, beginning where segments would and between
    inputs = scan_inputs(1, 5, bounds[-1], 3, per_row=per_row, rows=len(bounds) - 1)
    inputs["A"] = inputs["A"] * 1e-1
    check(inputs, cu_seqlens=torch.tensor(bounds, device=DEVICE))


@pytest.mark.parametrize("dstate, dim", [(64, 9), (32, 17), (256, 3)])
def test_few_channels_of_many_states(scan_inputs, few_steps, poison_empty, dstate, dim):
    check(scan_inputs(1, dim, 9, dstate))
    check(scan_inputs(1, dim, 9, dstate, optional=("D", "z", "delta_bias")))


@pytest.mark.parametrize("optional", [(), ("z", "initial_state")], ids=["plain", "gated"])
def test_segments_of_several_chunks(scan_inputs, few_steps, monkeypatch, optional):
    monkeypatch.setattr(kernels, "chunks_of_segment", lambda *sizes: 2)
    check(scan_inputs(1, 3, 18, 4, optional=optional))


def test_gradient_of_the_last_state_alone_through_segments(scan_inputs, split):
    inputs = {name: x.requires_grad_() for name, x in scan_inputs(1, 3, 9, 4).items()}
    _, last_state = triton_scan(**inputs, delta_softplus=True)
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    _, expected = selective_scan_reference(**exact, delta_softplus=True)
    for name in ("u", "delta", "A", "B", "initial_state"):
        a, b = (
            torch.autograd.grad(x.square().sum(), y[name], retain_graph=True)[0]
            for x, y in ((expected, exact), (last_state, inputs))
        )
        assert_close(f"d{name}", a, b, 2e-6)


def test_states_that_grow_over_segments(scan_inputs, split):
    # by more than float32 can hold over a segment, from nothing
    inputs = scan_inputs(1, 3, 12, 4, optional=(), delta_softplus=False)
    inputs["A"] = torch.full_like(inputs["A"], 10.0)
    inputs["delta"] = torch.full_like(inputs["delta"], 3.0)
    inputs["B"] = inputs["B"] * (torch.arange(12) >= 11)
    exact = selective_scan_reference(**{name: x.double() for name, x in inputs.items()})
    out, last_state = triton_scan(**inputs)
    assert_close("out", exact[0], out, 1e-5)
    assert_close("last_state", exact[1], last_state, 1e-5)


@pytest.mark.parametrize("is_split", [False, True], ids=["whole", "split"])
def test_same_bits_every_time(scan_inputs, few_steps, monkeypatch, is_split):
    if is_split:
        monkeypatch.setattr(kernels, "chunks_of_segment", lambda *sizes: 1)
    inputs = {name: x.to(DEVICE) for name, x in scan_inputs(1, 40, 5, 4, dtype=torch.bfloat16).items()}
    first, second = results(triton_scan, inputs), results(triton_scan, inputs)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("layout", ["first", "last", "first-strided", "last-strided"])
def test_layout_is_kept_and_nothing_copied(scan_inputs, few_steps, monkeypatch, layout):
    inputs = scan_inputs(1, 6, 9, 4, layouts=dict.fromkeys(SEQUENCES, layout))
    seen, scan = [], kernels.selective_scan_fwd
    monkeypatch.setattr(kernels, "selective_scan_fwd", lambda *args: seen.extend(args) or scan(*args))
    inputs = {name: x.to(DEVICE).requires_grad_() for name, x in inputs.items()}
    out, _ = triton_scan(**inputs, delta_softplus=True)
    assert [x.data_ptr() for x in seen[: len(inputs)]] == [x.data_ptr() for x in inputs.values()]

    gradients = dict(zip(inputs, torch.autograd.grad(out.square().sum(), list(inputs.values())), strict=True))
    for name, x in {"out": out, "du": gradients["u"], "ddelta": gradients["delta"], "dz": gradients["z"]}.items():
        assert (x.transpose(1, 2) if layout.startswith("last") else x).is_contiguous(), name


@pytest.mark.parametrize("trained", ["u", "delta", "A", "B", "C", "z", "delta_bias", "initial_state"])
def test_a_gradient_alone_is_that_of_all(scan_inputs, few_steps, poison_empty, trained):
    inputs = {name: x.to(DEVICE) for name, x in scan_inputs(1, 5, 9, 4).items()}

    def gradients(names):
        for name, x in inputs.items():
            x.requires_grad_(name in names)
        out, last_state = triton_scan(**inputs, delta_softplus=True)
        return dict(
            zip(names, torch.autograd.grad([out.sum() + last_state.sum()], [inputs[n] for n in names]), strict=True)
        )

    # what it shares with others may be rounded another way when it is alone
    assert_close(f"d{trained}", gradients(list(inputs))[trained], gradients([trained])[trained], 1e-6)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.gpu
class TestOnAGPU:
    """Sizes past what the interpreter can do, split in segments and not."""

    SIZES = [
        (1, 1, 1, 1),
        (1, 64, 1, 16),
        (2, 33, 65, 5),
        (1, 1536, 2048, 16),
        (8, 1536, 257, 16),
        (1, 48, 4099, 16),
        (2, 256, 300, 64),
        (1, 96, 500, 256),
    ]

    @pytest.mark.parametrize(
        ("dtype", "layout"),
        [(torch.float32, "last"), (torch.float32, "first"), (torch.bfloat16, "last"), (torch.float16, "first")],
        ids=str,
    )
    @pytest.mark.parametrize("sizes", SIZES, ids=str)
    def test_selective_scan(self, scan_inputs, sizes, layout, dtype):
        check(scan_inputs(*sizes, dtype=dtype, layouts=dict.fromkeys(SEQUENCES, layout)))

    @pytest.mark.parametrize("per_row", [(), OFFSETS], ids=["shared", "per-row"])
    @pytest.mark.parametrize("groups", [None, 4], ids=["no-groups", "4-groups"])
    def test_packed(self, scan_inputs, per_row, groups):
        bounds = [0, 1, 70, 134, 1000, 1024]
        inputs = scan_inputs(1, 200, bounds[-1], 16, per_row=per_row, rows=len(bounds) - 1, groups=groups)
        check(inputs, cu_seqlens=torch.tensor(bounds, device=DEVICE))

    @pytest.mark.parametrize("sizes", [(8, 2048, 512, 16), (1, 256, 4096, 16)], ids=str)
    def test_same_bits_every_time(self, scan_inputs, sizes):
        inputs = {name: x.to(DEVICE) for name, x in scan_inputs(*sizes, dtype=torch.bfloat16).items()}
        first = results(triton_scan, inputs)
        for _ in range(5):
            for name, value in results(triton_scan, inputs).items():
                assert torch.equal(value, first[name]), name

    def test_more_elements_than_an_int32_counts(self):
        # channels-last: the last row and the last step lie past 2**31 elements
        batch, dim, seqlen, dstate = 2, 1024, 2**20 + 3, 2
        u = torch.zeros(batch, seqlen, dim, dtype=torch.bfloat16, device=DEVICE).transpose(1, 2)
        u[:, :, -8:] = 1.0
        rows = torch.ones(batch, dstate, seqlen, dtype=torch.bfloat16, device=DEVICE)
        A = -torch.ones(dim, dstate, device=DEVICE)
        out = selective_scan(u, u, A, rows, rows, backend="triton")
        expected, _ = selective_scan_reference(*(x[..., -8:] for x in (u, u)), A, *(x[..., -8:] for x in (rows, rows)))
        assert_close("out", expected, out[:, :, -8:], 1e-2)
        assert not out[:, :, :-8].any()
