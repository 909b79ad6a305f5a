"""What methods of limited rank share: their scale, and a change from a start."""

from __future__ import annotations

import torch
from torch import Tensor


def scale(rank: int, alpha: float | None, rank_stabilised: bool) -> Tensor:
    """alpha / rank, or alpha / sqrt(rank); alpha is the rank where it is None. A 0-d tensor."""
    return torch.tensor((rank if alpha is None else alpha) / (rank**0.5 if rank_stabilised else rank))


def moved(B: Tensor, A: Tensor, B0: Tensor, A0: Tensor, *between: Tensor) -> tuple[Tensor, ...]:
    """B A - B0 A0 as factors (out, 2 r), (2 r, in), exactly zero where both are as they were; `between` are scales."""
    return torch.cat([B, B - B0], dim=-1), *between, torch.cat([A - A0, A0], dim=-2)
