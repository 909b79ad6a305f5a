"""Attention sites: where a method acts around one attention's product of queries, keys and values.

The models of `transformers` look their attention function up by a name in their config. A module that a method attends
around reads another name there, under which a function is registered that asks the module's plan and then calls what
the user had chosen. Masks are made from the model's own config, as before.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attunement.anatomy import Anatomy, Place
from attunement.errors import AttunementError
from attunement.heads import attention_in, head_width
from attunement.method import Method
from attunement.part import Part
from attunement.sequence import counted, first_position, named
from attunement.site import OPAQUE, Site, base_of, layout_of

KNOWN = ("eager", "sdpa")
ATTENTION = "attuned"
"""The name in transformers' registry of the function that asks plans."""


class AttentionSite(Site):
    """The module that computes an attention.

    Attributes:
        inputs: width of the hidden states that queries are made of; outputs: of all heads' values together.
        heads, key_heads: how many of queries, and of keys and values (fewer where they are grouped).
        width: of one head.
        layer, layers: which of how many in its stack, from 0.
        backbone: what it belongs to, where that takes positions.
    """

    def __init__(self, structure: Anatomy, place: Place, module: nn.Module, name: str, made: dict[str, Site]) -> None:
        super().__init__(Place(name, module, place.role, place.block, place.stack), None, OPAQUE)
        self.slot, self.key = "attend", f"{name}.attend" if name else "attend"
        self.made = made
        self.inputs, self.outputs = made["query"].inputs, made["query"].outputs
        self.width = self.head_width = head_width(module, self.outputs)
        self.heads, self.key_heads = self.outputs // self.width, made["key"].outputs // self.width
        self.layer, self.layers = place.block or 0, structure.stacks.get(place.stack, 1)
        around = (p.module for p in structure.places if p.role == "backbone" and p.stack == place.stack)
        self.backbone = next((m for m in around if {"attention_mask", "position_ids"} <= set(named(m))), None)

    def project(self, role: str, tokens: Tensor) -> Tensor:
        """Tokens (count, width of x) through the matrix that makes keys or values: (1, key heads, count, head width)."""
        site = self.made[role]
        name = site.parameter or "weight"
        W = site.take(getattr(site.module, name)).to(tokens.dtype)  # (key heads * head width, width)
        bias = getattr(site.module, site.bias, None)
        bias = None if bias is None else site.take_bias(bias).to(tokens.dtype)
        return F.linear(tokens, W, bias).unflatten(-1, (-1, self.width)).transpose(0, 1)[None]


def attention_site(structure: Anatomy, _: Method, place: Place) -> Site | str:
    """The attention that a sublayer has, or why it cannot be reached."""
    if place.role not in ("attention", "cross_attention"):
        return "it is no attention; select 'attention', 'self_attention' or 'cross_attention'"
    names = {p.role.partition(".")[2]: p for p in place.members if p.role.startswith(place.role)}
    fused = next((names[word] for word in ("qkv", "kv") if word in names), None)
    if not all(word in names or (fused is not None) for word in ("query", "key", "value")):
        return "which of its matrices make queries, keys and values is not known"
    owner, module = attention_in(structure, place)
    if not _asks_registry(base_of(type(module))):  # type: ignore[arg-type]
        return (
            f"{type(module).__name__} computes attention in its own code and not through transformers' registry of "
            "attention functions"
        )
    if (chosen := str(module.__dict__["config"]._attn_implementation)) not in KNOWN:
        return _unknown(chosen)
    made: dict[str, Site] = {}
    for word in ("query", "key", "value"):
        one = names.get(word)
        if one is None:
            return f"the rows that make the {word} in {fused.name!r} are not known"  # type: ignore[union-attr]
        layout = layout_of(one.module, one.parameter or "weight", one.transposed)
        if isinstance(layout, str):
            return layout
        made[word] = Site(one, one.parameter or "weight", layout, one.view)
    return AttentionSite(structure, place, module, owner, made)


def _unknown(chosen: str) -> str:
    return f"the attention {chosen!r} takes no further keys; set one of {', '.join(KNOWN)} with set_attn_implementation"


@functools.cache
def _asks_registry(cls: Any) -> bool:
    try:
        return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(cls.forward)  # type: ignore[attr-defined]
    except (OSError, TypeError):
        return False


