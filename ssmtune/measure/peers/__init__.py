"""Other implementations of the selective scan that ssmtune is timed against.

Each peer is a function `scan(u, delta, A, B, C, D, z, delta_bias) -> out` with softplus on delta, in the shapes of
`ssmtune.selective_scan`. A peer that cannot run here gives its reason and is left out, never replaced.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ssmtune.measure.peers import mamba_ssm_scan, mambapy_scan, plain_scan, transformers_scan, unbind_loop


@dataclass(frozen=True)
class Peer:
    """One implementation: how it is called and what it can do."""

    name: str
    scan: Callable[..., Tensor]
    why_not: Callable[[], str | None]
    devices: tuple[str, ...] = ("cpu",)
    linear_backward: bool = True
    """False where there is no backward pass, or one whose time is quadratic in seqlen."""
    half: bool = False
    """Whether it takes sequences in a half type beside weights in float32."""
    tags: tuple[str, ...] = ()
    """Those of its cases: the layout that it takes without a copy, where that is not channels-last."""


FIRST = ("channels-first",)
PEERS = {
    peer.name: peer
    for peer in (
        Peer("mambapy", mambapy_scan.scan, mambapy_scan.why_not),
        Peer("unbind loop", unbind_loop.scan, lambda: None),
        Peer("transformers", transformers_scan.scan, transformers_scan.why_not, ("cpu", "cuda"), linear_backward=False),
        Peer("plain C++", plain_scan.scan, plain_scan.why_not, linear_backward=False, tags=FIRST),
        Peer("mamba_ssm", mamba_ssm_scan.scan, mamba_ssm_scan.why_not, ("cuda",), half=True, tags=FIRST),
    )
}


def usable(device: str = "cpu") -> tuple[dict[str, Peer], dict[str, str]]:
    """The peers that can run on `device`, and the reasons of those that cannot."""
    there, missing = {}, {}
    for name, peer in PEERS.items():
        if device not in peer.devices:
            continue
        reason = peer.why_not()
        if reason is None:
            there[name] = peer
        else:
            missing[name] = reason
    return there, missing
