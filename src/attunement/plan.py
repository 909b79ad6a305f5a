"""What one module does under the active set, decided when that changes and never in `forward`.

At one module weights change first, then what enters, then what leaves it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attunement.attention import attuned_config
from attunement.compose import Active, Stack, names_in
from attunement.effect import Node, Terms, chained, enter, resolved, weigh, weighed
from attunement.errors import AttunementError
from attunement.part import Part
from attunement.site import LINEAR, PLAIN, LinearLayout, QuantisedLayout, base_of, working_dtype

APART, ONTO = (torch.addmm, torch.add), (Tensor.addmm_, Tensor.add_)
"""Sums: in a tensor of their own, or in the output that the same call has made."""
SMALL = 1 << 14
"""Entries of an output for which, in inference, a tensor of its own costs less than asking whether it is needed."""
_compiling, _transforms = torch.compiler.is_dynamo_compiling, torch._C._functorch.peek_interpreter_stack
_dispatched, _called = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack


def may_add_to(y: Tensor, W: Tensor) -> bool:
    """Whether a sum may be made in y, which `F.linear` has just made with W, since nobody else can have kept it.

    Others do who watch operations (selective checkpointing keeps their outputs, a counter of FLOPs knows none in place), who
    see levels of transforms that y has not, and the linear of a W of a type of its own.
    """
    watched = _compiling() or _transforms() is not None or _dispatched() or _called()
    return not watched and type(y) is Tensor and type(W) in (nn.Parameter, Tensor)


class Plan:
    """What one module does under the active set.

    Attributes:
        forward: the base class's forward.
        terms: additive changes that run beside the module's own weight, each with its gain.
        beside: an additive tree too entangled for that: its whole change runs beside.
        parameters: trees by parameter name, for whoever reads the attribute.
        enters, leaves: trees over x and over y.
        around: a tree around the whole forward; `attends`: one around the attention that the module computes, which
            it finds under another name in `config`.
        taps: parts elsewhere that need this module's x; `heard`: those that need its y.
    """

    terms: tuple[tuple[Part, Tensor | None], ...] | None = None
    beside: Node | None = None
    enters: Node | None = None
    leaves: Node | None = None
    around: Node | None = None
    attends: Node | None = None
    heard: tuple[Part, ...] = ()
    config: Any = None

    def __init__(self, module: nn.Module) -> None:
        self.forward: Callable[..., Any] = base_of(type(module)).forward  # type: ignore[attr-defined]
        self.parameters: dict[str, Node] = {}
        self.taps: tuple[Part, ...] = ()
        self.layout: Any = None
        self.channels = -1
        self.plain = False  # the parameter is the matrix, and the module a Linear
        self.once = False  # the forward reads a parameter many times (a loop over experts)

    def parameter(self, module: nn.Module, name: str, base: Any) -> Any:
        """What the attribute `name` of the module reads as."""
        node = self.parameters.get(name)
        if node is None:
            return base
        if self.once and (now := module.__dict__.get("_attuned_now")) is not None:
            return now[name]
        if base is None:  # a bias that the module could have
            weight: Any = module._parameters[name.replace("bias", "weight")]
            base = weight.new_zeros(self.layout.matrix(weight).shape[-2])
        return node.after(base.to(working_dtype(base)), weigh).to(base.dtype)

    def run(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.around is None:
            return self._run(module, args, kwargs)

        def surround(part: Part, _: str, call: Callable[..., Any]) -> Callable[..., Any]:
            return lambda args, kwargs: part.around(module, call, args, kwargs)

        return self.around.after(lambda args, kwargs: self._run(module, args, kwargs), surround)(args, kwargs)

    def _run(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x: Any = args[0] if args else next(iter(kwargs.values()), None)
        for part in self.taps:
            part.tap(module, x, args, kwargs)
        if self.enters is not None:
            x = self._back(self.enters.after(self._last(x), enter))
            if args:
                args = (x, *args[1:])
            else:
                kwargs = {**kwargs, next(iter(kwargs)): x}
        if self.terms is not None or self.beside is not None:
            out: Any = self._run_beside(module, x, args, kwargs)
        elif self.once:
            module._attuned_now = {n: getattr(module, n) for n in self.parameters}
            try:
                out = self.forward(module, *args, **kwargs)
            finally:
                module._attuned_now = None
        else:
            out = self.forward(module, *args, **kwargs)
        if self.heard:
            y = out[0] if isinstance(out, tuple) else out
            for part in () if self.leaves is None else self.leaves.parts():
                y = part.left(None, y) if part.within else y
            for part in self.heard:
                part.hear(module, y)
        if self.leaves is None:
            return out
        if isinstance(out, tuple):
            return (self._left(x, out[0]), *out[1:])
        return self._left(x, out)

    @property
    def only_adds(self) -> bool:
        """Whether it is additive changes beside the module's own weight and nothing else."""
        others = (self.enters, self.leaves, self.around, self.attends)
        return self.terms is not None and not any((*others, self.taps, self.heard))

    def _run_beside(self, module: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        layout = self.layout
        P = module._parameters["weight"]
        rest = self.terms or ()
        if layout.beside_only:
            y = self.forward(module, *args, **kwargs)
            dtype = x.dtype
        else:
            W, rest = self._folded(module, x, P)
            y = layout.call(module, x, W, self.parameter(module, "bias", module._parameters.get("bias")))
            dtype = x.dtype if x.dtype.is_floating_point else P.dtype
        if self.beside is not None:
            work = self._dense(module, P)
            D = layout.matrix(self.beside.change(work, weigh)).to(dtype)
            return y + layout.beside(module, x, (D,))
        for part, gain in rest:
            chain = part.chain(module, dtype)
            if gain is not None:
                chain = (chain[0], gain, *chain[1:])
            z = layout.beside(module, part.dropped(x, module.training), chain)
            y = y + (z if part.site.view is None else part.placed(z, y.shape[-1]))
        return y

    def _folded(self, module: nn.Module, x: Tensor, P: Tensor) -> tuple[Tensor, Terms]:
        """The weight with the dense changes in it that no rounding would lose there, and the terms that are left.

        One product instead of two: beside the layer such a change costs as much as the layer itself.
        """
        rest = self.terms or ()
        if x.dtype is not P.dtype or P.dtype is not working_dtype(P) or torch.is_autocast_enabled(x.device.type):
            return P, rest
        W = P
        for part, gain in rest:
            if part.folds and not (part.dropout and module.training):
                D = part.change(P)
                W = W + (D if gain is None else D * gain)
        return W, tuple(term for term in rest if not term[0].folds or (term[0].dropout and module.training))

    def _dense(self, module: nn.Module, P: Tensor) -> Tensor:
        dense = self.layout.dense(module, "weight") if self.layout.beside_only else P
        return dense.to(working_dtype(dense))

    def _last(self, t: Tensor) -> Tensor:
        return t if self.channels == -1 else t.movedim(self.channels, -1)

    def _back(self, t: Tensor) -> Tensor:
        return t if self.channels == -1 else t.movedim(-1, self.channels)

    def _left(self, x: Any, y: Any) -> Tensor:
        if not isinstance(y, Tensor):
            raise AttunementError(
                f"the output of an adapted module must be a tensor or begin with one, got {type(y).__name__}"
            )
        leaves = self.leaves
        assert leaves is not None

        def left(x: Any, y: Tensor) -> Tensor:
            return leaves.after(y, lambda part, _, y: part.left(x if part.entered is None else part.entered, y))

        if y.is_nested:  # what nn.TransformerEncoder makes of a padded batch
            xs = x.unbind() if isinstance(x, Tensor) and x.is_nested else [None] * y.size(0)
            new = torch.nested.as_nested_tensor([left(a, b) for a, b in zip(xs, y.unbind(), strict=True)])
        else:
            x = self._last(x) if isinstance(x, Tensor) and x.dim() == y.dim() else x
            new = self._back(left(x, self._last(y)))
        for part in leaves.parts():
            part.let_go()
        return new


class BesidePlan(Plan):
    """The commonest plan, with nothing to decide in its forward: additive changes beside a whole Linear."""

    terms: tuple[tuple[Part, Tensor | None], ...]

    @staticmethod
    def fits(plan: Plan) -> bool:
        return (
            plan.only_adds
            and isinstance(plan.layout, LinearLayout)
            and set(plan.parameters) == {"weight"}
            and all(part.site.view is None and not part.folds for part, _ in plan.terms or ())
        )

    def run(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        # spelt out rather than called, and with one line a token for backward: a small model is mostly the price of calls
        x = args[0] if args else next(iter(kwargs.values()))
        held, dtype, shape = module._parameters, x.dtype, None
        if x.dim() > 2 and torch.is_grad_enabled() and not x.is_nested:
            shape, x = x.shape[:-1], x.reshape(-1, x.shape[-1])
        W = held["weight"]
        y = F.linear(x, W, held["bias"]) if self.plain else self.layout.call(module, x, W, held["bias"])
        own = (shape is not None or y.numel() > SMALL) and may_add_to(y, W)
        for part, gain in self.terms:
            if part.direct and self.plain:
                values = [(h._parameters if own else h._buffers)[name] for h, own, name in part.direct]
                links = part.method.factors(W, *values)  # type: ignore[attr-defined]
            else:
                links = part.chain(module, dtype)
            if gain is not None:
                links = (links[0], gain, *links[1:])
            z = F.dropout(x, part.dropout) if part.dropout and module.training else x
            fused = shape is not None and links[0].dim() == 2  # its sum is made where its last product is
            for link in reversed(links[1:] if fused else links):
                if link.dtype is not z.dtype:
                    link = link.to(z.dtype)
                z = F.linear(z, link) if link.dim() == 2 else z * link
            addmm, add = ONTO if own and z.dtype is y.dtype else APART
            y = addmm(y, z, links[0].to(z.dtype).t()) if fused else add(y, z)
        return y if shape is None else y.view(*shape, y.shape[-1])


Acting = tuple[Part, str]
"""A part and what it does at a module; see `Part.acts`."""


def plan_of(module: nn.Module, active: Active, held: Mapping[str, Sequence[Acting]]) -> Plan | None:
    """The plan of one module for an active set without rows.

    Args:
        held: what each adapter has to do at this module, less what it has merged into it.
    """
    names = set(names_in(active))
    here = {name: acting for name, acting in held.items() if name in names}
    if not here:
        return None
    plan = Plan(module)
    acting = [(name, part, does) for name, some in here.items() for part, does in some]
    plan.taps = tuple(part for _, part, does in acting if does == "tap")
    plan.heard = tuple(part for _, part, does in acting if does == "hear")
    levels = _levels([part for _, part, does in acting if does == "own"])
    entries: dict[str, dict[str, list[tuple[Part, str]]]] = {}
    for name, part, does in acting:
        if does == "own":
            level, site = levels[part], part.site
            place = level if level != "weight" else str(site.parameter)
            entries.setdefault(place, {}).setdefault(name, []).append((part, "weight"))
            if level == "weight" and hasattr(part.method, "bias") and site.bias in module._parameters:
                entries.setdefault(site.bias, {}).setdefault(name, []).append((part, "bias"))
            if site.layout is not PLAIN:
                plan.layout, plan.channels = site.layout, site.layout.axis(module)
            plan.once |= level == "weight" and bool(site.batch)
        elif does not in ("tap", "hear"):
            entries.setdefault(does, {}).setdefault(name, []).append((part, does))
    for place, by_name in entries.items():
        node = _node(place, active, by_name)
        if node is None:
            continue
        if place in TREES:
            setattr(plan, TREES[place], node)
        elif place == "weight" and all(part.additive and part.site.transparent for part in node.parts()):
            plan.terms = node.terms()
            plan.beside = node if plan.terms is None else None
            if not plan.layout.beside_only:
                plan.parameters[place] = node
        else:
            plan.parameters[place] = node
    if plan.attends is not None:
        plan.config = attuned_config(module)
    if BesidePlan.fits(plan):
        plan.__class__ = BesidePlan
        plan.plain = plan.layout is LINEAR
    trees = (plan.terms, plan.beside, plan.enters, plan.leaves, plan.around, plan.attends)
    return plan if plan.parameters or any((*trees, plan.taps, plan.heard)) else None


TREES = {"output": "leaves", "input": "enters", "around": "around", "attend": "attends"}
"""The tree of a plan for each thing that a part may do besides changing a parameter."""


def _node(place: str, active: Active, entries: Mapping[str, Sequence[tuple[Part, str]]]) -> Node | None:
    """The active set at one place; what is the same whatever weight its adapter has comes first, and is not weighed."""
    if any(place in part.unweighed for found in entries.values() for part, _ in found):
        aside = {name: [e for e in found if place in e[0].unweighed] for name, found in entries.items()}
        rest = {name: [e for e in found if place not in e[0].unweighed] for name, found in entries.items()}
        live = weighed(active)
        return chained(
            [resolved(Stack(*(name for name in entries if name in live)), aside), _node(place, active, rest)]
        )
    return resolved(active, entries, any(part.joins for found in entries.values() for part, _ in found))


def _levels(parts: Sequence[Part]) -> dict[Part, str]:
    """Whether each part acts on the output, the input or the weight.

    A method that has both an output form and a weight form runs in the cheap one, unless it meets another kind of change
    at the same matrix: then all act on the weight, so that sums and stacks mean what they say.
    """
    levels = {part: _level(part) for part in parts}
    if len(set(levels.values())) > 1:
        for part in parts:
            site = part.site
            shifts = hasattr(part.method, "bias")
            possible = not shifts or site.bias in site.module._parameters or isinstance(site.module, nn.Embedding)
            if part.weight_form is not None and possible and (part.additive or not site.layout.beside_only):
                levels[part] = "weight"
    return levels


def _level(part: Part) -> str:
    site, level = part.site, part.form if part.form in ("output", "input") else "weight"
    if part.weight_form is None:
        return level
    # there x and y have the same positions, and x the columns of the matrix
    aligned = isinstance(site.layout, (LinearLayout, QuantisedLayout))
    if level == "input":
        reached = site.called and aligned and site.view is None
    else:
        reached = site.called and (aligned or not part.method.reads_input())
    return level if reached else "weight"
