"""Sequence sites: where a method adds tokens to what a backbone reads, and takes them off what it gives.

Two kinds, told apart by the backbone itself. One that takes `inputs_embeds` (text) gets them before its embeddings,
with mask, positions and token types to match, in the first step of a generation only. Any other (vision), and a single
block, gets them behind the hidden states that enter its first block; they come off what leaves its last.

Labels, logits and hidden states keep their lengths, and a padded row gives what the row alone gives.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attunement.anatomy import Anatomy, Place
from attunement.errors import AttunementError
from attunement.method import Method
from attunement.part import Part
from attunement.site import OPAQUE, Site, base_of


class SequenceSite(Site):
    """A backbone or a block as a place for tokens.

    Attributes:
        inputs: width of an embedding, of the tokens therefore.
        fan_in: of the layer that makes hidden states from pixels, for initial values that follow it; else the width.
        limit: how many positions it knows, None where it does not say; learned: whether each has an embedding.
        first, last: the blocks between which the tokens stand, or None where they enter with the embeddings.
        reader: for an encoder, the decoder that attends to what it gives.
    """

    def __init__(self, place: Place, structure: Anatomy) -> None:
        super().__init__(place, None, OPAQUE)
        module = place.module
        blocks = [p for p in structure.blocks if p.stack == place.stack] if place.role == "backbone" else [place]
        self.slot, self.key = "tokens", f"{place.name}.tokens" if place.name else "tokens"
        self.first: nn.Module | None = None
        self.last: nn.Module | None = None
        self.reader: nn.Module | None = None
        self.embedding: nn.Module | None = None
        self.cross = any(p.role == "cross_attention" and p.stack == place.stack for p in structure.places)
        config = getattr(module, "config", None)
        limit = getattr(config, "max_position_embeddings", None)
        self.limit: int | None = limit if isinstance(limit, int) and limit > 0 else None
        self.learned = any(p.role == "embedding.position" and p.stack == place.stack for p in structure.places)
        stem = next((p.module for p in structure.places if p.role == "conv" and p.block is None), None)
        if place.role == "backbone" and "inputs_embeds" in named(module):
            self.embedding = _embedding(module, structure, place)
            self.inputs = self.outputs = self.embedding._parameters["weight"].shape[1]  # type: ignore[union-attr]
            readers = [p for p in structure.places if p.role == "backbone" and p.stack != place.stack]
            reads = [p.module for p in readers if "encoder_attention_mask" in named(p.module)]
            self.reader = next(iter(reads), None) if not self.cross else None
        else:
            self.first, self.last = blocks[0].module, blocks[-1].module
            norms = [p.module for p in blocks[0].members if p.role == "norm" and p.module is not None]
            self.inputs = self.outputs = norms[0]._parameters["weight"].shape[0]  # type: ignore[union-attr]
        self.fan_in = stem._parameters["weight"][0].numel() if stem is not None else self.inputs  # type: ignore[index]

    @property
    def weight(self) -> Tensor:
        """The embeddings (count, width) that the tokens stand before, detached."""
        if self.embedding is None:
            raise AttunementError(f"{self.key}: {type(self.module).__name__} has no embeddings of words")
        held: Tensor = self.embedding._parameters["weight"]  # type: ignore[assignment]
        return held.detach().float()


def sequence_site(structure: Anatomy, _: Method, place: Place) -> Site | str:
    """A place as one for tokens, or why it is none."""
    if place.role not in ("backbone", "block"):
        return "tokens enter at a backbone or at a block; select 'backbone' or 'blocks'"
    if place.role == "backbone" and not any(p.stack == place.stack for p in structure.blocks):
        return f"{type(place.module).__name__} has no blocks"
    if place.role == "backbone" and "inputs_embeds" in named(place.module):
        return SequenceSite(place, structure)
    if place.role == "backbone" and "input_ids" in named(place.module):
        return f"{type(place.module).__name__} takes ids alone and no embeddings"
    if place.role == "block" and _takes_words(structure, place):
        return "inside a model of text a block has a mask and positions of its own; select 'backbone', with Prompt"
    blocks = [p for p in structure.blocks if p.stack == place.stack] if place.role == "backbone" else [place]
    norms = [[p.module for p in block.members if p.role == "norm"] for block in blocks]
    if not all(norms):
        return "the width of its hidden states is not known"
    if not all(any(p.role.endswith("attention") for p in block.members) for block in blocks):
        return f"{type(blocks[0].module).__name__} has no attention that would read further tokens"
    if getattr(getattr(structure.model, "config", None), "window_size", None):
        return "its attention works in windows of the image, in which further tokens have no place"
    return SequenceSite(place, structure)


def first_position(backbone: nn.Module) -> int:
    """Where a backbone's positions begin: RoBERTa's begin behind that of its padding."""
    tables = (module for name, module in backbone.named_modules() if name.endswith("position_embeddings"))
    padding = getattr(next(tables, None), "padding_idx", None)
    return 0 if padding is None else int(padding) + 1


def counted(mask: Tensor, length: int, start: int) -> Tensor:
    """Positions (batch, length) of the last tokens under a mask (batch, all tokens): pads before a text do not count.

    Where positions begin behind that of the padding, pads have that, as in the models that do so.
    """
    pads = (mask.cumsum(1) == 0).sum(1, keepdim=True)  # (batch, 1)
    where = torch.arange(mask.shape[1] - length, mask.shape[1], device=mask.device)
    positions = (where - pads).clamp(min=0) + start
    return torch.where(mask[:, -length:] == 0, start - 1, positions) if start else positions


def _takes_words(structure: Anatomy, place: Place) -> bool:
    around = (p for p in structure.places if p.role == "backbone" and p.stack == place.stack)
    return any({"inputs_embeds", "input_ids"} & set(named(p.module)) for p in around)


def _embedding(module: Any, structure: Anatomy, place: Place) -> nn.Module:
    if hasattr(module, "get_input_embeddings"):
        return module.get_input_embeddings()  # type: ignore[no-any-return]
    prefix = f"{place.name}." if place.name else ""
    return next(p.module for p in structure.places if p.role == "embedding" and p.name.startswith(prefix))


def named(module: nn.Module) -> tuple[str, ...]:
    """The names of what a module's forward takes."""
    return _named(base_of(type(module)))


