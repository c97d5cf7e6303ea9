"""One timed training step of a Mamba: which implementation, which fine-tuning method; and what is right for it."""

import gc
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM
from transformers.models.mamba import modeling_mamba
from transformers.utils import logging

import ssmtune
import ssmtune.tuners  # noqa: F401  peft takes seconds to import: once, before processes are forked from this module
from benchmarks.peers.authors_mixer import use_authors_way
from benchmarks.peers.unbind_mixer import use_unbind_loop
from ssmtune.measure.specs import OURS
from ssmtune.measure.timing import Disagreement, Lap, gpu_peak_memory, laps, verify
from ssmtune.methods import apply_method
from ssmtune.ops import backend

PATCHED = (*OURS, "ssmtune")
"""Backends of a patched model: one of ssmtune's for every operator, or the best for each."""

VALUE_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
"""Two layers in float32 against float64; and the losses of the whole model against each other."""


@dataclass(frozen=True)
class StepSpec:
    """A training step by name, so that another process can build it.

    `backend` is one of ssmtune's (the model is patched), mambapy, unbind loop, transformers, authors (State-offset and
    Initial State Tuning as they released it), or gemm: only the matrix products of the linear layers of the patched
    model's step. With `optimizer` AdamW takes a step too, of size zero, so that every run is the same.
    """

    backend: str
    method: str  # full, state-offset, lora
    batch: int
    seqlen: int
    layers: int = 24
    width: int = 768
    vocabulary: int = 1024
    dstate: int = 16
    tags: tuple[str, ...] = ()
    device: str = "cpu"
    dtype: str = "float32"
    optimizer: bool = False

    @property
    def stages(self) -> tuple[str, ...]:
        """What one run consists of."""
        return ("fwd", "bwd", "optimizer") if self.optimizer else ("fwd", "bwd")

    @property
    def variant(self) -> str:
        """Method, depth and tags as one entry of a table."""
        return " ".join((f"{self.method} {self.layers} layers", *self.tags))

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"{self.backend} training step {self.batch} x {self.seqlen} {self.variant}"

    def case(self) -> "StepCase | GemmCase":
        """Make it ready to run, here."""
        return GemmCase(self) if self.backend == "gemm" else StepCase(self)


@cache
def _model(spec: StepSpec, dtype: torch.dtype) -> nn.Module:
    logging.set_verbosity_error()  # transformers warns that it is slow, which is what is measured here
    torch.manual_seed(0)
    with torch.device(spec.device):
        model = MambaForCausalLM(
            MambaConfig(
                vocab_size=spec.vocabulary,
                hidden_size=spec.width,
                state_size=spec.dstate,
                num_hidden_layers=spec.layers,
                use_mambapy=spec.backend == "mambapy",
                use_cache=False,
            )
        ).to(dtype)
    if spec.backend == "transformers" and find_spec("causal_conv1d") is None:
        leave_out_fused_block()
    if spec.backend == "authors":
        return use_authors_way(model, spec.method).train()
    if spec.backend == "unbind loop":
        use_unbind_loop(model)
    elif spec.backend in PATCHED:
        ssmtune.patch(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for what it has renamed
        return apply_method(model, spec.method).train()


def leave_out_fused_block() -> None:
    """Have transformers, in this process, run mamba_ssm's scan by itself.

    mamba_ssm's fused block fails without the package causal_conv1d, and transformers takes it where mamba_ssm is.
    """
    modeling_mamba.mamba_inner_fn = lambda *args, **kwargs: None


def build(spec: StepSpec, dtype: torch.dtype) -> nn.Module:
    """The model of a spec, kept for the next step of the same one whatever its batch."""
    backend = "cpu" if spec.backend == "gemm" else spec.backend  # its layers are looked at, its scan does not matter
    return _model(replace(spec, backend=backend, batch=0, seqlen=0, tags=(), optimizer=False), dtype)


def forget_models() -> None:
    """Free every model that is kept."""
    _model.cache_clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class StepCase:
    """Forward and backward of a causal language model, and the optimizer where the spec has one."""

    def __init__(self, spec: StepSpec, dtype: torch.dtype | None = None):
        dtype = dtype or getattr(torch, spec.dtype)
        self.spec, self.label, self.stages = spec, spec.label, spec.stages
        self.model = build(spec, dtype)
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(spec.vocabulary, (spec.batch, spec.seqlen), generator=generator).to(spec.device)
        self.named = None
        if spec.backend in PATCHED:
            self.named = "reference" if dtype == torch.float64 else spec.backend.replace("ssmtune", "auto")
        self.optimizer = None
        if spec.optimizer:
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            self.optimizer = torch.optim.AdamW(trained, lr=0.0, fused=spec.device == "cuda")
        self._losses: list[float] = []
        self.logits: Tensor | None = None

    def backend(self) -> AbstractContextManager:
        """Within it ssmtune runs on the backend of the spec or fails."""
        return backend(self.named) if self.named else nullcontext()

    def run(self) -> Iterator[None]:
        """Forward, backward, optimizer, with a yield after each."""
        with self.backend():
            output = self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False)
        yield
        output.loss.backward()
        yield
        if self.optimizer is not None:
            self.optimizer.step()
            yield
        self._losses.append(output.loss.item())
        self.logits = output.logits.detach()

    def losses(self) -> list[float]:
        """The loss of each run so far."""
        return self._losses

    def time(self) -> list[Lap]:
        self.model.zero_grad(set_to_none=True)
        measured = laps(self.run(), self.spec.device)
        self.logits = None
        return measured

    def peak(self) -> int:
        """Run once on a GPU: the peak of all memory, that of the model and the optimizer's included, in bytes."""
        self.model.zero_grad(set_to_none=True)
        self.logits = None
        held = torch.cuda.memory_allocated()
        return held + gpu_peak_memory(self.run())

    def free(self) -> None:
        """Let go of the model; the losses stay."""
        self.model = self.optimizer = self.logits = None
        forget_models()

    def values(self, channels: slice | None = None) -> tuple[dict[str, Tensor], float]:
        self.model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        for _ in self.run():
            pass
        seconds = time.perf_counter() - start
        gradients = {name: value.grad for name, value in self.model.named_parameters() if value.grad is not None}
        logits, self.logits = self.logits, None
        return {name: value.cpu() for name, value in {"out": logits, **gradients}.items()}, seconds