class AttentionPart(Part):
    """A method around one attention."""

    site: AttentionSite
    unweighed = ("around",)
    leads = True
    start = 0

    def meet(self, parts: Sequence[Part]) -> None:
        same = (one for one in parts if isinstance(one, AttentionPart) and one.site.backbone is self.site.backbone)
        self.leads = next(same, self) is self
        self.start = first_position(self.site.backbone) if self.leads and self.site.backbone is not None else 0

    def acts(self) -> Iterator[tuple[nn.Module, str]]:
        yield self.site.module, "attend"
        if self.site.backbone is not None and self.leads:
            yield self.site.backbone, "around"

    def around(self, module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Positions do not count pads: keys without a position would else tell a padded row from the row alone."""
        given = {**dict(zip(named(module), args, strict=False)), **kwargs}
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        words = given["input_ids"] if given.get("input_ids") is not None else given.get("inputs_embeds")
        shift = self.method.shift()  # type: ignore[attr-defined]
        if positions is None and words is not None:
            if mask is None and shift:
                cache = given.get("past_key_values")
                seen = 0 if cache is None else cache.get_seq_length()
                mask = words.new_ones(words.shape[0], words.shape[1] + seen, dtype=torch.long)
            if mask is not None and mask.dim() == 2:
                positions = counted(mask, words.shape[1], self.start)
        if positions is not None:
            given["position_ids"] = positions + shift
        return call((), given)

    def attending(self, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The attention after the method: what `AttentionMethod.attend` is given as `call`, and what it becomes."""
        values = self.values("attend")

        def around(q: Tensor, k: Tensor, v: Tensor, extra: int = 0) -> Tensor:
            cast = {name: t.to(q.dtype) if t.is_floating_point() else t for name, t in values.items()}

            def below(q: Tensor, k: Tensor, v: Tensor, new: int = 0) -> Tensor:
                return call(q, k, v, new if new == k.shape[2] else new + extra)

            return self.method.attend(below, q, k, v, self.site.project, **cast)  # type: ignore[attr-defined,no-any-return]

        return around


def attend(part: Part, _: str, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An attention after a part."""
    return part.attending(call)


def attuned(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """What stands in the registry: the module's plan around the function that the user had chosen."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    plan = module._attuned_plan
    chosen = str(module.__dict__["config"]._attn_implementation)
    if chosen not in KNOWN:
        raise AttunementError(f"{type(module).__name__}: {_unknown(chosen)}")
    eager: Any = getattr(sys.modules[base_of(type(module)).__module__], "eager_attention_forward", None)
    function: Any = ALL_ATTENTION_FUNCTIONS.get_interface(chosen, eager)
    weights: list[Tensor | None] = [None]

    def run(q: Tensor, k: Tensor, v: Tensor, extra: int = 0) -> Tensor:
        if not extra:
            out, weights[0] = function(module, q, k, v, attention_mask, **options)
            return out  # type: ignore[no-any-return]
        mask, bias = attention_mask, options.get("position_bias")
        own = k.shape[2] - extra  # keys that the mask knows
        if not own:
            mask = bias = None
        elif mask is None:
            causal = options.get("is_causal")
            causal = getattr(module, "is_causal", True) if causal is None else causal
            if causal and chosen != "eager" and q.shape[2] > 1:
                # sdpa would cut the keys to as many as there are queries: the first query sees the first key alone, also
                # where the keys are a cache of fixed size that begins to fill
                mask = q.new_ones(q.shape[2], own, dtype=torch.bool).tril()[None, None]
        elif not isinstance(mask, Tensor) or mask.dim() != 4:
            raise AttunementError(f"{type(module).__name__}: a mask (batch, heads, queries, keys) is expected")
        if mask is not None:
            mask = F.pad(mask[..., -own:], (extra, 0), value=mask.dtype is torch.bool)
        changed = {**options, "is_causal": False}
        if "position_bias" in options:
            changed["position_bias"] = None if bias is None else F.pad(bias[..., -own:], (extra, 0))
        out, found = function(module, q, k, v, mask, **changed)
        if own and found is not None:
            weights[0] = found[..., extra:]
        return out  # type: ignore[no-any-return]

    return plan.attends.after(run, attend)(query, key, value), weights[0]


def attuned_config(module: nn.Module) -> Any:
    """A copy of the config of an attention, under which it finds the function that asks plans."""
    config = copy.copy(module.__dict__["config"])
    config._attn_implementation_internal = ATTENTION
    return config


def attention_extras(base: type, _: Callable[..., Any]) -> dict[str, Any]:
    """What the class of an attention has besides: a config in which the attention function has another name."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if ATTENTION not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attuned)

    def read(self: Any) -> Any:
        plan = self._attuned_plan
        return self.__dict__["config"] if plan is None or plan.attends is None else plan.config

    def write(self: Any, value: Any) -> None:
        self.__dict__["config"] = value

    return {"config": property(read, write)}
