"""Visual query tuning: queries that read every block's tokens and change none of them."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from attunement.method import NetworkMethod, Tensors, register


@register("side/vqt", source="https://arxiv.org/abs/2212.03220", placement="backbone")
class VQT(NetworkMethod):
    """y' = y + [O_1 ... O_L] W,  O_i = block_i(Q_i) with the keys and values of what block i was given.

    Q_i (count, width) are queries of block i; nothing attends to them, so what the block gives for the tokens stays
    what it was, and nothing is kept for a backward pass through the stack. Each O_i is flattened and divided by its
    length; W is (blocks x count x width, width).

    Args:
        count: queries in each block, 1 as the source's code recommends.

    The source has a linear head on [y; O_1 ... O_L]; W in front of the model's own head gives the same functions where
    that has no more outputs than inputs. Start: Q uniform in +-sqrt(6 / (fan_in + width)) as in the source, W zero.
    """

    cannot: ClassVar[Mapping[str, str]] = {
        "merge": "its queries stand beside the weights",
    }
    queries: ClassVar[bool] = True

    count: PositiveInt = 1

    def refuse(self, site: Any) -> str | None:
        return "its queries have no place among the positions and pads of a text" if site.words else None

    def tensors(self, site: Any) -> Tensors:
        bound, blocks = math.sqrt(6 / (site.fan_in + site.inputs)), len(site.blocks)
        return {
            "Q": torch.empty(blocks, self.count, site.inputs).uniform_(-bound, bound),
            "W": torch.zeros(blocks * self.count * site.inputs, site.inputs),
        }

    def network(self, states: list[Tensor], runs: Any, y: Tensor, Q: Tensor, W: Tensor) -> Tensor:
        batch = y.shape[0]
        read = [runs.query(i, q.to(y.dtype).expand(batch, -1, -1)) for i, q in enumerate(Q)]  # (batch, count, width)
        features = torch.cat(
            [F.normalize(one.flatten(1), dim=-1) for one in read], dim=1
        )  # (batch, blocks count width)
        return y + (features.to(W.dtype) @ W).to(y.dtype)[:, None]  # (batch, tokens, width)
