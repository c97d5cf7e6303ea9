"""Which implementation runs an operator, and why the others cannot.

`auto` takes the first of cuda, triton, cpu and reference that can run the call, and logs its choice. A backend asked
for by name, as an argument, by `with backend(...)` or through SSMTUNE_BACKEND, runs or raises with the reason.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch

from ssmtune import native
from ssmtune.ops import causal_conv1d_package

ENVIRONMENT_VARIABLE = "SSMTUNE_BACKEND"
OPERATORS = ("selective_scan", "selective_state_update", "causal_conv1d", "causal_conv1d_update", "ssd_scan")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

logger = logging.getLogger("ssmtune")


class Call(NamedTuple):
    """What a backend must know of a call to take or refuse it.

    `refusals` holds what the operator found out itself: reasons why backends cannot take its arguments.
    """

    device: str
    dtype: torch.dtype
    asked_by_name: bool
    refusals: Mapping[str, str | None]


@dataclass(frozen=True)
class Backend:
    """One implementation of some operators.

    Attributes:
        name: what users call it.
        title: what it is called in a sentence.
        module: the module that holds its implementations, None while there are none.
        operators: the operators it implements.
        available: gives None for an operator, or the reason it cannot run here at all.
        accepts: gives None, or the reason it cannot take this call.
    """

    name: str
    title: str
    module: str | None
    operators: tuple[str, ...]
    available: Callable[[str], str | None]
    accepts: Callable[[Call], str | None]

    def why_not(self, op: str) -> str | None:
        """Give None when the backend can run the operator here, or the reason it cannot."""
        if op not in self.operators:
            return f"no {self.title} kernel for {op} in this version"
        return self.available(op)


def _no_gpu() -> str | None:
    return None if torch.cuda.is_available() else f"no GPU found (torch {torch.__version__})"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _triton_available(op: str) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if _interpreted() or torch.cuda.is_available():
        return None
    return f"{_no_gpu()}; set TRITON_INTERPRET=1 before starting Python for slow debugging runs on the CPU"


def _triton_accepts(call: Call) -> str | None:
    if call.dtype not in KERNEL_DTYPES:
        return _wrong_dtype("Triton", call)
    # the interpreter takes milliseconds per step: never by default
    if call.device == "cuda" or (call.asked_by_name and _interpreted()):
        return None
    return f"the Triton kernels take tensors on cuda, got tensors on {call.device}"


# torch.compile cannot trace how a library is loaded
@torch.compiler.assume_constant_result
def why_not_cuda_kernels() -> str | None:
    """Give None when the compiled CUDA kernels are in use, or the reason they are not."""
    return native.cuda_why_not()


def _cuda_available(op: str) -> str | None:
    if not torch.cuda.is_available():
        return _no_gpu()
    if op.startswith("causal_conv1d") and causal_conv1d_package.is_there():
        return None
    return why_not_cuda_kernels()


def _cuda_accepts(call: Call) -> str | None:
    if call.device != "cuda":
        return f"the CUDA kernels take tensors on cuda, got tensors on {call.device}"
    return None if call.dtype in KERNEL_DTYPES else _wrong_dtype("CUDA", call)


def _cpu_accepts(call: Call) -> str | None:
    if call.device != "cpu":
        return f"the CPU kernels take tensors on cpu, got tensors on {call.device}"
    return None if call.dtype in KERNEL_DTYPES else _wrong_dtype("CPU", call)


def _wrong_dtype(title: str, call: Call) -> str:
    return f"the {title} kernels take float32, bfloat16 and float16, got {str(call.dtype).removeprefix('torch.')}"


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            "cuda",
            "CUDA",
            "ssmtune.ops.cuda",
            OPERATORS,
            _cuda_available,
            _cuda_accepts,
        ),
        Backend(
            "triton",
            "Triton",
            "ssmtune.ops.triton",
            OPERATORS,
            _triton_available,
            _triton_accepts,
        ),
        Backend("cpu", "CPU", "ssmtune.ops.cpu", OPERATORS, lambda op: native.why_not(), _cpu_accepts),
        Backend(
            "reference",
            "reference",
            "ssmtune.ops.reference_backend",
            OPERATORS,
            lambda op: None,
            lambda call: None,
        ),
    )
}

_NO_REFUSALS: Mapping[str, str | None] = {}
# a plain variable and not a ContextVar, which torch.compile cannot trace
_wish: str | None = None
_logged: set[tuple[str, str, str]] = set()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the operators called in the body on one backend, whatever the thread.

    Args:
        name: "cuda", "triton", "cpu", "reference", or "auto".

    Raises:
        ValueError: there is no backend of that name.
    """
    global _wish
    _check_name(name, "")
    before = _wish
    _wish = name
    try:
        yield
    finally:
        _wish = before


