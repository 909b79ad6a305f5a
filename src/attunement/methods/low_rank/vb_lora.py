"""VB-LoRA: low-rank factors put together from one bank of vectors that the whole model shares."""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from attunement.fields import Dropout, Rank, Tile
from attunement.method import Tensors, WeightMethod, register
from attunement.site import Site


@register("low_rank/vb_lora", source="https://arxiv.org/abs/2405.15179", placement="attention.{query,value}")
class VBLoRA(WeightMethod):
    """Vector-bank LoRA: W' = W + B A, whose columns and rows are pieces of `vector_length` from one bank for all matrices.

    A piece is the softmax-weighted sum of the `topk` vectors of the bank (vectors, vector_length) with the largest
    logits: A_logits (rank, in / vector_length, vectors), B_logits (out / vector_length, rank, vectors).

    Args:
        rank: 4, as in PEFT.
        vectors, vector_length: 256 each, as in PEFT; the length divides out and in.
        topk: 2, as in PEFT.
        bound: the bank starts uniform in ±0.02, as in PEFT.
        spread: logits start normal(0, 0.1), as in PEFT.
        dropout: on x before A, in training only.

    Start: as published, both factors are small and not zero. The authors give bank and logits learning rates of their own.
    """

    cannot: ClassVar[Mapping[str, str]] = {"identity": "both factors start from the bank, which is small and not zero"}

    rank: Rank = 4
    vectors: PositiveInt = 256
    vector_length: Tile = 256
    topk: PositiveInt = 2
    bound: PositiveFloat = 0.02
    spread: PositiveFloat = 0.1
    dropout: Dropout = 0.0

    def shared(self, sites: list[Site]) -> Tensors:
        return {"bank": torch.empty(self.vectors, self.vector_length).uniform_(-self.bound, self.bound)}

    def tensors(self, site: Site) -> Tensors:
        out, inputs = site.outputs // self.vector_length, site.inputs // self.vector_length
        return {
            "A_logits": self.spread * torch.randn(self.rank, inputs, self.vectors),  # (rank, in/length, vectors)
            "B_logits": self.spread * torch.randn(out, self.rank, self.vectors),  # (out/length, rank, vectors)
        }

    def refuse(self, site: Site) -> str | None:
        most = self.vectors
        return f"{self.topk} of {most} vectors cannot be chosen; the most is {most}" if self.topk > most else None

    def factors(self, _: Tensor, A_logits: Tensor, B_logits: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
        A, B = self._mixed(A_logits, bank), self._mixed(B_logits, bank)  # (rank, in/length, length), (out/length, ...)
        return B.mT.flatten(0, 1), A.flatten(1)  # (out, rank), (rank, in)

    def _mixed(self, logits: Tensor, bank: Tensor) -> Tensor:
        largest, index = logits.topk(self.topk, dim=-1)  # (..., topk)
        return (F.softmax(largest, dim=-1)[..., None] * F.embedding(index, bank)).sum(-2)  # (..., vector_length)
