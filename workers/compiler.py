"""Keeps torch's compiler out of processes that never compile: it takes longer to import than torch itself.

torchvision asks it one question when it is imported (torchvision/ops/roi_align.py), and we import torchvision for its
non-maximum suppression and its resizing. So the module that it asks is a placeholder, which gives way to the real one
as soon as somebody asks for more. Loading a model asks the compiler too; see `build_on_meta`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

_NAME = "torch._dynamo.utils"


def defer_compiler() -> None:
    """Put the placeholder where torchvision looks, unless the compiler was imported already."""
    sys.modules.setdefault(_NAME, _Placeholder(_NAME))


class _Placeholder(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # what the import system looks at
        sys.modules.pop(_NAME, None)
        return _is_compile_supported if name == "is_compile_supported" else getattr(import_module(_NAME), name)


def _is_compile_supported(device_type: Any) -> Any:
    return import_module(_NAME).is_compile_supported(device_type)
