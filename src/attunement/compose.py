"""Several adapters at once: the active set as a value.

An active set is a name, `None` (the bare base), or a tree of these values. Trees nest freely, print as they are written,
compare, and are read back by `composition_from`. `Rows` inside a tree is drawn to its top: `Stack("a", Rows(["b", None]))`
is `Rows([Stack("a", "b"), Stack("a", None)])`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from attunement.errors import AttunementError, nearest

Active: TypeAlias = "str | Composition | None"


class Composition:
    """A combination of adapters. `items` are names, `None`, or compositions."""

    items: tuple[Active, ...]

    def __init__(self, *items: Active) -> None:
        for item in items:
            if not (item is None or isinstance(item, (str, Composition))):
                raise AttunementError(
                    f"{type(self).__name__}: expected names, None or compositions, got {type(item).__name__} {item!r}"
                )
        self.items = items

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.items))})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash((type(self), *(tuple(v) for v in self.__dict__.values())))

    def rebuilt(self, items: Sequence[Active]) -> Composition:
        """The same combination of other items."""
        return type(self)(*items)

    def describe(self) -> dict[str, Any]:
        """The composition as plain data."""
        items = [item.describe() if isinstance(item, Composition) else item for item in self.items]
        return {type(self).__name__.lower(): items}


class Sum(Composition):
    """Each adapter's change added to the base: W + D1 + D2; outputs likewise, y + (y1 - y) + (y2 - y)."""


class Stack(Composition):
    """Each adapter applied to the result of the ones before it: `Stack("lora", "hra")` is HRA(W + BA)."""


class Weighted(Composition):
    """Changes added with weights: `Weighted({"a": 0.7, "b": 0.3})` is W + 0.7 Da + 0.3 Db. 1.0 is the adapter, 0 the base."""

    def __init__(self, weights: Mapping[Any, float]) -> None:
        if not isinstance(weights, Mapping):
            raise AttunementError(f"Weighted: expected a mapping such as {{'a': 0.7, 'b': 0.3}}, got {weights!r}")
        super().__init__(*weights)
        for item, weight in weights.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or weight != weight:
                raise AttunementError(f"Weighted: the weight of {item!r} must be a number, got {weight!r}")
        self.weights = tuple(float(weight) for weight in weights.values())

    def __repr__(self) -> str:
        return f"Weighted({dict(zip(self.items, self.weights, strict=True))!r})"

    def rebuilt(self, items: Sequence[Active]) -> Composition:
        made = Weighted.__new__(Weighted)
        made.items, made.weights = tuple(items), self.weights
        return made

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "weights": list(self.weights)}


class Average(Composition):
    """The mean of the changes: `Average("a", "b")` is W + (Da + Db) / 2."""


class Rows(Composition):
    """Each row of the batch its own adapter, in one pass: `Rows(["banking", "legal", None])`; None is the bare base.

    Where a site cannot tell which row it serves, the model runs once per distinct adapter.
    """

    def __init__(self, rows: Sequence[Active]) -> None:
        if isinstance(rows, (str, Composition)) or not len(rows):
            raise AttunementError(f"Rows: expected a list with one entry for each row of the batch, got {rows!r}")
        super().__init__(*rows)

    def __repr__(self) -> str:
        return f"Rows([{', '.join(map(repr, self.items))}])"

    def rebuilt(self, items: Sequence[Active]) -> Composition:
        return Rows(list(items))


_KINDS: dict[str, type[Composition]] = {kind.__name__.lower(): kind for kind in (Sum, Stack, Weighted, Average, Rows)}


def composition_from(data: Any) -> Active:
    """An active set from plain data: what `describe` gives, a name, or None."""
    if data is None or isinstance(data, str):
        return data
    words = [key for key in data if key != "weights"] if isinstance(data, Mapping) else []
    if len(words) != 1 or words[0] not in _KINDS:
        raise AttunementError(f"a composition is written {{'sum': [...]}}, {{'rows': [...]}} and so on, got {data!r}")
    items = [composition_from(item) for item in data[words[0]]]
    kind = _KINDS[words[0]]
    if kind is Weighted:
        return Weighted(dict(zip(items, data["weights"], strict=True)))
    return Rows(items) if kind is Rows else kind(*items)


def names_in(active: Active) -> Iterator[str]:
    """Every adapter name of an active set, in order, repeats included."""
    if isinstance(active, str):
        yield active
    elif active is not None:
        for item in active.items:
            yield from names_in(item)


def checked(active: Any, known: Mapping[str, Any], verb: str = "use") -> Active:
    """The active set, if it is one and every name in it is known; else a sentence."""
    if not (active is None or isinstance(active, (str, Composition))):
        raise AttunementError(f"{verb}: expected a name, None or a composition, got {type(active).__name__} {active!r}")
    for name in names_in(active):
        if name not in known:
            have = ", ".join(map(repr, known)) or "none"
            raise AttunementError(
                f"{verb}: there is no adapter {name!r} on this model{nearest(name, known)}; it has {have}"
            )
    return drawn_up(active)


def drawn_up(active: Active) -> Active:
    """The same active set with `Rows` at the top, or nowhere."""
    if not isinstance(active, Composition):
        return active
    items = [drawn_up(item) for item in active.items]
    if isinstance(active, Rows):
        if any(isinstance(item, Rows) for item in items):
            raise AttunementError(f"use: Rows inside Rows has no meaning: {active!r}")
        return active.rebuilt(items)
    lengths = {len(item.items) for item in items if isinstance(item, Rows)}
    if len(lengths) > 1:
        raise AttunementError(f"use: every Rows in one composition must have one length, got {sorted(lengths)}")
    if not lengths:
        return active.rebuilt(items)
    (length,) = lengths
    return Rows([active.rebuilt([i.items[row] if isinstance(i, Rows) else i for i in items]) for row in range(length)])
