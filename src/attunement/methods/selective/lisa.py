"""LISA: full fine-tuning in which blocks take turns."""

from collections.abc import Sequence

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from attunement.adapter import Adapter
from attunement.method import ParameterMethod, Tensors, register
from attunement.methods._schedule import blocks_of, drawn, rest_all_but
from attunement.part import Part
from attunement.site import Site


@register("selective/lisa", source="https://arxiv.org/abs/2403.17919")
class LISA(ParameterMethod):
    """Layerwise importance sampled AdamW: W' = copy, trained in a few blocks at a time, drawn anew every few steps.

    `copy` is a tensor of float32 (float64 over float64) that stands in for the parameter, as in `Train`. What stands
    in no block trains at every step: by default embeddings, the last norm and the head, as published. `on="blocks"`
    leaves those frozen, and then nothing below the lowest drawn block is in the backward pass at all;
    {"blocks": LISA(), "head": Train()} is between the two.

    Args:
        active: how many blocks train at a time, at most all of them. 2 in the paper for 7B models and in its code.
        interval: steps between draws, counted from 0. 20 in the code.
        seed: of the draws, which depend on it and on the step alone.

    Start: the values of the base.
    The optimizer has every parameter from the start and passes over what has no gradient; it keeps what it knows of a
    block until that is drawn again, as the code does, where the paper starts each interval with a fresh optimizer.
    So activations and gradients are spared, and the optimizer's state of blocks that were never drawn.
    Plain DDP needs find_unused_parameters=True, which `at.Trainer` sets.
    """

    active: PositiveInt = 2
    interval: PositiveInt = 20
    seed: NonNegativeInt = 0

    def tensors(self, site: Site) -> Tensors:
        return {"copy": site.weight.clone()}

    def weight(self, _: Tensor, copy: Tensor) -> Tensor:
        return copy

    def carried(self, weight: Tensor) -> Tensor:
        return weight[:0]

    def choose(self, adapter: Adapter, parts: Sequence[Part]) -> None:
        blocks = blocks_of(part.site for part in parts)
        order = torch.randperm(len(blocks), generator=drawn(self.seed, adapter.step // self.interval))
        rest_all_but(parts, (blocks[i] for i in order[: self.active].tolist()))
