"""Attunement: adapt any PyTorch model, every technique written once, as one expression."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attunement import recipes
from attunement.adapter import Adapter, active, adapters, detach, use, using
from attunement.adapting import adapt
from attunement.anatomy import anatomy
from attunement.compose import Average, Rows, Stack, Sum, Weighted
from attunement.convert import to_lora
from attunement.errors import AttunementError
from attunement.intrinsic import intrinsic_dimension
from attunement.methods import *  # noqa: F403
from attunement.methods import __all__ as _methods
from attunement.storage import load

if TYPE_CHECKING:
    from attunement.train.run import Run
    from attunement.train.run import load as open_run
    from attunement.train.trainer import Callback, Trainer

# after the package `attunement.methods`, whose name the function takes
from attunement.method import AttentionMethod, Method, NetworkMethod, OutputMethod, ParameterMethod  # isort: skip
from attunement.method import SequenceMethod, WeightMethod, method, methods, register  # isort: skip

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AttentionMethod",
    "AttunementError",
    "Average",
    "Callback",
    "Method",
    "NetworkMethod",
    "OutputMethod",
    "ParameterMethod",
    "Rows",
    "Run",
    "SequenceMethod",
    "Stack",
    "Sum",
    "Trainer",
    "Weighted",
    "WeightMethod",
    "active",
    "adapt",
    "adapters",
    "anatomy",
    "detach",
    "intrinsic_dimension",
    "load",
    "method",
    "methods",
    "open_run",
    "recipes",
    "register",
    "to_lora",
    "use",
    "using",
    *_methods,
]


def __getattr__(name: str) -> Any:
    # the trainer brings transformers along, which takes longer to import than all the rest
    if name in ("Trainer", "Callback"):
        from attunement.train import trainer

        return getattr(trainer, name)
    if name in ("Run", "open_run"):
        from attunement.train import run

        return run.load if name == "open_run" else run.Run
    if name == "trl":
        import importlib

        return importlib.import_module("attunement.trl")
    from attunement.errors import nearest

    alike = [word for word in __all__ if word.casefold() == name.casefold()]
    hint = f"; nearest: {alike[0]!r}" if alike else "" if name.startswith("_") else nearest(name, __all__)
    raise AttributeError(f"module 'attunement' has no attribute {name!r}{hint}")


def __dir__() -> list[str]:
    return sorted(__all__)
