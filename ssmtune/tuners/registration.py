"""Makes state-based methods known to peft.

peft looks a method up by its `PeftType`, an enum with no way to add a member from outside. A plain string would serve
for most look-ups, but transformers and Trainer read `peft_type.value`, so a real member is made, as the enum itself
makes one. An adapter of these methods can be loaded once `ssmtune` has been imported.
"""

from __future__ import annotations

import warnings

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import PeftType, register_peft_method


def add_peft_type(name: str) -> PeftType:
    """Return `PeftType[name]`, made first if peft does not have it.

    Args:
        name: name and value of the member, upper case.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    # The attribute goes first: the enum refuses to set one that is already listed as a member.
    setattr(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


def register(name: str, config_cls: type, model_cls: type) -> None:
    """Register one method with peft; nothing happens where it is registered already.

    Args:
        name: lower case; its upper case form is the `peft_type` stored in adapter_config.json.
        config_cls: the method's config.
        model_cls: the method's tuner; its `prefix` begins the names of the adapter's tensors.
    """
    known = PEFT_TYPE_TO_TUNER_MAPPING.get(add_peft_type(name.upper()))
    if known is None:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)
    elif known.__module__ != model_cls.__module__:
        warnings.warn(
            f"peft already has a method {name.upper()} ({known.__module__}); ssmtune's own is not registered.\n"
            "  Adapters of this type are handled by peft from here on.",
            stacklevel=2,
        )
