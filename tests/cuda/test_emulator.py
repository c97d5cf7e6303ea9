"""The emulator finds each kind of fault that it is there to find, and none in sound kernels."""

import ctypes
from pathlib import Path

import pytest
import torch

FAULTS = Path(__file__).with_name("emulator") / "faults.cu"
ORDERS = range(4)
THREADS = 64


@pytest.fixture(scope="module")
def run_kernel(emulated_library):
    """`run_kernel(name)` gives what the emulator says, and the output, NaN before."""
    library = ctypes.CDLL(emulated_library("faults", [FAULTS]))
    library.run_kernel.restype = ctypes.c_char_p

    def run(name: str, order: int = 0, blocks: int = 2, shared_floats: int = THREADS):
        x, y = torch.arange(blocks * THREADS).float(), torch.full((blocks * THREADS,), float("nan"))
        pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, y))
        return library.run_kernel(name.encode(), order, blocks, shared_floats, *pointers).decode(), y

    return run


@pytest.mark.parametrize("order", ORDERS)
def test_sound_kernels_run_in_any_order(run_kernel, order):
    sums = torch.arange(4 * 32).float().view(4, 32).sum(1)
    message, y = run_kernel("block_sum", order)
    assert message == "" and y[:2].tolist() == sums.view(2, 2).sum(1).tolist()
    message, y = run_kernel("warp_sum", order)
    assert message == "" and torch.equal(y.view(4, 32), sums[:, None].expand(4, 32))


def test_dropped_barrier(run_kernel):
    right = run_kernel("block_sum")[1][:2]
    assert any(not torch.equal(run_kernel("dropped_barrier", order)[1][:2], right) for order in ORDERS)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "kernel, message",
    [
        ("divergent_barrier", "a barrier is not met by the whole block: "),
        ("two_barriers", "a barrier is not met by the whole block: "),
        ("divergent_shuffle", "the lanes of a warp diverge: "),
        ("shuffle_outside_its_mask", "a value was asked of a lane outside the mask: "),
        ("missing_from_its_mask", "the lanes of a warp diverge: |not in its own mask: "),
    ],
)
def test_divergence(run_kernel, kernel, message, order):
    found, _ = run_kernel(kernel, order)
    assert found.startswith(tuple(message.split("|"))), found
    # it says where
    assert "faults.cu:" in found


def test_unwritten_memory_is_nan(run_kernel):
    message, y = run_kernel("reads_unwritten_shared_memory")
    assert message == "" and y.isnan().all()
    message, y = run_kernel("leaves_a_hole", blocks=1)
    assert message == "" and y.isnan().nonzero().tolist() == [[7]]


def test_launches_that_no_gpu_takes(run_kernel):
    assert run_kernel("warp_sum", shared_floats=48 * 256)[0] == ""
    assert run_kernel("warp_sum", shared_floats=48 * 256 + 1)[0] == "invalid value"
    assert run_kernel("warp_sum", blocks=0)[0].startswith("no GPU runs (0, 1, 1) blocks")


@pytest.mark.parametrize("kernel", ["writes_past_shared_memory", "reads_past_an_input", "warp_sum"])
def test_out_of_bounds_under_address_sanitizer(emulated_library, sanitized, kernel):
    library = emulated_library("faults-sanitized", [FAULTS], sanitize=True)
    floats = f"(ctypes.c_float * {THREADS})()"
    call = f"ctypes.CDLL({str(library)!r}).run_kernel({kernel.encode()!r}, 0, 1, {THREADS}, {floats}, {floats})"
    done = sanitized("-c", f"import ctypes; {call}")
    if kernel == "warp_sum":
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stderr
        assert f"in {kernel}" in done.stderr.replace("(anonymous namespace)::", "")