@functools.cache
def _named(cls: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(cls.forward).parameters)[1:]


class SequencePart(Part):
    """Tokens at a backbone or around blocks."""

    joins = True
    site: SequenceSite

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        with torch.no_grad():
            self.count = self.made().shape[-2]
        self.start = first_position(self.site.module)
        self.within = self.site.first is not None and self.site.first is self.site.last

    def acts(self) -> Iterator[tuple[nn.Module, str]]:
        site = self.site
        if site.first is None:
            yield site.module, "around"
            if site.reader is not None:
                yield site.reader, "around"
        else:
            assert site.last is not None
            yield site.first, "tap"
            yield site.first, "input"
            yield site.last, "output"

    def made(self) -> Tensor:
        """The tokens, (count, width), or (rows, count, width) where each row has its own."""
        made: Tensor = self.method.tokens(**self.values("tokens"))  # type: ignore[attr-defined]
        return self.dropped(made, self.site.module.training)

    def of_rows(self, batch: int) -> Tensor:
        """The tokens, (batch, count, width); those of a row are repeated for what it was expanded to, such as beams."""
        made = self.made()
        if made.dim() == 3 and batch % len(made):
            raise AttunementError(f"{self.key}: tokens are made for {len(made)} rows, and the batch has {batch}")
        return made.expand(batch, -1, -1) if made.dim() == 2 else made.repeat_interleave(batch // len(made), dim=0)

    # around blocks

    def tap(self, module: nn.Module, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        masks = [v for v in (*args[1:], *kwargs.values()) if isinstance(v, Tensor) and v.dim() == 4]
        if any(mask.shape[-1] == x.shape[1] for mask in masks):
            raise AttunementError(f"{self.key}: its blocks are given a mask, in which further tokens have no place")
        if not self.within and kwargs.get("position_embeddings") is not None:
            raise AttunementError(f"{self.key}: its blocks turn the last tokens to their positions; select 'blocks'")

    def entering(self, x: Tensor) -> Tensor:
        if x.dim() != 3:
            raise AttunementError(
                f"{self.key}: hidden states (batch, tokens, width) are expected, got {tuple(x.shape)}"
            )
        new = self.of_rows(x.shape[0]).to(x.dtype)
        return torch.cat((new, x) if self.within else (x, new), dim=1)

    def left(self, x: Tensor | None, y: Tensor) -> Tensor:
        # those of one block stand before, those that go through all behind: neither has to know of the other
        return y[:, self.count :] if self.within else y[:, : y.shape[1] - self.count]

    # around a backbone that takes embeddings

    def around(self, module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = named(module)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if module is self.site.reader:
            mask, states = given.get("encoder_attention_mask"), given.get("encoder_hidden_states")
            if mask is not None and states is not None and mask.shape[-1] < states.shape[1]:
                given["encoder_attention_mask"] = self._longer(mask, mask, 1)
            return call((), given)
        cache = given.get("past_key_values")
        later = cache is not None and cache.get_seq_length() > 0
        mask = given.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            came = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            static = "; a static cache makes such masks, the default cache does not" if cache is not None else ""
            raise AttunementError(f"{self.key}: a mask (batch, tokens) is expected, got {came}{static}")
        placed = None if later else mask  # pads come first, then the new tokens
        if mask is not None:
            given["attention_mask"] = self._longer(mask, mask, 1)
        if "position_ids" in names:
            positions = given.get("position_ids")
            if positions is not None:
                given["position_ids"] = positions + self.count if later else self._numbered(positions, placed)
            elif mask is not None:
                inputs = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
                length = inputs.shape[1] + (0 if later else self.count)
                given["position_ids"] = counted(given["attention_mask"], length, self.start)
        if later:
            words = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
            self._fits(cache.get_seq_length() - self.count + words.shape[1])  # type: ignore[union-attr]
        if later and "embedded" not in self.takes:
            return call((), given)
        embeds, ids = given.get("inputs_embeds"), given.pop("input_ids", None)
        if embeds is None:
            assert self.site.embedding is not None
            embeds = self.site.embedding(ids)
        if "embedded" in self.takes:
            seen = cache.get_seq_length() - self.count if later else 0  # type: ignore[union-attr]
            places = torch.arange(seen, seen + embeds.shape[1], device=embeds.device)[None]
            places = places if mask is None else counted(mask, embeds.shape[1], 0)
            method: Any = self.method
            embeds = given["inputs_embeds"] = method.embedded(embeds, places, **self.values("embedded", embeds.dtype))
        if later:
            return call((), given)
        self._check(given, embeds)
        given["inputs_embeds"] = self._joined(embeds, self.of_rows(embeds.shape[0]), placed)
        if (types := given.get("token_type_ids")) is not None:
            given["token_type_ids"] = self._longer(types, placed, 0)
        out = call((), given)
        return out if self.site.reader is not None else self._shorter(out, placed, embeds.shape[1])

    def _check(self, given: Mapping[str, Any], embeds: Tensor) -> None:
        """Refuse what has a value for each token that nobody knows for the new ones, and a text that is too long."""
        known = ("attention_mask", "position_ids", "token_type_ids", "inputs_embeds")
        for name, value in given.items():
            own = name not in known and not name.startswith("encoder_") and isinstance(value, Tensor)
            if own and value.shape[:2] == embeds.shape[:2]:
                raise AttunementError(f"{self.key}: {name!r} has a value for each token, and none for the new ones")
        self._fits(embeds.shape[1])

    def _fits(self, length: int) -> None:
        limit = self.site.limit
        if self.site.learned and limit is not None and length + self.count > limit:
            raise AttunementError(
                f"{self.key}: {self.count} tokens and {length} of the text are more than its {limit} positions"
            )

    def _numbered(self, positions: Tensor, placed: Tensor | None) -> Tensor:
        if positions.dim() != 2:
            raise AttunementError(f"{self.key}: positions (batch, tokens) are expected, got {tuple(positions.shape)}")
        if placed is not None:
            positions = positions.expand(placed.shape[0], -1)
        return self._longer(positions + self.count, placed)

    def _joined(self, x: Tensor, new: Tensor, placed: Tensor | None) -> Tensor:
        """x (batch, tokens, width) with the new tokens before it, or behind the pads that begin a row."""
        both = torch.cat((new.to(x.dtype), x), dim=1)
        if placed is None:
            return both
        index = self._order(placed)
        return both.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))

    def _order(self, placed: Tensor) -> Tensor:
        """(batch, count + tokens): which of [new tokens, tokens] stands where, pads first."""
        pads = (placed.cumsum(1) == 0).sum(1, keepdim=True)  # (batch, 1)
        where = torch.arange(self.count + placed.shape[1], device=placed.device)[None]
        return torch.where(
            where < pads, where + self.count, torch.where(where < pads + self.count, where - pads, where)
        )

    def _longer(self, rows: Tensor, placed: Tensor | None, value: int | None = None) -> Tensor:
        """Rows (batch, tokens) with a value for each new token; positions count from 0."""
        new = rows.new_full((rows.shape[0], self.count), value or 0)
        if value is None:
            new = torch.arange(self.count, device=rows.device, dtype=rows.dtype).expand_as(new)
            new = new + self.start
        both = torch.cat((new, rows), dim=1)
        return both if placed is None else both.gather(1, self._order(placed))

    def _shorter(self, out: Any, placed: Tensor | None, length: int) -> Any:
        """The backbone's output without the new tokens."""

        def strip(t: Any) -> Any:
            if isinstance(t, (tuple, list)):
                return type(t)(strip(one) for one in t)
            if not isinstance(t, Tensor) or t.dim() < 3 or t.shape[1] != self.count + length:
                return t
            if placed is None:
                return t[:, self.count :]
            own = self._order(placed).argsort(1)[:, self.count :]
            return t.gather(1, own[..., None].expand(-1, -1, t.shape[-1]))

        if isinstance(out, tuple):
            return (strip(out[0]), *out[1:])
        for key in ("last_hidden_state", "hidden_states"):
            if out.get(key) is not None:
                out[key] = strip(out[key])
        return out
