"""Diff pruning: a change of every parameter, which a differentiable L0 penalty makes sparse."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from attunement.adapter import Adapter
from attunement.fields import Share
from attunement.method import Method, ParameterMethod, Tagged, Tensors, register, running
from attunement.methods._entries import bare, scattered
from attunement.methods._phases import entries_of, most_changed, others_go_on
from attunement.methods._schedule import drawn
from attunement.part import Part
from attunement.site import Site, whole


@register("sparse/diff_pruning", source="https://arxiv.org/abs/2012.07463")
class DiffPruning(ParameterMethod):
    """W' = W + gate(alpha) gate(group) change; then W' = W plus `values` (count,) at `index`, zero elsewhere.

    A gate is hard concrete: gate(a) = clamp(sigmoid(a + noise) (upper - lower) + lower, 0, 1), its noise logistic and drawn
    anew for every step. alpha and change have the parameter's shape, group (1,) is one for the whole parameter. The loss gets
    sparsity times the sum of sigmoid(a - log(-lower / upper)), the chance that a gate is not zero.
    In the second phase (`adapter.succeed`, which `at.Trainer` calls) the entries of all parameters together with the largest
    |gated change| go on to train, ungated, from their change; a head goes on beside them.

    Args:
        share: of the entries in the second phase; 0.005, the paper's half percent.
        count: how many instead.
        sparsity: 1.25e-7, as in the reference code.
        lower, upper: -1.5 and 1.5, as there.
        gate_start: first value of alpha and group: 5, as there, which closes one gate in thirty.
        mask_rate: learning rate of alpha and group over that of the change: 1e4, as there 0.1 beside 1e-5.
        structured: whether there is a group.
        seed: of the noise, which depends on it and on the step alone; none is left in a loaded adapter.
        kept: how many entries each parameter has in the second phase; set by `succeed`.

    Start: change zero. The placement is every parameter. Five times a parameter's size trains or is kept in the first phase.
    The reference code draws for every batch, here for every step; groups that are layers are left out. Its scripts fine-tune
    for 3 epochs in either phase, a learning rate of 1e-5 first and 5e-5 then.
    """

    share: Share = 0.005
    count: PositiveInt | None = None
    sparsity: NonNegativeFloat = 1.25e-7
    lower: Annotated[float, Field(lt=0)] = -1.5
    upper: Annotated[float, Field(gt=1)] = 1.5
    gate_start: float = 5.0
    mask_rate: PositiveFloat = 1e4
    structured: bool = True
    seed: NonNegativeInt = 0
    kept: dict[str, PositiveInt] | None = None

    def tensors(self, site: Site) -> Tensors:
        if self.kept is not None:
            return bare(site, self.kept[site.key])
        zero = torch.zeros(site.weight.shape)  # the parameter's shape
        made: dict[str, Tensor | Tagged] = {
            "change": zero,
            "alpha": zero + self.gate_start,
            "noise": running(zero.clone()),
        }
        if self.structured:
            made |= {"group": torch.full((1,), self.gate_start), "shift": running(torch.zeros(1))}
        return made

    def rates(self) -> Mapping[str, Mapping[str, float]]:
        return {name: {"lr": self.mask_rate, "weight_decay": 0.0} for name in ("alpha", "group")}

    def gate(self, a: Tensor, noise: Tensor) -> Tensor:
        return (torch.sigmoid(a + noise) * (self.upper - self.lower) + self.lower).clamp(0, 1)

    def delta(self, _: Tensor, **t: Tensor) -> Tensor:
        if "values" in t:
            return scattered(t["values"], t["index"], _)
        gated = self.gate(t["alpha"], t["noise"]) * t["change"]
        return self.gate(t["group"], t["shift"]) * gated if "group" in t else gated

    def penalty(self, alpha: Tensor | None = None, group: Tensor | None = None) -> Tensor:
        likely = [torch.sigmoid(a - math.log(-self.lower / self.upper)).sum() for a in (alpha, group) if a is not None]
        return self.sparsity * torch.stack(likely).sum() if likely else torch.zeros(())

    def choose(self, adapter: Adapter, parts: Sequence[Part]) -> None:
        for number, part in enumerate(parts if self.kept is None else ()):
            for name in ("noise", "shift") if self.structured else ("noise",):
                noise = part.tensor(name)
                seed = drawn(self.seed, number, adapter.step).initial_seed()
                even = torch.rand(
                    noise.shape, generator=torch.Generator(noise.device).manual_seed(seed), device=noise.device
                )
                noise.copy_(even.clamp(1e-4, 1 - 1e-4).logit())

    def succeed(self, adapter: Adapter, parts: Sequence[Part]) -> Mapping[Site, tuple[Method, Tensors]] | None:
        if self.kept is not None:
            return None
        held = {part: {name: whole(part.tensor(name)) for name in part.kinds} for part in parts}
        gated = {part: self.delta(values["change"], **values) for part, values in held.items()}
        found = most_changed(adapter, gated, self.count, self.share)
        found = {part: index[gated[part].flatten()[index] != 0] for part, index in found.items()}
        method = dataclasses.replace(self, kept={p.site.key: len(index) for p, index in found.items() if len(index)})
        pairs = {p: entries_of(held[p]["change"], index) for p, index in found.items() if len(index)}
        then: dict[Site, tuple[Method, Tensors]]
        then = {p.site: (method, {"values": values, "index": index}) for p, (values, index) in pairs.items()}
        return others_go_on(adapter, parts) | then
