"""What `ssmtune bench` measures: groups of cases that are timed in turns."""

from collections.abc import Iterable

from ssmtune.measure.conv_cases import ConvSpec
from ssmtune.measure.inputs import Shape
from ssmtune.measure.peers import PEERS, usable
from ssmtune.measure.scan_cases import ScanSpec
from ssmtune.measure.specs import Spec, available
from ssmtune.measure.update_cases import UpdateSpec
from ssmtune.measure.update_cases import peers as update_peers

# dim 1536 is Mamba-130m (width 768, expanded twice); 4096 is Mamba-1.4b
SHAPES = {
    ("cpu", "quick"): [*(Shape(1, 512, 2**power) for power in range(7, 12)), Shape(1, 1536, 512)],
    ("cpu", "full"): [*(Shape(1, 1536, 2**power) for power in range(9, 14)), Shape(4, 1536, 512), Shape(1, 4096, 1024)],
    ("cuda", "quick"): [*(Shape(1, 1536, 2**power) for power in range(9, 15)), Shape(8, 4096, 2048)],
    ("cuda", "full"): [
        *(Shape(1, 1536, 2**power) for power in range(9, 17)),
        *(Shape(8, 4096, 2**power) for power in range(9, 13)),
        Shape(16, 1536, 2048),
        Shape(1, 8192, 4096),
    ],
}
STEPS = (Shape(1, 1536, 1), Shape(8, 1536, 1), Shape(64, 4096, 1))
PRESETS = ("quick", "full")

LOOP_ELEMENTS = 2**20
"""The largest scan that a PyTorch loop is timed on where there is a GPU."""


def plan(device: str, preset: str) -> list[list[Spec]]:
    """Every operator of a preset, on each kernel of ssmtune that runs on a device and against each peer."""
    half = ("bfloat16",) if device == "cuda" else ()
    groups: list[list[Spec]] = []
    for shape in SHAPES[device, preset]:
        group: list[Spec] = []
        for direction in ("fwd", "fwdbwd"):
            group += [ScanSpec(shape, direction, name, half, device) for name in available("selective_scan", device)]
            group += scan_peers(shape, direction, device, half)
        groups.append(group)
    wide = SHAPES[device, preset][-1]
    names = (*available("causal_conv1d", device), "torch")
    ways = [(direction, name) for direction in ("fwd", "fwdbwd") for name in names]
    groups.append([ConvSpec(wide, *way, ("silu", *half), device) for way in ways])
    for shape in STEPS:
        ours = [UpdateSpec(shape, "fwd", name, half, device) for name in available("selective_state_update", device)]
        groups.append([*ours, *update_peers(shape, device, half)])
    return groups


def scan_peers(shape: Shape, direction: str, device: str, half: tuple[str, ...] = ()) -> Iterable[ScanSpec]:
    """The same scan by every other implementation for which it is not too long."""
    there, _ = usable(device)
    for name in there:
        peer = PEERS[name]
        if direction != "fwd" and not peer.linear_backward:
            continue
        if name == "transformers" and device == "cuda" and shape.batch * shape.dim * shape.seqlen > LOOP_ELEMENTS:
            continue
        yield ScanSpec(shape, direction, name, (*peer.tags, *(half if peer.half else ())), device)
