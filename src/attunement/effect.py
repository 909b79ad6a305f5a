"""What an active set means at one place of a model: a small tree over the parts that act there."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attunement.compose import Active, Average, Stack, Sum, Weighted
from attunement.errors import AttunementError
from attunement.part import Part

Act = Callable[[Part, str, Any], Any]
"""What a part does to a value: to a parameter (`weigh`), to x (`enter`), to y beside an x, or to a function around it."""


def weigh(part: Part, face: str, P: Tensor) -> Tensor:
    """A parameter after a part."""
    return part.value(P, face)


def enter(part: Part, _: str, x: Tensor) -> Tensor:
    """A module's input after a part."""
    return part.entering(x)


Terms = tuple[tuple[Part, "Tensor | None"], ...]


class Node:
    """A value after an active set: `after`, and what that adds to it: `change`."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = tuple(nodes)

    def after(self, v: Any, act: Act) -> Any:
        """A `Stack`, or the parts of one adapter: each node on the result of the one before.

        Of two changes of what enters a module, the later one stands outside and comes first: as W R1 R2 is given R2 x.
        """
        for node in reversed(self.nodes) if act is enter else self.nodes:
            v = node.after(v, act)
        return v

    def change(self, v: Tensor, act: Act) -> Tensor:
        return self.after(v, act) - v

    def terms(self) -> Terms | None:
        """The additive changes one by one, or None where they depend on each other."""
        found = [node.terms() or () for node in self.nodes]
        if not all(found) or any(part.reads_weight for some in found[1:] for part, _ in some):
            return None
        return tuple(term for some in found for term in some)

    def parts(self) -> Iterable[Part]:
        return (part for node in self.nodes for part in node.parts())


class Leaf(Node):
    """One part; `face` is "bias" where it acts on the bias that goes with its matrix."""

    def __init__(self, part: Part, face: str) -> None:
        self.part, self.face = part, face

    def after(self, v: Any, act: Act) -> Any:
        return act(self.part, self.face, v)

    def change(self, v: Tensor, act: Act) -> Tensor:
        adds = act is weigh and self.part.additive and self.face != "bias"
        return self.part.change(v) if adds else self.after(v, act) - v

    def terms(self) -> Terms | None:
        return ((self.part, None),) if self.part.additive else None

    def parts(self) -> Iterable[Part]:
        return (self.part,)


class Blend(Node):
    """A `Sum`, `Average` or `Weighted`: changes added, each with its gain, a 0-d tensor or None for one."""

    def __init__(self, nodes: Sequence[Node], gains: Sequence[Tensor | None]) -> None:
        super().__init__(nodes)
        self.gains = tuple(gains)

    def after(self, v: Any, act: Act) -> Any:
        if callable(v):  # a function: what the changed ones give is added to what it gives

            def blended(*args: Any) -> Any:
                start = v(*args)
                ends = [node.after(v, act)(*args) for node in self.nodes]
                return start + self._added([end - start for end in ends])

            return blended
        return v + self.change(v, act)

    def change(self, v: Tensor, act: Act) -> Tensor:
        return self._added([node.change(v, act) for node in self.nodes])

    def _added(self, changes: Sequence[Tensor]) -> Tensor:
        scaled = [d if gain is None else gain * d for gain, d in zip(self.gains, changes, strict=True)]
        return functools.reduce(operator.add, scaled)

    def terms(self) -> Terms | None:
        found = [node.terms() for node in self.nodes]
        if any(some is None for some in found):
            return None
        return tuple(
            (part, outer if gain is None else gain if outer is None else gain * outer)
            for some, outer in zip(found, self.gains, strict=True)
            for part, gain in some or ()
        )


def weighed(active: Active) -> set[str]:
    """The adapters of the active set that have a weight other than zero."""
    if active is None:
        return set()
    if isinstance(active, str):
        return {active}
    weights = active.weights if isinstance(active, Weighted) else [1.0] * len(active.items)
    return set().union(*(weighed(item) for item, weight in zip(active.items, weights, strict=True) if weight))


def chained(nodes: Sequence[Node | None]) -> Node | None:
    present = [node for node in nodes if node is not None]
    return Node(present) if len(present) > 1 else next(iter(present), None)


def resolved(active: Active, entries: Mapping[str, Sequence[tuple[Part, str]]], joins: bool = False) -> Node | None:
    """The active set over the (part, face) pairs that its adapters have at one place; None where nothing acts there.

    Where parts only join one another, as tokens do in a sequence, a `Sum` is what a `Stack` is, and nothing has a weight.
    """
    if active is None:
        return None
    if isinstance(active, str):
        return chained([Leaf(*entry) for entry in entries.get(active, ())])
    nodes = [resolved(item, entries, joins) for item in active.items]
    if isinstance(active, Stack) or (joins and isinstance(active, Sum)):
        return chained(nodes)
    weights = [1 / len(nodes) if isinstance(active, Average) else 1.0] * len(nodes)
    if isinstance(active, Weighted):
        weights = list(active.weights)
    terms = [(node, w) for node, w in zip(nodes, weights, strict=True) if node is not None and w != 0]
    if len(terms) < 2 and all(w == 1 for _, w in terms):
        return terms[0][0] if terms else None
    if joins:
        raise AttunementError(
            f"use: {active!r}: tokens in a sequence have no weight; Stack puts them one after another"
        )
    # a 0-d CPU tensor, not a Python number: a new value is no new program for torch.compile, and any device takes it
    gains = [None if w == 1 else torch.tensor(w, dtype=torch.float64) for _, w in terms]
    return Blend([node for node, _ in terms], gains)
