"""Tensors that autograd keeps as the way to make them again, where that costs less than their memory is worth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import _autograd
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode


class Recomputation:
    """A stretch of a forward pass whose results are made again in the backward pass rather than kept for it.

    `made.by(function, ...)` calls a function. Whatever wants to save its results inside of the `with` statement, as a
    module does that is called with them, saves how they were made instead; so does the function itself with all that
    is not among its arguments. The rest is saved as always, also by hooks around this, as those of gradient
    checkpointing. No module is called a second time.

    Nothing of this happens while gradients are off, or while torch.compile traces: a compiler decides what to keep.

    Args:
        enabled: False for a stretch that keeps everything.

    Example:
        >>> with Recomputation() as made:
        ...     u = made.by(causal_conv1d, x, weight)
        ...     y = projection(u)  # its backward pass needs u, and has x and weight to make it from
    """

    def __init__(self, enabled: bool = True):
        self._enabled = enabled
        self._hooks: saved_tensors_hooks | None = None
        self._saved: list[_Saved] = []
        self._made: _Made = {}

    def __enter__(self) -> Recomputation:
        # Inside of torch.func's transforms there are no hooks.
        if (
            self._enabled
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and _autograd._saved_tensors_hooks_is_enabled()
        ):
            self._around = _autograd._top_saved_tensors_default_hooks(False)
            self._hooks = saved_tensors_hooks(self._save, _Saved.read)
            self._hooks.__enter__()
        return self

    def __exit__(self, kind, *error) -> None:
        if self._hooks is None:
            return
        self._hooks.__exit__(kind, *error)
        # The graph holds the hooks, and with them this object, for as long as it lives.
        made, saved, self._made, self._saved = self._made, self._saved, {}, []
        if kind is None:
            with torch.no_grad():
                for each in saved:
                    each.settle(made, self._around)

    def by(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function, and remember the call as what its results are made by.

        Args:
            function: it gives the same whenever it is called, draws no random numbers, and reads no tensors but those
                it is given.
            args, kwargs: tensors and anything else, none of them changed before the backward pass.

        Returns:
            What the function gives: a tensor, or a tuple of them.
        """
        if self._hooks is None:
            return function(*args, **kwargs)
        first = len(self._saved)
        results = function(*args, **kwargs)
        call = _Call(function, args, kwargs, len(_tensors(results)))
        given = {_storage(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor)}
        for place, tensor in enumerate((*_tensors(results), *(saved.tensor for saved in self._saved[first:]))):
            if _storage(tensor) not in given:
                self._made.setdefault(_storage(tensor), (call, place, tensor, tensor._version))
        return results

    def casting(self) -> AbstractContextManager:
        """Within it what is made here is cast by `Tensor.to` as if by `by`, as adapters of another dtype do."""
        return nullcontext() if self._hooks is None else _Casts(self)

    def makes(self, tensor: Any) -> bool:
        """Whether a tensor is the result of a call, or a view of one."""
        return isinstance(tensor, Tensor) and _storage(tensor) in self._made

    def _save(self, tensor: Tensor) -> _Saved:
        self._saved.append(_Saved(tensor))
        return self._saved[-1]


class _Casts(TorchFunctionMode):
    def __init__(self, made: Recomputation):
        super().__init__()
        self._recomputation = made

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is Tensor.to and self._recomputation.makes(args[0]):
            return self._recomputation.by(function, *args, **kwargs)
        return function(*args, **kwargs)


class _Saved:
    """A tensor for the backward pass: itself, or what hooks made of it, or a view of what a call makes."""

    def __init__(self, tensor: Tensor):
        self.tensor, self.version, self.requires_grad = tensor, tensor._version, tensor.requires_grad
        self.packed = self.call = None

    def settle(self, made: _Made, around: tuple[Callable, Callable] | None) -> None:
        """Decide which of them."""
        tensor = self.tensor
        call, place, result, version = made.get(_storage(tensor), (None, 0, None, 0))
        if call is not None and (tensor.dtype, self.version) == (result.dtype, version):
            self.call, self.tensor = call, None
            self.place, self.view = place, (tensor.size(), tensor.stride(), tensor.storage_offset())
            call.expect(place, made, around)
        elif around is not None:
            pack, self.unpack = around
            self.packed, self.tensor = pack(tensor), None
        else:
            self.tensor = tensor.detach()

    def read(self) -> Tensor:
        if self.call is not None:
            return self.call.take(self.place).as_strided(*self.view)
        if self.tensor is None:
            return self.unpack(self.packed)
        # With hooks autograd leaves this check to them.
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)} that the backward pass of a mixer needs was changed in "
                f"place,\n  from version {self.version} to {self.tensor._version}. Change it after the backward pass, "
                "or run the forward pass again."
            )
        return self.tensor


class _Call:
    """A call that can be made again, and those of its values that wait for a reader since it was."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], n_results: int):
        self.function, self.n_results = function, n_results
        self.args = [_Saved(value) if isinstance(value, Tensor) else value for value in args]
        self.kwargs = {name: _Saved(value) if isinstance(value, Tensor) else value for name, value in kwargs.items()}
        device = next(value.tensor.device.type for value in self._given())
        self.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        self.readers: Counter[int] = Counter()
        self.waiting: dict[int, tuple[Tensor, int]] = {}

    def expect(self, place: int, made: _Made, around: tuple[Callable, Callable] | None) -> None:
        """Count a reader of a value. Without any the arguments are not kept."""
        if not self.readers:
            for value in self._given():
                value.settle(made, around)
        self.readers[place] += 1

    def take(self, place: int) -> Tensor:
        """Give a value to one of its readers: results come first, then what the function saved, in order."""
        if place not in self.waiting:
            values = self._repeat()
            self.waiting = {place: (values[place], readers) for place, readers in self.readers.items()}
        value, readers = self.waiting.pop(place)
        if readers > 1:
            self.waiting[place] = value, readers - 1
        return value

    def _repeat(self) -> list[Tensor]:
        args = [_read(value) for value in self.args]
        kwargs = {name: _read(value) for name, value in self.kwargs.items()}
        saved = []
        # What a function saves it saves for a graph.
        graph = torch.set_grad_enabled(max(self.readers) >= self.n_results)
        with graph, torch.autocast(*self.autocast), saved_tensors_hooks(saved.append, lambda _: None):
            results = self.function(*args, **kwargs)
        return [value.detach() for value in (*_tensors(results), *saved)]

    def _given(self) -> list[_Saved]:
        return [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, _Saved)]


_Made = dict[int, tuple[_Call, int, Tensor, int]]
"""By storage: the call that makes a tensor, its place among the values, the tensor, lest its storage is reused, and its
version."""


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def _read(value: Any) -> Any:
    return value.read().detach().requires_grad_(value.requires_grad) if isinstance(value, _Saved) else value
