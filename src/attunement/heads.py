"""What the matrices of one attention have in common: how wide a head is, and which other matrices stand beside one."""

from __future__ import annotations

import functools
import inspect
import re
from typing import TYPE_CHECKING, Any

from attunement.site import Site, base_of, layout_of

if TYPE_CHECKING:
    from attunement.anatomy import Anatomy, Place
    from attunement.method import Method

_COUNTS = ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads", "n_heads")
_TURNS = re.compile(r"rotary|rope", re.IGNORECASE)
_NORMS = re.compile(r"self\.(?:q|k|query|key)_?(?:layer)?_?norm\b")


def head_width(module: Any, outputs: int) -> int:
    """How wide a head of an attention is, whose queries are `outputs` wide together; 0 where the module does not say."""
    words = ("head_dim", "attention_head_size", "key_value_proj_dim")
    if width := next((int(own) for word in words if (own := getattr(module, word, 0))), 0):
        return width
    said = (getattr(one, word, 0) for one in (getattr(module, "config", None), module) for word in _COUNTS)
    heads = next((count for count in said if isinstance(count, int) and count), 0)
    return outputs // heads if heads else 0


def attention_in(structure: Anatomy, sublayer: Place) -> tuple[str, Any]:
    """The module that computes an attention, by the matrices of its sublayer: the one that owns what makes queries."""
    names = {p.role.partition(".")[2]: p for p in sublayer.members if p.role.startswith(sublayer.role)}
    first = next(names[word] for word in ("query", "qkv", "kv", *names) if word in names)
    owner = first.name if first.parameter is not None else first.name.rpartition(".")[0]
    return owner, structure.modules[owner].module


def between(module: Any) -> str | None:
    """What happens to queries and keys before they meet (the end of a sentence), or None."""
    return _between(base_of(type(module)))


@functools.cache
def _between(kind: Any) -> str | None:
    try:
        code = inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return f"the code of {kind.__name__} cannot be read"
    if _TURNS.search(code):
        return f"{kind.__name__} turns queries and keys by their positions"
    return f"{kind.__name__} normalises queries and keys" if _NORMS.search(code) else None


def introduce(structure: Anatomy, method: Method, site: Site) -> None:
    """Tell a matrix which others stand in its sublayer, and how wide the heads of the attention there are."""
    own = site.place
    near = [p for p in structure.places if p.members and p.role != "block"]
    near = [p for p in near if (p.block, p.stack) == (own.block, own.stack)]
    sublayer = next((p for p in near if any(_same(member, own) for member in p.members)), None)
    attends = sublayer if sublayer is not None and "attention" in sublayer.role else None
    attends = attends or next((p for p in near if p.role == "attention"), None)
    if attends is not None:
        _, module = attention_in(structure, attends)
        site.between = between(module)
        sizes = {m.role.partition(".")[2]: _size(m) for m in attends.members}
        site.head_width = head_width(module, sizes.get("query", 0))
    for member in () if sublayer is None else sublayer.members:
        word = member.role.partition(".")[2]
        if word in method.partners and not _same(member, own):
            layout = layout_of(member.module, member.parameter or "weight", member.transposed)
            if not isinstance(layout, str):
                site.beside[word] = Site(member, member.parameter or "weight", layout, member.view)


def _same(one: Place, other: Place) -> bool:
    return one.module is other.module and (one.parameter or "weight", one.view) == (
        other.parameter or "weight",
        other.view,
    )


def _size(place: Place) -> int:
    layout = layout_of(place.module, place.parameter or "weight", place.transposed)
    return 0 if isinstance(layout, str) else Site(place, place.parameter or "weight", layout, place.view).outputs
