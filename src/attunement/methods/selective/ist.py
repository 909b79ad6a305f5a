"""IST: LoRA in which blocks take turns, the important ones oftener."""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from attunement.adapter import Adapter
from attunement.errors import AttunementError
from attunement.fields import Share
from attunement.method import Tensors, register, running
from attunement.methods._schedule import Block, agreed, blocks_of, drawn, rest_all_but
from attunement.methods.low_rank.lora import LoRA
from attunement.part import Part
from attunement.site import Site


@register(
    "selective/ist", source="https://arxiv.org/abs/2410.11772", placement="attention.{query,key,value}|mlp.{up,down}"
)
class IST(LoRA):
    """Importance-aware sparse tuning: LoRA, W' = W + (alpha / rank) B A, of which each step trains some blocks.

    Every block has a number I, zero at first. A step trains a quarter of the blocks, drawn with weights sigmoid(-I).
    Every `interval` steps the loss is measured with half of the blocks suppressed, those drawn with weights sigmoid(I),
    for three such sets; with R = exp(-loss), each block of a set gets I += 10 (R - mean R) sigmoid(I) sigmoid(-I).
    So a block whose absence hurts little is drawn less often: I is an unimportance, with the sign of the code.

    Args:
        rank, alpha, rank_stabilised, dropout, lora_plus: as in `LoRA`. The authors use rank 32 and alpha 64.
        updated, suppressed: shares of the blocks that a step trains and a measurement suppresses.
        suppression: what is left of the change of a suppressed block.
        candidates: how many sets are measured at a time.
        reward_rate: the step of I.
        interval: steps between measurements.
        seed: of the draws, which depend on it, on the step and on I alone.

    The method carries a LoRA of its own; the paper takes any adapter that stands in every block.
    It measures with `adapter.objective`, a function without arguments that returns the loss on a batch; where there is
    none, `at.Trainer` gives its `training_loss`, on 16 training rows as in the code. The model is in eval mode then. The
    measurement comes just before the optimizer's step, in the code just after. Plain DDP needs
    find_unused_parameters=True, which `at.Trainer` sets; the losses of its processes are averaged.
    The paper's own formulas were not compared.
    """

    measures: ClassVar[str] = "training"

    updated: Share = 0.25
    suppressed: Share = 0.5
    suppression: Annotated[float, Field(ge=0, lt=1)] = 0.25
    candidates: PositiveInt = 3
    reward_rate: PositiveFloat = 10.0
    interval: PositiveInt = 10
    seed: NonNegativeInt = 0

    def shared(self, sites: list[Site]) -> Tensors:
        blocks = blocks_of(sites)
        return {"importance": running(torch.zeros(len(blocks)))} if blocks else {}  # (blocks,)

    def choose(self, adapter: Adapter, parts: Sequence[Part]) -> None:
        if blocks := blocks_of(part.site for part in parts):
            _objective(adapter)
            drawn_ = _draw(-parts[0].tensor("importance"), self.updated, drawn(self.seed, 0, adapter.step))
            rest_all_but(parts, (blocks[i] for i in drawn_))

    def before_step(self, adapter: Adapter, parts: Sequence[Part]) -> None:
        blocks = blocks_of(part.site for part in parts)
        if (adapter.step + 1) % self.interval or not blocks:
            return
        I = parts[0].tensor("importance")  # (blocks,)  # noqa: E741
        generator = drawn(self.seed, 1, adapter.step)
        sets: list[tuple[int, ...]] = []
        for _ in range(100 * self.candidates):  # few blocks have few sets
            if len(sets) < self.candidates and (found := _draw(I, self.suppressed, generator)) not in sets:
                sets.append(found)
        rewards = agreed(torch.stack([self._reward(adapter, parts, [blocks[i] for i in one]) for one in sets]).to(I))
        slope = torch.sigmoid(I) * torch.sigmoid(-I)
        for one, centred in zip(sets, rewards - rewards.mean(), strict=True):
            I[list(one)] += self.reward_rate * centred * slope[list(one)]

    def _reward(self, adapter: Adapter, parts: Sequence[Part], quiet: Collection[Block]) -> Tensor:
        """exp(-loss) with the change of these blocks suppressed."""
        scales = [part.tensor("scale") for part in parts if (part.site.stack or "", part.site.block) in quiet]
        before = [scale.clone() for scale in scales]
        modes = [(module, module.training) for module in adapter.model.modules()]
        try:
            for scale in scales:
                scale.mul_(self.suppression)
            adapter.model.eval()
            with torch.no_grad():
                return torch.exp(-_objective(adapter)().detach().float())
        finally:
            for scale, value in zip(scales, before, strict=True):
                scale.copy_(value)
            for module, training in modes:
                module.training = training


def _draw(log_odds: Tensor, share: float, generator: torch.Generator) -> tuple[int, ...]:
    """A share of the blocks, one at least, drawn without replacement with weights sigmoid(log_odds)."""
    weights = F.logsigmoid(log_odds.double().cpu())
    noise = -torch.log(-torch.log(torch.rand(weights.shape, generator=generator, dtype=torch.float64)))
    order = (weights + noise).argsort(descending=True)  # the largest of weight plus Gumbel noise: such a draw
    return tuple(sorted(order[: max(1, math.floor(share * len(order)))].tolist()))


def _objective(adapter: Adapter) -> Callable[[], Tensor]:
    if adapter.objective is None:
        raise AttunementError(
            f"IST: it measures losses; set objective of the adapter {adapter.name!r} to a function without arguments "
            "that returns the loss on a batch, or train with at.Trainer"
        )
    return adapter.objective
