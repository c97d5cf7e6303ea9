"""`adapter_names`: batches in which each row has an adapter of its own."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

_SHOWN = 8


class AdaptersOfRows:
    """What a `MixerTunerModel` does with `adapter_names`, as peft hands them to every call of a model."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        names = self._names_per_row(names, kwargs)

        def check_rows(_, args: tuple, kwargs: dict[str, Any]) -> None:
            given = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
            inputs = next((value for value in given if value is not None), names)
            if len(inputs) != len(names):
                raise ValueError(
                    f"adapter_names has {len(names)} names for {len(inputs)} rows.\n"
                    "  Pass one name per row, in their order."
                )

        layers = [layer for _, layer in self._layers(self.model)]
        hook = self.model.register_forward_pre_hook(check_rows, with_kwargs=True)
        for layer in layers:
            layer.assign_rows(names)
        try:
            yield
        finally:
            hook.remove()
            for layer in layers:
                layer.assign_rows(None)

    def _names_per_row(self, names: list[str], kwargs: dict[str, Any]) -> list[str]:
        """The adapter of each row that the mixers will see, checked."""
        own = self._own_configs()
        unknown = sorted(set(names) - {*own, "__base__"})
        if unknown:
            more = f" and {len(own) - _SHOWN} more" if len(own) > _SHOWN else ""
            raise ValueError(
                f"adapter_names has {unknown[0]!r}, which is no adapter of {type(self).__name__} here.\n"
                f"  Pass one of {', '.join(list(own)[:_SHOWN])}{more} for each row, or '__base__'."
            )
        if any(own[name].modules_to_save for name in set(names) - {"__base__"}):
            raise ValueError(
                "adapter_names is for adapters alone, and one of these has modules_to_save.\n"
                "  Run one batch per adapter, with set_adapter before each."
            )
        if self.training and any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules()):
            raise ValueError(
                "adapter_names cannot be trained with under gradient checkpointing: layers run again without them.\n"
                "  Call gradient_checkpointing_disable(), or run one batch per adapter, with set_adapter before each."
            )
        # generate repeats each row as often.
        settings = vars(kwargs["generation_config"]) | kwargs if kwargs.get("generation_config") else kwargs
        times = max(settings.get(key) or 1 for key in ("num_beams", "num_return_sequences"))
        return [name for name in names for _ in range(times)]
