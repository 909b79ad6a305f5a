"""MTLoRA: LoRA for all tasks in most of a stack, and one for each task where it ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveFloat
from torch import Tensor

from attunement.fields import Rank
from attunement.method import OutputMethod, Tensors, kaiming, register
from attunement.site import Site
from attunement.statistics import Statistics


@register("low_rank/mt_lora", source="https://arxiv.org/abs/2403.20320", placement="attention.*|mlp.*")
class MTLoRA(OutputMethod):
    """y' = y + scale B A x in all blocks but the last; y' = y + scale B_t A_t x there, for the task t of the batch.

    A (rank, in) and B (out, rank) serve all tasks, task_A (tasks, task_rank, in) and task_B (tasks, out, task_rank) one each.
    `adapter.give(task=t)`, or one for each row (batch,), says which; 0 until then. Queries, keys and values are the same for
    all tasks everywhere.

    Args:
        tasks: how many; set to 0 by `adapt` where all tasks share.
        rank, task_rank: 64 and 4, as in the authors' configurations.
        scale: 4, as there; there is no division by the rank.
        both: whether a task's part adds to one for all, which is the authors' shared_mode "matrixv2"; by default it stands
            alone, as in their "matrix".
        everywhere: whether every block has parts for the tasks.

    Start: A uniform in ±1/sqrt(in), B zero.
    The authors run a Swin transformer, where the part for all of each stage's last block goes on to the next stage and those
    of the tasks go to decoders, in one pass for all tasks. Here a pass is of one task, and the last block is that of the whole
    stack. They also train patch embedding, norms and position biases, which `Train` beside it does, and drop 5 % of x.
    """

    cannot: ClassVar[Mapping[str, str]] = {"merge": "it depends on the task"}
    asks: ClassVar[tuple[str, ...]] = ("task",)

    tasks: NonNegativeInt = 1
    rank: Rank = 64
    task_rank: Rank = 4
    scale: PositiveFloat = 4.0
    both: bool = False
    everywhere: bool = False

    def plan(self, sites: Sequence[Site], statistics: Mapping[Site, Statistics]) -> Mapping[Site, MTLoRA]:
        last = {stack: max(s.block or 0 for s in sites if s.stack == stack) for stack in {s.stack for s in sites}}
        alike = dataclasses.replace(self, tasks=0)

        def apart(site: Site) -> bool:
            ends = site.block is not None and (self.everywhere or site.block == last[site.stack])
            return ends and not site.role.endswith((".query", ".key", ".value", ".qkv", ".kv"))

        return {site: self if apart(site) else alike for site in sites}

    def tensors(self, site: Site) -> Tensors:
        made: dict[str, Tensor] = {}
        if self.both or not self.tasks:
            made |= {"A": kaiming(self.rank, site.inputs), "B": torch.zeros(site.outputs, self.rank)}
        if self.tasks:
            made["task_A"] = kaiming(self.tasks, self.task_rank, site.inputs)
            made["task_B"] = torch.zeros(self.tasks, site.outputs, self.task_rank)
        return made

    def output(self, x: Tensor, y: Tensor, task: Tensor | int = 0, **t: Tensor) -> Tensor:
        x = x.to(next(iter(t.values())).dtype)  # (batch, ..., in)
        if "A" in t:
            y = y + self.scale * F.linear(F.linear(x, t["A"]), t["B"])
        if "task_A" in t:
            ids = torch.as_tensor(task, device=y.device).reshape(-1)  # (1,) or (batch,)
            ids = (
                ids if len(ids) == 1 else ids.repeat_interleave(x.shape[0] // len(ids))
            )  # windows of a row are together
            h = x.reshape(x.shape[0], -1, x.shape[-1]) @ t["task_A"][ids].mT  # (batch, tokens, task_rank)
            y = y + self.scale * (h @ t["task_B"][ids].mT).reshape(y.shape)
        return y
