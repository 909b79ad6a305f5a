"""Singular directions of a matrix, the one way in which methods and statistics find them."""

from __future__ import annotations

import torch
from torch import Tensor


def singular(W: Tensor, count: int, *, exact: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` largest singular triplets of a matrix (out, in): U (out, count), S (count,), Vh (count, in).

    Where W is large beside `count` they come from a random projection to 2 * count dimensions with four power iterations
    (Halko et al., https://arxiv.org/abs/0909.4061), drawn from a fixed seed, the same in every precision; `exact`
    decomposes the whole. Signs are fixed: the largest entry of every right vector is positive.
    """
    count, sketch = min(count, *W.shape), 2 * count
    if exact or W.is_meta or sketch >= min(W.shape):
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    else:
        tall = W if W.shape[0] >= W.shape[1] else W.mT
        start = torch.randn(tall.shape[1], sketch, generator=torch.Generator().manual_seed(42)).to(W)
        Q = torch.linalg.qr(tall @ start).Q  # (long side, sketch)
        for _ in range(4):
            Q = torch.linalg.qr(tall @ (tall.mT @ Q)).Q
        basis, R = torch.linalg.qr(tall.mT @ Q)  # (short side, sketch), (sketch, sketch): cheaper than the SVD of both
        U, S, Vh = torch.linalg.svd(R.mT)
        Vh = Vh @ basis.mT
        U, Vh = (Q @ U, Vh) if tall is W else (Vh.mT, (Q @ U).mT)
    U, S, Vh = U[:, :count], S[:count], Vh[:count]
    sign = upright(Vh)
    return U * sign, S, Vh * sign[:, None]


def upright(rows: Tensor) -> Tensor:
    """One or minus one for each row (..., n), by which its largest entry becomes positive."""
    largest = rows.gather(-1, rows.abs().argmax(-1, keepdim=True))[..., 0]
    return torch.where(largest < 0, -1.0, 1.0).to(rows)


def smallest(W: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` smallest singular directions of a matrix (out, in) as a product, (out, count) @ (count, in)."""
    wide = W.shape[0] < W.shape[1]
    gram = W.double() @ W.double().mT if wide else W.double().mT @ W.double()
    rows = torch.linalg.eigh(gram).eigenvectors[:, :count].mT.to(W)  # (count, min), of rising value
    rows = rows * upright(rows)[:, None]
    return (rows.mT.contiguous(), rows @ W) if wide else (W @ rows.mT, rows.contiguous())
