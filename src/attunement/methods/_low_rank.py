"""What methods of limited rank share: their scale, and when a matrix is too small for them."""

from __future__ import annotations

import torch
from torch import Tensor

from attunement.site import Site


def scale(rank: int, alpha: float | None, rank_stabilised: bool) -> Tensor:
    """alpha / rank, or alpha / sqrt(rank); alpha is the rank where it is None. A 0-d tensor."""
    return torch.tensor((rank if alpha is None else alpha) / (rank**0.5 if rank_stabilised else rank))


def too_large(rank: int, site: Site) -> str | None:
    """Why a rank does not fit a matrix (out, in), or None: above min(out, in) a product B A only costs more."""
    largest = min(site.outputs, site.inputs)
    if rank <= largest:
        return None
    return f"rank {rank} is larger than a {site.outputs} x {site.inputs} matrix has; the largest is {largest}"
