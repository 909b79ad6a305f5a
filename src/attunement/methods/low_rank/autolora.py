"""AutoLoRA: LoRA whose rank at each matrix is learned on a second stream of data, and which is then trained anew."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import PositiveFloat
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


@register("low_rank/autolora", source="https://arxiv.org/abs/2403.09113", placement="attention.{query,value}")
class AutoLoRA(WeightMethod):
    """Meta-learned ranks: W' = W + (alpha / rank) B diag(softmax(a)) A; a (rank,) is learned on data that A and B never see.

    Before every step of A and B, a takes a step of Adam down the loss of the second stream: `adapter.objective`, a
    function without arguments that returns the loss on its next batch. In the second phase (`adapter.succeed`, which
    `at.Trainer` calls) each matrix gets a LoRA of as many ranks as have a_j >= mean(a), trained from its own start.

    Args:
        rank: the largest rank. 8, as in the reference code.
        alpha: numerator of the scale in both phases, so that fewer ranks have a larger scale; 16, as there.
        lr: of a. 3e-4 with betas (0.5, 0.999), as there.
        dropout: on x before A, in training only. 0 in the search and 0.1 in the training there.

    Start: A uniform in ±1/sqrt(in), B zero, a one.
    The reference code (70 % of the rows for A and B, 30 % for a) looks one step ahead: it takes a's gradient after a step
    of A and B, and adds finite differences of the training loss. Here a's gradient is of the first order, where A and B
    stand (DARTS with xi = 0). The paper compares softmax(a) with 1 / rank, its code a itself with the mean, as here.
    `at.Trainer` holds such rows out of its own and says how many; an objective of one's own keeps how far its stream has
    come when a run is resumed.
    """

    measures: ClassVar[str] = "unseen"

    rank: Rank = 8
    alpha: PositiveFloat = 16.0
    lr: PositiveFloat = 3e-4
    dropout: Dropout = 0.0

    def tensors(self, site: Site) -> Tensors:
        return {
            "A": kaiming(self.rank, site.inputs),  # (rank, in)
            "B": torch.zeros(site.outputs, self.rank),  # (out, rank)
            "a": fixed(torch.ones(self.rank)),  # (rank,)
            "mean": running(torch.zeros(self.rank)),  # (rank,), of a's gradients, as Adam keeps it
            "square": running(torch.zeros(self.rank)),  # (rank,)
            "scale": fixed(scale(self.rank, self.alpha, rank_stabilised=False)),  # ()
        }

    def factors(self, _: Tensor, A: Tensor, B: Tensor, a: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return B, scale, a.softmax(-1), A  # (out, rank), (), (rank,), (rank, in)

    def before_step(self, adapter: Adapter, parts: Sequence[Part]) -> None:
        if adapter.objective is None:
            raise AttunementError(
                f"AutoLoRA: ranks are learned on a second stream of data; set objective of the adapter {adapter.name!r} "
                "to a function without arguments that returns the loss on its next batch"
            )
        held = [part.holder._buffers["a"] for part in parts]
        for a in held:
            a.requires_grad_()  # type: ignore[union-attr]
        try:
            with torch.enable_grad():
                gradients = torch.autograd.grad(adapter.objective(), held)  # type: ignore[arg-type]
        finally:
            for a in held:
                a.requires_grad_(False)  # type: ignore[union-attr]
        step = adapter.step + 1
        for part, g in zip(parts, gradients, strict=True):
            a, mean, square, g = (*(part.tensor(name) for name in ("a", "mean", "square")), agreed(g))
            mean.lerp_(g, 1 - 0.5)
            square.lerp_(g.square(), 1 - 0.999)
            a.sub_(self.lr * (mean / (1 - 0.5**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8))

    def succeed(self, adapter: Adapter, parts: Sequence[Part]) -> Mapping[Site, Method]:
        return {part.site: LoRA(self._kept(part.tensor("a")), self.alpha, dropout=self.dropout) for part in parts}

    def _kept(self, a: Tensor) -> int:
        """How many ranks have their share at least; of a stack of matrices the most that one has."""
        return int((a / a.sum(-1, keepdim=True) >= 1 / self.rank).sum(-1).max())
