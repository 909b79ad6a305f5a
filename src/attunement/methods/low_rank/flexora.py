"""Flexora: LoRA in the layers that a second stream of data chooses."""

from collections.abc import Hashable, Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from attunement.adapter import Adapter
from attunement.errors import AttunementError
from attunement.fields import Dropout, Rank
from attunement.method import Method, Tensors, WeightMethod, fixed, kaiming, register, running
from attunement.methods._low_rank import scale
from attunement.methods._schedule import agreed
from attunement.methods.low_rank.lora import LoRA
from attunement.part import Part
from attunement.site import Site


@register("low_rank/flexora", source="https://arxiv.org/abs/2408.10774", placement="attention.{query,value}")
class Flexora(WeightMethod):
    """Flexible LoRA: W' = W + g_l (alpha / rank) B A, with g = L softmax(h), h (L,) one number for each of L layers.

    h learns on data that A and B never see: before each of their steps it takes one of Adam down the loss of `batches`
    batches of the second stream, `adapter.objective`, a function without arguments that returns the loss on its next
    batch; `at.Trainer` holds rows out for it. In the second phase (`adapter.succeed`, which `at.Trainer` calls) the layers
    with h > 0 get a LoRA, trained from its own start; the others none.

    Args:
        rank: 8.
        alpha: numerator of the scale in both phases; None is `rank`.
        dropout: on x before A, in training only.
        lr: of h; 0.01, as in the authors' code.
        batches: 8, as in the authors' code.

    Start: A uniform in ±1/sqrt(in), B zero, h zero, so g = 1. A layer is a block; a matrix in none is one of its own.
    As in the authors' code, h's gradient is taken where A and B stand, without unrolling a step of theirs. There g
    multiplies what enters the dropout, A and B, so the change by g^3; here once, as the gate of a layer is described.
    """

    measures: ClassVar[str] = "unseen"

    rank: Rank = 8
    alpha: PositiveFloat | None = None
    dropout: Dropout = 0.0
    lr: PositiveFloat = 0.01
    batches: PositiveInt = 8

    def shared(self, sites: list[Site]) -> Tensors:
        h = torch.zeros(len(_layers(sites)))
        return {"h": fixed(h), "mean": running(h.clone()), "square": running(h.clone())}  # (L,), as Adam keeps them

    def tensors(self, site: Site) -> Tensors:
        return {
            "A": kaiming(self.rank, site.inputs),  # (rank, in)
            "B": torch.zeros(site.outputs, self.rank),  # (out, rank)
            "layer": fixed(torch.tensor([_layers(site.among or [site]).index(_layer(site))])),  # (1,)
            "scale": fixed(scale(self.rank, self.alpha, rank_stabilised=False)),  # ()
        }

    def factors(self, _: Tensor, A: Tensor, B: Tensor, h: Tensor, layer: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        gate = len(h) * h.softmax(-1).index_select(0, layer)  # (1,)
        return B, (scale * gate).reshape(()), A

    def before_step(self, adapter: Adapter, parts: Sequence[Part]) -> None:
        if adapter.objective is None:
            raise AttunementError(
                f"Flexora: layers are chosen on a second stream of data; set objective of the adapter {adapter.name!r} "
                "to a function without arguments that returns the loss on its next batch"
            )
        held = next(holder for holder in parts[0].common if "h" in holder._buffers)._buffers["h"]
        assert held is not None
        held.requires_grad_()
        try:
            with torch.enable_grad():
                each = [torch.autograd.grad(adapter.objective(), held)[0] for _ in range(self.batches)]
        finally:
            held.requires_grad_(False)
        h, mean, square = (parts[0].tensor(name) for name in ("h", "mean", "square"))
        g, step = agreed(torch.stack(each).sum(0)), adapter.step + 1
        mean.lerp_(g, 1 - 0.9)
        square.lerp_(g.square(), 1 - 0.999)
        h.sub_(self.lr * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8))

    def succeed(self, adapter: Adapter, parts: Sequence[Part]) -> Mapping[Site, Method]:
        h, lora = parts[0].tensor("h"), LoRA(self.rank, self.alpha, dropout=self.dropout)
        chosen = {part.site: lora for part in parts if bool((h[part.tensor("layer").flatten()[0]] > 0).all())}
        return dict(chosen or dict.fromkeys((part.site for part in parts), lora))


def _layer(site: Site) -> Hashable:
    return site.key if site.block is None else (site.stack or "", site.block)


def _layers(sites: Sequence[Site]) -> list[Hashable]:
    return list(dict.fromkeys(_layer(site) for site in sites))
