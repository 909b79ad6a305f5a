"""How an adapter gets into a model: the class of a module is exchanged for a cached subclass of the same name.

Its `forward` asks the module's plan, and its parameters are properties: whoever reads `module.weight` reads the adapted
weight. Plans refer to the modules that own tensors, never to the tensors, so that `to`, `deepcopy` and loading just work.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from attunement.site import base_of

_compiling, _backward = torch.compiler.is_dynamo_compiling, torch._C._current_graph_task_id

_classes: dict[tuple[type, tuple[str, ...], tuple[Any, ...]], type] = {}


def _property(name: str) -> property:
    def read(self: nn.Module) -> Any:
        base = self._parameters[name]
        plan = self._attuned_plan
        if not _compiling() and _backward() != -1 and self._attuned_course is not None:
            plan, _ = self._attuned_course.recall(self)  # type: ignore[operator, union-attr]
        if plan is None or (base is not None and (base.is_meta or hasattr(base, "placements"))):
            return base  # sharding and offloading read what rests here, to bring it to where it is used
        try:
            return plan.parameter(self, name, base)  # type: ignore[operator, union-attr]
        except AttributeError as error:  # nn.Module would take it for a missing attribute and hide the cause
            raise RuntimeError(f"{name} of {type(self).__name__}: {error}") from error

    return property(read)


Extras = Callable[[type, Callable[..., Any]], dict[str, Any]]


def exchanged(base: type, names: tuple[str, ...], extras: tuple[Extras, ...] = ()) -> type:
    """The subclass of `base`, made once, that asks a plan; `extras` give what the root or an attention has besides."""
    key = (base, names, extras)
    if key in _classes:
        return _classes[key]
    inner: Callable[..., Any] = base.forward  # type: ignore[attr-defined]

    @functools.wraps(inner)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # somebody who put a forward of their own on the instance may still call this one when the class is restored
        plan = getattr(self, "_attuned_plan", None)
        if not _compiling() and _backward() != -1 and getattr(self, "_attuned_course", None) is not None:
            return self._attuned_course.again(forward, self, args, kwargs)
        if plan is None:
            return inner(self, *args, **kwargs)
        return plan.run(self, args, kwargs)

    with contextlib.suppress(ValueError, TypeError):
        forward.__signature__ = inspect.signature(inner)  # type: ignore[attr-defined]

    def __reduce_ex__(self: Any, protocol: Any) -> Any:  # noqa: N807
        _, _, *state = tuple(object.__reduce_ex__(self, protocol))
        return (_rebuilt, (base, names, extras), *state)

    def register_parameter(self: Any, *args: Any, **kwargs: Any) -> None:
        # asks whether there is an attribute of this name, which would compute what it reads as
        plan = self.__dict__.pop("_attuned_plan", None)
        try:
            base.register_parameter(self, *args, **kwargs)  # type: ignore[attr-defined]
        finally:
            object.__setattr__(self, "_attuned_plan", plan)

    body: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": __reduce_ex__,
        "_attuned_base": base,
        "_attuned_plan": None,
        "_attuned_course": None,
        "_attuned_bench": None,
        "_attuned_extras": extras,
        "forward": forward,
        "register_parameter": register_parameter,
        **{name: _property(name) for name in names},
    }
    for extra in extras:
        body.update(extra(base, body["forward"]))
    made = type(base.__name__, (base,), body)
    _classes[key] = made
    return made


def _rebuilt(base: type, names: tuple[str, ...], extras: tuple[Extras, ...]) -> Any:
    cls = exchanged(base, names, extras)
    return cls.__new__(cls)  # type: ignore[call-overload]


def exchange(module: nn.Module, *extras: Extras) -> None:
    """Give a module its adapted class; again where more is asked of it."""
    cls = type(module)
    base = base_of(cls)
    has: tuple[Extras, ...] = getattr(cls, "_attuned_extras", ())
    if cls is not base and set(extras) <= set(has):
        return
    made = exchanged(base, tuple(module._parameters), tuple(dict.fromkeys((*extras, *has))))
    module.__class__ = made
    _rebind(module, cls, made)


def restore(module: nn.Module) -> None:
    """Give a module its own class back."""
    cls = type(module)
    base = base_of(cls)
    module.__dict__.pop("_attuned_plan", None)
    module.__dict__.pop("_attuned_course", None)
    module.__dict__.pop("_attuned_now", None)
    module.__class__ = base
    _rebind(module, cls, base)


def _rebind(module: nn.Module, before: Any, after: Any) -> None:
    """A hook of accelerate keeps the forward to call on the instance, and leaves it there when it is removed.

    A forward of somebody else's that stands there is theirs to take away.
    """
    word = "_old_forward" if "_hf_hook" in module.__dict__ else "forward"
    held = getattr(module.__dict__.get(word), "__func__", None)
    if held is not None and held in (before.forward, base_of(before).forward):  # type: ignore[attr-defined]
        module.__dict__[word] = after.forward.__get__(module)


def sealed_forward(module: nn.Module) -> str | None:
    """Why a module's class does not decide its forward (the end of a sentence), or None."""
    if "forward" not in module.__dict__:
        return None
    saved = module.__dict__.get("_old_forward" if "_hf_hook" in module.__dict__ else "forward")
    if getattr(saved, "__func__", None) in (base_of(type(module)).forward, type(module).forward):  # type: ignore[attr-defined]
        return None
    return (
        f"the forward of this {type(module).__name__} is patched on the instance, which would hide the adapter; "
        "adapt before patching, or patch the class"
    )