def backend_asked_for() -> str | None:
    """The name that the `backend` around this call was given: for processes that are to do as this one does."""
    return _wish


def available_backends(op: str) -> dict[str, str | None]:
    """List the backends of an operator.

    Args:
        op: one of OPERATORS, as "selective_scan".

    Returns:
        Each backend in the order of preference: None when it can be used here, else the reason why not.

    Raises:
        ValueError: there is no operator of that name.
    """
    if op not in OPERATORS:
        raise ValueError(
            f"there is no operator {op!r}{_did_you_mean(op, OPERATORS)}\n  Operators are {', '.join(OPERATORS)}."
        )
    return {name: backend.why_not(op) for name, backend in BACKENDS.items()}


def requested() -> str:
    """Name what is asked for here and now, by `with backend(...)` or else through SSMTUNE_BACKEND; "auto" by default.

    Raises:
        ValueError: there is no backend of that name.
    """
    if _wish is not None:
        return _wish
    wish = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    _check_name(wish, f"{ENVIRONMENT_VARIABLE}: ")
    return wish


def choose(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    wish: str | None = None,
    refusals: Mapping[str, str | None] = _NO_REFUSALS,
) -> str:
    """Name the backend that runs a call; `refusals` are reasons why backends cannot take its arguments, by name.

    Raises:
        RuntimeError: the backend that was asked for cannot run the call.
        ValueError: there is no backend of that name.
    """
    if wish is not None:
        _check_name(wish, f"{op}: ")
    else:
        wish = requested()
    call = Call(device.type, dtype, wish != "auto", refusals)
    if wish != "auto":
        reason = BACKENDS[wish].why_not(op) or BACKENDS[wish].accepts(call) or refusals.get(wish)
        if reason is not None:
            # a reason of several lines ends with what to do
            remedy = "" if "\n" in reason else f"\n  Ask for auto, or for one of ssmtune.available_backends({op!r})."
            raise RuntimeError(
                f"{op}: backend {wish!r} was requested but cannot run: {reason.removesuffix('.')}.{remedy}"
            )
        return wish
    for backend in BACKENDS.values():
        if op not in backend.operators or backend.accepts(call) is not None or refusals.get(backend.name) is not None:
            continue
        if backend.available(op) is None:
            if not torch.compiler.is_compiling():
                _log(op, call, backend.name)
            return backend.name
    raise AssertionError("the reference takes every call")


def implementation(name: str) -> ModuleType:
    """Return the module with the implementations of a backend."""
    return import_module(BACKENDS[name].module)


def _log(op: str, call: Call, name: str) -> None:
    if (op, call.device, name) in _logged:
        return
    _logged.add((op, call.device, name))
    expected = BACKENDS["cpu"]
    reason = expected.available(op)
    if name == "reference" and reason is not None and expected.accepts(call) is None:
        logger.warning(
            "%s on %s runs on the reference, which is correct but much slower.\n  The CPU kernels are %s",
            op,
            call.device,
            reason,
        )
    else:
        logger.info("%s on %s runs on backend %s", op, call.device, name)


def _check_name(name: str, where: str) -> None:
    if isinstance(name, str) and (name in BACKENDS or name == "auto"):
        return
    raise ValueError(
        f"{where}there is no backend {name!r}{_did_you_mean(str(name), (*BACKENDS, 'auto'))}\n"
        f"  Backends are {', '.join(BACKENDS)}, or auto for the first of these that can run the call."
    )


def _did_you_mean(name: str, known: tuple[str, ...]) -> str:
    nearest = get_close_matches(name, known, n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else "."
