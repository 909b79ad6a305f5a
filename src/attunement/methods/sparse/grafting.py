"""Grafting: after a full fine-tuning, a mask is learned over its changes that keeps those which matter."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from attunement.adapter import Adapter
from attunement.errors import AttunementError
from attunement.fields import Share
from attunement.method import Method, ParameterMethod, Tensors, fixed, register
from attunement.methods._entries import integer, scattered
from attunement.methods._phases import entries_of, most_changed, others_go_on
from attunement.methods._schedule import drawn
from attunement.part import Part
from attunement.site import Site, whole


@register("sparse/grafting", source="https://arxiv.org/abs/2302.06600", placement="blocks")
class Grafting(ParameterMethod):
    """Skill localisation: W' = W + change; then W' = W + gate change, the change fixed; then W' = W + values at `index`.

    In the second phase gate = base + (1 - 2 base) sigmoid(score - sigmoid_bias), scores of the parameter's shape: base is
    one for the entries of all parameters together whose |change| is largest, so that the gate starts close to them and may
    add or drop any. The third form has the entries whose gate is over a half, as they are: nothing trains in it.
    `adapter.succeed()`, which `at.Trainer` calls, goes from each to the next; a head goes on beside them.

    Args:
        share: of the entries that base has; 1e-5, the reference code's default; its scripts take 1e-7.
        count: how many instead.
        sigmoid_bias: 10, as in the reference code: gates start within 1e-4 of base.
        seed: of the first scores.
        phase, kept: which form it has, and how many entries of each parameter; set by `succeed`.

    Start: change zero; scores uniform in [0, 1). The placement leaves embeddings as they are, as the scripts do.
    The gradient of a score has the factor sigmoid' of about 5e-5 and the size of a change: the reference takes plain gradient
    descent with a learning rate of 1e7, for 10 steps of 128 batches, and keeps the best mask. It learns no head beside.
    """

    share: Share = 1e-5
    count: PositiveInt | None = None
    sigmoid_bias: float = 10.0
    seed: NonNegativeInt = 0
    phase: Literal["change", "mask", "graft"] = "change"
    kept: dict[str, PositiveInt] | None = None

    def tensors(self, site: Site) -> Tensors:
        if self.phase == "graft":
            count = (self.kept or {})[site.key]
            return {
                "values": fixed(torch.zeros(count)),
                "index": fixed(torch.zeros(count, dtype=integer(site.weight.numel()))),
            }
        zero = torch.zeros(site.weight.shape)  # the parameter's shape
        if self.phase == "change":
            return {"change": zero}
        base = torch.zeros(site.weight.shape, dtype=torch.bool)
        return {"score": torch.rand(site.weight.shape), "change": fixed(zero), "base": fixed(base)}

    def delta(self, _: Tensor, **t: Tensor) -> Tensor:
        if "values" in t:
            return scattered(t["values"], t["index"], _)
        return t["change"] if "score" not in t else self.gate(t["score"], t["base"]) * t["change"]

    def gate(self, score: Tensor, base: Tensor) -> Tensor:
        moved = torch.sigmoid(score - self.sigmoid_bias)
        return torch.where(base, 1 - moved, moved)

    def succeed(self, adapter: Adapter, parts: Sequence[Part]) -> Mapping[Site, tuple[Method, Tensors]] | None:
        if self.phase == "graft":
            return None
        held = {part: {name: whole(part.tensor(name)) for name in part.kinds} for part in parts}
        if self.phase == "change":
            changes = {part: values["change"] for part, values in held.items()}
            found = most_changed(adapter, changes, self.count, self.share)
            masks = {p: torch.zeros(D.numel(), dtype=torch.bool, device=D.device) for p, D in changes.items()}
            masks = {p: mask.index_fill(0, found[p], True).view(changes[p].shape) for p, mask in masks.items()}
            method = dataclasses.replace(self, phase="mask")
            draws = {p: torch.rand(masks[p].shape, generator=drawn(self.seed, i)) for i, p in enumerate(parts)}
            fresh: dict[Part, Tensors] = {p: {"score": draws[p], "base": fixed(masks[p])} for p in parts}
            then = {p.site: (method, {**fresh[p], "change": fixed(changes[p])}) for p in parts}
            return others_go_on(adapter, parts) | then
        open_ = {p: (self.gate(t["score"], t["base"]) > 0.5).flatten().nonzero()[:, 0] for p, t in held.items()}
        kept = {p.site.key: len(index) for p, index in open_.items() if len(index)}
        if not kept:
            raise AttunementError(f"succeed: no gate of {adapter.name!r} is open")
        method = dataclasses.replace(self, phase="graft", kept=kept)
        pairs = {p: entries_of(held[p]["change"], index) for p, index in open_.items() if len(index)}
        then = {p.site: (method, {"values": fixed(values), "index": index}) for p, (values, index) in pairs.items()}
        return others_go_on(adapter, parts) | then
