"""Methods and tasks from outside of the package: modules that register them, imported because a user said so.

Nothing else imports them. A name in the file of a model or an adapter never does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from importlib import import_module

from ssmtune.config import ConfigError


def import_modules(names: Iterable[str]) -> None:
    """Import modules that call `register_method` or `register_task`.

    Args:
        names: dotted names, looked for where Python looks and, last, in the working directory.

    Raises:
        ConfigError: there is no module of a name.
    """
    for name in names:
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.append(os.getcwd())
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name and not name.startswith(f"{error.name}."):
                raise
            raise ConfigError(
                f"--import {name}: Python finds no module of that name, here or among the installed ones.\n"
                "  Give its name without .py, and run in the directory that holds it."
            ) from None
