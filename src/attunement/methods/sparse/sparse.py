"""Sparse: a few entries of a weight, trained."""

from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from attunement.fields import Share
from attunement.method import Tensors, WeightMethod, fixed, register
from attunement.methods._entries import at_random, integer, scattered
from attunement.site import Site


@register("sparse/sparse", source="https://arxiv.org/abs/2406.13175", placement="attention.{query,value}")
class Sparse(WeightMethod):
    """Sparse high-rank adaptation (SHiRA): W' = W + D, D zero but for `values` at fixed entries.

    Args:
        density: share of the entries of W. One in a hundred; the paper trains 1 to 2 %.
        lora_rank: instead of a density, as many entries as a LoRA of this rank has numbers, rank * (out + in): PEFT's
            count, with a rank of 32.
        choice: "random", the largest by "magnitude", or the smallest ones ("smallest"), of W.
        seed: of the random choice, one for all matrices; PEFT's for the same seed are the same entries.
        entries: instead of a choice, the entries as (row, column), for every matrix the same.

    Start: values zero. Where the entries are is saved with them (int32 of row * in + column, in rising order), so a later
    choice by gradients can be put there through `entries` or `load_state`.
    The paper trains W itself under a masked gradient, which is the same function; its masks of whole rows, columns and
    diagonals can be given as `entries`. Its scale at inference is `at.Weighted`.
    """

    density: Share = 0.01
    lora_rank: PositiveInt | None = None
    choice: Literal["random", "magnitude", "smallest"] = "random"
    seed: NonNegativeInt = 0
    entries: Annotated[tuple[tuple[NonNegativeInt, NonNegativeInt], ...], Field(min_length=1)] | None = None

    def __post_init__(self) -> None:
        said = [name for name in ("density", "lora_rank", "entries") if getattr(self, name) != getattr(Sparse, name)]
        if len(said) > 1:
            raise ValueError(f"{' and '.join(said)} each say which share of W is trained; give one of them")

    def count(self, site: Site) -> int:
        if self.entries is not None:
            return len(set(self.entries))
        if self.lora_rank is not None:
            return self.lora_rank * (site.outputs + site.inputs)
        return max(1, round(self.density * site.outputs * site.inputs))

    def refuse(self, site: Site) -> str | None:
        out, inputs = site.outputs, site.inputs
        outside = [entry for entry in self.entries or () if entry[0] >= out or entry[1] >= inputs]
        if outside:
            return f"entry {outside[0]} is outside of {out} x {inputs}; the last is {(out - 1, inputs - 1)}"
        if self.count(site) > out * inputs:
            most = out * inputs // (out + inputs)
            return (
                f"lora_rank {self.lora_rank} is more entries than a {out} x {inputs} matrix has; the largest is {most}"
            )
        return None

    def tensors(self, site: Site) -> Tensors:
        count, size = self.count(site), site.outputs * site.inputs
        if self.entries is not None:
            index = torch.tensor([row * site.inputs + column for row, column in set(self.entries)])
        elif self.choice == "random":
            index = at_random(size, count, self.seed)
        else:
            index = site.weight.abs().flatten().topk(count, largest=self.choice == "magnitude", sorted=False).indices
        index = index.sort().values.to(integer(size))
        return {"values": torch.zeros(count), "index": fixed(index)}  # (count,), (count,)

    def delta(self, _W: Tensor, values: Tensor, index: Tensor) -> Tensor:
        return scattered(values, index, _W)  # (out, in)
