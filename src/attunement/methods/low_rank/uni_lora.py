"""Uni-LoRA: every entry of every factor of a model is one of a few trained numbers."""

import functools
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from attunement.fields import Dropout, Rank
from attunement.method import Tensors, WeightMethod, fixed, register, seeded
from attunement.methods._sharing import copies, nth, place
from attunement.site import Site


@register("low_rank/uni_lora", source="https://arxiv.org/abs/2506.00799", placement="attention.{query,value}")
class UniLoRA(WeightMethod):
    """Uni-LoRA: W' = W + B A, where all entries of all A (rank, in) and B (out, rank) are (P theta), theta (length,) trained.

    Each row of P has a single entry, at a random place, and each column a length of one: an entry of A or B is
    theta[i] / sqrt(n_i), n_i being how many entries have theta[i].

    Args:
        rank: 4, as in the paper's runs and PEFT.
        length: d, how many numbers are trained in all; 256, as in PEFT. The paper has 23,040 on RoBERTa-base.
        seed: of the places, which are all equally often taken, as in PEFT; the paper draws each place on its own. 42, as in
            PEFT, which has the same places where it meets the matrices in the same order.
        bound: theta starts uniform in ±0.02, as in PEFT.
        stored: write the places with the adapter; else they follow from the seed.
        dropout: on x before A, in training only.

    Start: as published, both factors are small and not zero.
    """

    cannot: ClassVar[Mapping[str, str]] = {
        "identity": "both factors start from one vector, which is small and not zero"
    }

    rank: Rank = 4
    length: PositiveInt = 256
    seed: NonNegativeInt = 42
    bound: PositiveFloat = 0.02
    stored: bool = False
    dropout: Dropout = 0.0

    def needed(self, site: Site) -> int:
        """How many entries the factors of a matrix have."""
        return self.rank * (site.outputs + site.inputs)

    def shared(self, sites: list[Site]) -> Tensors:
        total = sum(copies(site) * self.needed(site) for site in sites)
        counts = torch.from_numpy(_places(total, self.length, self.seed)).long().bincount(minlength=self.length)
        theta = torch.empty(self.length).uniform_(-self.bound, self.bound)
        kind = fixed if self.stored else seeded
        return {"theta": theta, "share": kind(counts.clamp_min(1).rsqrt())}  # (length,), (length,): 1 / sqrt(n)

    def tensors(self, site: Site) -> Tensors:
        needs = [copies(one) * self.needed(one) for one in site.among or [site]]
        start, inner = sum(needs[: place(site)]) + nth(site) * self.needed(site), self.rank * site.inputs
        total = max(sum(needs), start + self.needed(site))
        index = torch.from_numpy(_places(total, self.length, self.seed)[start : start + self.needed(site)].copy())
        kind = fixed if self.stored else seeded
        return {
            "A_index": kind(index[:inner].view(self.rank, site.inputs)),  # (rank, in)
            "B_index": kind(index[inner:].view(site.outputs, self.rank)),  # (out, rank)
        }

    def factors(
        self, _: Tensor, A_index: Tensor, B_index: Tensor, theta: Tensor, share: Tensor
    ) -> tuple[Tensor, Tensor]:
        values = theta * share  # (length,)
        return values[B_index], values[A_index]  # (out, rank), (rank, in)


@functools.lru_cache(maxsize=1)
def _places(total: int, length: int, seed: int) -> np.ndarray:
    """For each of `total` entries the trained number that it is; every one equally often, as PEFT draws them."""
    generator = np.random.default_rng(seed)
    places = np.repeat(np.arange(length), total // length)
    if rest := total % length:
        places = np.concatenate([places, generator.choice(length, size=rest, replace=False)])
    generator.shuffle(places)
    return places.astype(np.int32)