@dataclass(frozen=True)
class Product:
    """The matrix products that one linear layer owes in a step."""

    weight: Tensor  # (outputs, inputs)
    rows: int
    input_gradient: bool
    weight_gradient: bool


def products(model: nn.Module, tokens: Tensor) -> list[Product]:
    """Watch one forward pass, and list the matrix products of its linear layers, forward and backward."""
    found: list[Product] = []

    def watch(layer: nn.Linear, arguments: tuple[Tensor], output: Tensor) -> None:
        (x,) = arguments
        found.append(Product(layer.weight, x.numel() // x.shape[-1], x.requires_grad, layer.weight.requires_grad))

    hooks = [module.register_forward_hook(watch) for module in model.modules() if isinstance(module, nn.Linear)]
    try:
        model(input_ids=tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


class GemmCase:
    """The matrix products of a step and nothing else: what no kernel of the scan can go below."""

    def __init__(self, spec: StepSpec):
        self.spec, self.label, self.stages = spec, spec.label, spec.stages
        step = StepCase(spec)
        self.products = products(step.model, step.tokens)
        self.buffers: dict[tuple[str, int, int], Tensor] = {}

    def buffer(self, role: str, rows: int, columns: int) -> Tensor:
        """An operand or result of that size, shared by all layers."""
        key = (role, rows, columns)
        if key not in self.buffers:
            self.buffers[key] = torch.randn(rows, columns)
        return self.buffers[key]

    @torch.no_grad()
    def run(self) -> Iterator[None]:
        for product in self.products:
            outputs, inputs = product.weight.shape
            x, y = self.buffer("x", product.rows, inputs), self.buffer("y", product.rows, outputs)
            torch.mm(x, product.weight.t(), out=y)
        yield
        for product in reversed(self.products):
            outputs, inputs = product.weight.shape
            x, dy = self.buffer("x", product.rows, inputs), self.buffer("dy", product.rows, outputs)
            if product.input_gradient:
                torch.mm(dy, product.weight, out=self.buffer("dx", product.rows, inputs))
            if product.weight_gradient:
                torch.mm(dy.t(), x, out=self.buffer("dw", outputs, inputs))
        yield

    def time(self) -> list[Lap]:
        return laps(self.run())


def verify_small(spec: StepSpec, factor: float = 1) -> None:
    """Hold two layers of a spec, full width and short, to the same in float64: logits and every gradient.

    Full fine-tuning is held to transformers' own scan; a method that only a patched model can run, to the plain PyTorch
    reference in float64. What a method adds starts at zero, so it is moved away from there first.

    Args:
        spec: of what is about to be timed.
        factor: times the tolerances.

    Raises:
        Disagreement: a result is further away than float32 rounding explains.
    """
    small = replace(spec, layers=2, batch=2, seqlen=48, dtype="float32", optimizer=False)
    # where mamba_ssm is installed, transformers would take its kernels
    upstream = spec.method == "full" and spec.device == "cpu"
    oracle = replace(small, backend="transformers" if upstream else "reference")
    right, tried = StepCase(oracle, torch.float64), StepCase(small)
    if spec.method != "full":
        generator = torch.Generator().manual_seed(1)
        theirs = dict(right.model.named_parameters())
        with torch.no_grad():
            for name, value in tried.model.named_parameters():
                if value.requires_grad:
                    value.add_(0.05 * torch.randn(value.shape, generator=generator).to(value.device))
                    theirs[name].copy_(value)
    expected, _ = right.values()
    missing = {name for name, value in tried.model.named_parameters() if value.requires_grad} - set(expected)
    if missing:
        raise Disagreement(f"{spec.label}: {', '.join(sorted(missing))} has no gradient in float64.")
    limits = factor * VALUE_TOLERANCE, factor * GRADIENT_TOLERANCE
    verify(tried, expected, None, *limits)
    forget_models()


def check_losses(cases: Sequence[StepCase]) -> None:
    """Every implementation and method starts from the same model, so every run of every one has the same loss.

    Raises:
        Disagreement: one has another loss than the first.
    """
    first = cases[0].losses()[0]
    for case in cases:
        for loss in case.losses():
            if not abs(loss - first) <= LOSS_TOLERANCE[case.spec.dtype] * abs(first):
                raise Disagreement(
                    f"{case.label}: the loss is {loss:.6f}, that of {cases[0].label} {first:.6f}.\n"
                    "  Both start from the same weights and tokens, so their times cannot be compared."
                )


def memory_probe(spec: StepSpec) -> Iterator[None]:
    """For `measure.peak_memory`: one step, gradients included, above the model and what a short step leaves behind."""
    short = StepCase(replace(spec, batch=1, seqlen=8))
    short.time()
    short.model.zero_grad(set_to_none=True)
    case = StepCase(spec)
    yield
    case.time()
