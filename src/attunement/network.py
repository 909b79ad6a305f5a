"""Network sites: a trained network beside a frozen stack of blocks, fed by what enters and leaves each block.

Where nothing of the stack itself is trained, nothing is kept for a backward pass through it. What the network gives
takes the place of what the stack gives: the output of its last norm, or of its last block where no norm follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from attunement.anatomy import Anatomy, Place
from attunement.attention import AttentionSite, attention_site
from attunement.errors import AttunementError
from attunement.method import Method
from attunement.narrow import narrowed
from attunement.part import Part
from attunement.sequence import named
from attunement.site import OPAQUE, Site, layout_of

ASKING = "_attuned_asking"


class NetworkSite(Site):
    """A backbone as a stack of blocks.

    Attributes:
        blocks: its modules in order.
        inputs, outputs: the width of what enters and leaves them; fan_in: of the layer that makes it from pixels.
        words: whether it reads ids of words.
        attentions: the module that computes each block's attention, or why it is out of reach.
        end: the module whose output the network's takes the place of.
    """

    def __init__(self, place: Place, structure: Anatomy, method: Method, width: int) -> None:
        super().__init__(place, None, OPAQUE)
        self.slot, self.key = "network", f"{place.name}.network" if place.name else "network"
        self.inputs = self.outputs = width
        self.blocks = tuple(p.module for p in structure.blocks if p.stack == place.stack)
        names = list(structure.modules)
        last = next(name for name, p in structure.modules.items() if p.module is self.blocks[-1])
        after = (structure.modules[name] for name in names[names.index(last) :])
        inside = f"{place.name}." if place.name else ""
        # one of the embeddings may be registered behind the blocks, and runs before them
        norms = [
            p.module
            for p in after
            if p.role == "norm" and p.block is None and p.name.startswith(inside) and "emb" not in p.name.split(".")[-1]
        ]
        direct = (m for m in norms if m in place.module._modules.values())  # one in a pooler or a head is none
        self.end = next(direct, self.blocks[-1])
        stem = next((p.module for p in structure.places if p.role == "conv" and p.block is None), None)
        self.fan_in = stem._parameters["weight"][0].numel() if stem is not None else width  # type: ignore[index]
        attentions = [p for p in structure.places if p.role == "attention" and p.stack == place.stack]
        made = [attention_site(structure, method, p) for p in attentions]
        self.attentions: list[Any] = [one.module if isinstance(one, AttentionSite) else one for one in made]
        self.words = "input_ids" in named(place.module)
        self.places = [p.members for p in structure.blocks if p.stack == place.stack]
        tables = [p.module for p in structure.places if p.role == "embedding" and p.stack == place.stack]
        self.embedding = next(iter(tables), None)

    def narrow(self, factor: int) -> list[nn.Module]:
        """Its blocks anew, `factor` times narrower in all widths, with the weights that matter most in theirs.

        Raises:
            AttunementError: where a block cannot be made from a config, or its widths have no such divisor.
        """
        return narrowed(self, factor)

    def norm(self, factor: int) -> nn.Module:
        """A norm of the kind at the end of the stack, as wide as the narrow blocks; nothing where there is none."""
        if self.end is self.blocks[-1]:
            return nn.Identity()
        width = self.inputs // factor
        return nn.LayerNorm(width) if self.end._parameters.get("bias") is not None else nn.RMSNorm(width, eps=1e-6)


def network_site(structure: Anatomy, method: Method, place: Place) -> Site | str:
    """A backbone as a site for a network beside it, or why it is none."""
    if place.role != "backbone":
        return "a network stands beside a whole stack; select 'backbone'"
    blocks = [p for p in structure.blocks if p.stack == place.stack]
    norms = [p.module for p in blocks[0].members if p.role == "norm"] if blocks else []
    if not norms:
        return f"{type(place.module).__name__} has no blocks of a known width"
    if getattr(layout_of(norms[0], "weight"), "channels", -1) == 1:
        return f"what passes between the blocks of {type(place.module).__name__} are maps, not tokens"
    if any(p.role == "cross_attention" and p.stack == place.stack for p in structure.places):
        return "the blocks of a decoder that reads an encoder need its states too; select 'encoder.backbone'"
    site = NetworkSite(place, structure, method, norms[0]._parameters["weight"].shape[0])  # type: ignore[union-attr]
    if getattr(method, "queries", False):
        if len(site.attentions) != len(site.blocks):
            return f"its {len(site.blocks)} blocks have {len(site.attentions)} attentions, not one each"
        return next((why for why in site.attentions if isinstance(why, str)), site)
    return site


class Runs:
    """How the stack's blocks were called in the forward that is running."""

    def __init__(self, part: NetworkPart) -> None:
        self.part = part
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def again(self, index: int, module: nn.Module, z: Tensor, narrow: int = 1) -> Tensor:
        """Another module called as block `index` was, with z for its hidden states.

        `narrow` says how many times narrower its heads are: of rotary positions (batch, tokens, head width) every
        `narrow`-th is what a head of that width has.
        """
        args, kwargs = self.calls[index]
        if "position_embeddings" in kwargs and kwargs["position_embeddings"] is not None:
            kwargs = {**kwargs, "position_embeddings": tuple(t[..., ::narrow] for t in kwargs["position_embeddings"])}
        out: Any = module(z, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def query(self, index: int, z: Tensor) -> Tensor:
        """Block `index` for queries z (batch, count, width) of the method's own, with the keys and values that it had."""
        part, block = self.part, self.part.site.blocks[index]
        kept = block.__dict__.get("gradient_checkpointing")
        part.site.module.__dict__[ASKING] = (part, index)
        if kept:  # a recomputation would find the block at other work
            block.gradient_checkpointing = False  # type: ignore[assignment]
        try:
            return self.again(index, block, z)
        finally:
            del part.site.module.__dict__[ASKING]
            if kept:
                block.gradient_checkpointing = kept

    def seen(self) -> Tensor | None:
        """Which tokens (batch, tokens) any other may attend to: not the pads. None where none is hidden from all."""
        args, kwargs = self.calls[0]
        masks = [m for m in (*args, *kwargs.values()) if isinstance(m, Tensor) and m.dim() == 4]
        if not masks:
            return None
        mask = masks[0] if masks[0].dtype is torch.bool else masks[0] > torch.finfo(masks[0].dtype).min / 2
        return mask.any(dim=2)[:, 0]


class NetworkPart(Part):
    """A network beside one stack."""

    spans = True
    unweighed = ("attend",)
    site: NetworkSite

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.taps = True
        self.caches = False
        self.let_go()

    def acts(self) -> Iterator[tuple[nn.Module, str]]:
        for index, block in enumerate(self.site.blocks):
            yield block, "tap"
            yield block, "hear"
            if getattr(self.method, "queries", False):
                yield self.site.attentions[index], "attend"
        yield self.site.end, "output"

    def let_go(self) -> None:
        self.states: list[Tensor] = []
        self.kept: list[tuple[Tensor, Tensor]] = []  # keys and values of each block
        self.runs = Runs(self)

    @property
    def asking(self) -> tuple[Part, int] | None:
        """The part of this backbone whose queries a block is running again for, and which block."""
        return self.site.module.__dict__.get(ASKING)

    def tap(self, module: nn.Module, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.asking is not None:
            return
        first = module is self.site.blocks[0]
        if first:
            self.let_go()
            self.states.append(x)
        caches = [value for value in (*args, *kwargs.values()) if hasattr(value, "get_seq_length")]
        if first and any(cache.get_seq_length() > 0 for cache in caches):
            raise AttunementError(f"{self.key}: a network beside the stack keeps no cache; pass use_cache=False")
        others = tuple(None if any(value is cache for cache in caches) else value for value in args[1:])
        named = {name: v for name, v in kwargs.items() if v is not x and not any(v is cache for cache in caches)}
        self.runs.calls.append((others, named))

    def hear(self, module: nn.Module, y: Tensor) -> None:
        if self.asking is None:
            self.states.append(y)

    def left(self, x: Tensor | None, y: Tensor) -> Tensor:
        if self.asking is not None:
            return y
        values = self.values("network")
        # tokens that others have put behind the sequence are theirs to take off
        own = min(h.shape[1] for h in (*self.states, y))
        states = [h[:, :own] for h in self.states]
        made: Tensor = self.method.network(states, self.runs, y[:, :own], **values)  # type: ignore[attr-defined]
        made = made.to(y.dtype)
        return made if own == y.shape[1] else torch.cat((made, y[:, own:]), dim=1)

    def attending(self, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Keeps a block's keys and values, and gives them to the queries that come later."""

        def around(q: Tensor, k: Tensor, v: Tensor, extra: int = 0) -> Tensor:
            if self.asking is None:
                self.kept.append((k, v))
            if self.asking is None or self.asking[0] is not self:
                return call(q, k, v, extra)
            k, v = self.kept[self.asking[1]]
            return call(q, k, v, k.shape[2])

        return around
