"""Poly: an inventory of LoRAs, the skills, of which each task takes its own share; with splits, multi-head routing."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from attunement.errors import AttunementError
from attunement.fields import Rank, Tile
from attunement.method import Tensors, WeightMethod, kaiming, register
from attunement.site import Site


class Relax(nn.Module):
    """Logits, or while training those of a relaxed Bernoulli draw at temperature one."""

    def forward(self, logits: Tensor) -> Tensor:
        if not self.training:
            return logits
        return logits + torch.logit(torch.rand_like(logits), eps=torch.finfo(logits.dtype).eps)


@register("low_rank/poly", source="https://arxiv.org/abs/2202.13914", placement="attention.*|mlp.*")
class Poly(WeightMethod):
    """Polytropon: W' = W + (alpha / rank) B_t A_t, with A_t = sum_s z_ts A_s and B_t = sum_s z_ts B_s for task t.

    A (skills, rank, in) and B (skills, out, rank) are the skills; z_t = sigmoid(l_t) / sum_s sigmoid(l_ts), from logits l
    (tasks, splits, skills) of each matrix. With splits, as in https://arxiv.org/abs/2211.03831, each block of in / splits
    columns of A_t and of out / splits rows of B_t has a z of its own. While training, sigmoid(l) is a relaxed Bernoulli draw.

    The task of a batch is told by `adapter.give(task=t)`, that of each row by `adapter.give(task=tensor)` (batch,). A draw is
    of one row, or of the whole batch where it has one task. Merging and converting are of one task.

    Args:
        tasks: how many.
        rank, skills, splits: 1, 8 and 1, as in the authors' configurations; PEFT has 8, 4 and 1.
        alpha: 1, as in PEFT.
        relaxed: draw while training: the default of the authors' code, off in their configurations, always on in PEFT.
        logits_lr: factor on the learning rate of the logits, 0.1 beside 1e-3 there; they have no weight decay there.

    Start: A uniform in ±1/sqrt(in / splits), B zero, logits uniform in ±0.001. Where x is not to be had, in a convolution, an
    embedding or experts, and where it meets other changes of the weight, there is no draw and the batch is of one task. Left
    out: logits for several matrices together, and the Indian-buffet prior of the first paper's code, off there.
    """

    cannot: ClassVar[Mapping[str, str]] = dict.fromkeys(("ddp", "fsdp"), "while training each process draws on its own")
    asks: ClassVar[tuple[str, ...]] = ("task",)

    tasks: PositiveInt = 1
    rank: Rank = 1
    skills: PositiveInt = 8
    splits: Tile = 1
    alpha: PositiveFloat = 1.0
    relaxed: bool = True
    logits_lr: PositiveFloat = 100.0

    def tensors(self, site: Site) -> Tensors:
        return {
            "A": kaiming(self.skills, self.rank, self.splits, site.inputs // self.splits).flatten(2),
            "B": torch.zeros(self.skills, site.outputs, self.rank),
            "logits": torch.empty(self.tasks, self.splits, self.skills).uniform_(-1e-3, 1e-3),
        }

    def build(self, site: Site) -> Mapping[str, nn.Module]:
        return {"relax": Relax() if self.relaxed else nn.Identity()}

    def rates(self) -> Mapping[str, Mapping[str, float]]:
        return {"logits": {"lr": self.logits_lr, "weight_decay": 0.0}}

    def told(self, logits: Tensor, task: Tensor | int | None) -> Tensor:
        """The logits of the task, (1, splits, skills), or of the task of each row, (batch, splits, skills)."""
        if task is None and self.tasks > 1:
            raise AttunementError(f"Poly: which of its {self.tasks} tasks this is has to be said: adapter.give(task=0)")
        if isinstance(task, int) and not 0 <= task < self.tasks:
            raise AttunementError(f"Poly: task must be from 0 to {self.tasks - 1}, got {task}")
        task = 0 if task is None else task
        return logits.index_select(0, torch.as_tensor(task, device=logits.device).reshape(-1))

    def mixed(self, logits: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """B_t (n, out, rank) and A_t (n, rank, in) of logits (n, splits, skills)."""
        z = torch.sigmoid(logits)
        z = z / (z.sum(-1, keepdim=True) + 1e-12)
        A = torch.einsum("nqs,srqi->nrqi", z, A.unflatten(2, (self.splits, -1))).flatten(2)
        B = torch.einsum("nqs,sqor->nqor", z, B.unflatten(1, (self.splits, -1))).flatten(1, 2)
        return B * (self.alpha / self.rank), A

    def factors(
        self, _: Tensor, A: Tensor, B: Tensor, logits: Tensor, task: Tensor | int | None = None
    ) -> tuple[Tensor, ...]:
        told = self.told(logits, task)
        if len(told) > 1:
            raise AttunementError(f"Poly: one matrix is of one task, and one each is told for {len(told)} rows")
        B, A = self.mixed(told, A, B)
        return B[0], A[0]  # (out, rank), (rank, in)

    def output(
        self,
        x: Tensor,
        y: Tensor,
        A: Tensor,
        B: Tensor,
        logits: Tensor,
        relax: nn.Module,
        task: Tensor | int | None = None,
    ) -> Tensor:
        told = self.told(logits, task)
        if len(x) % len(told):
            raise AttunementError(f"Poly: tasks are told for {len(told)} rows, and x has {len(x)}")
        B, A = self.mixed(relax(told), A, B)
        rows = x.to(A.dtype).reshape(len(told), -1, x.shape[-1])  # windows and beams of a row stand together
        return y + (rows @ A.mT @ B.mT).reshape(y.shape)
