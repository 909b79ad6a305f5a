"""Singular directions of a matrix, the one way in which methods and statistics find them."""

from __future__ import annotations

import torch
from torch import Tensor


def singular(W: Tensor, count: int, *, exact: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` largest singular triplets of a matrix (out, in): U (out, count), S (count,), Vh (count, in).

    Where W is large beside `count` they come from a random projection to 2 * count dimensions with four power iterations
    (Halko et al., https://arxiv.org/abs/0909.4061), drawn from a fixed seed, the same in every precision; `exact`
    decomposes the whole in one call of LAPACK, as others do who are to find the same. Signs are fixed: the largest entry of
    every right vector is positive.
    """
    count, sketch = min(count, *W.shape), 2 * count
    if exact:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    elif W.is_meta or sketch >= min(W.shape):
        U, S, Vh = decomposed(W, min(W.shape))
    else:
        tall = W if W.shape[0] >= W.shape[1] else W.mT
        start = torch.randn(tall.shape[1], sketch, generator=torch.Generator().manual_seed(42)).to(W)
        for _ in range(4):
            start = torch.linalg.qr(tall.mT @ (tall @ start)).Q  # (short side, sketch)
        Q = torch.linalg.qr(tall @ start).Q  # (long side, sketch)
        basis, R = torch.linalg.qr(tall.mT @ Q)  # (short side, sketch), (sketch, sketch): cheaper than the SVD of both
        U, S, Vh = torch.linalg.svd(R.mT)
        Vh = Vh @ basis.mT
        U, Vh = (Q @ U, Vh) if tall is W else (Vh.mT, (Q @ U).mT)
    return first(U, S, Vh, count)


def first(U: Tensor, S: Tensor, Vh: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first `count` of some singular triplets, with their signs fixed."""
    U, S, Vh = U[:, :count], S[:count], Vh[:count]
    sign = upright(Vh)
    return U * sign, S, Vh * sign[:, None]


def decomposed(W: Tensor, leading: int) -> tuple[Tensor, Tensor, Tensor]:
    """All singular triplets of a matrix (out, in), where the span of the `leading` largest is what counts, not each of them.

    U diag(S) Vh is W; of the others S may rise, and small ones may not be orthogonal. In single precision they come from
    the eigenvectors of W W^T or W^T W, in a third to three quarters of the time of an SVD, where that is as exact as the
    SVD: squares lose what is small beside the largest.
    """
    short = min(W.shape)
    tries = [(torch.float32, 0.05)] * (leading < short) + [(torch.float64, 1e-4)]
    for dtype, least in tries if W.dtype is torch.float32 and short >= 64 and not W.is_meta else ():
        M = (W if W.shape[0] == short else W.mT).to(dtype)  # (short, long)
        E = torch.linalg.eigh(M @ M.mT).eigenvectors.flip(1)  # (short, short), the largest first
        rows = E.mT @ M  # (short, long)
        S = torch.linalg.vector_norm(rows, dim=1)  # (short,)
        if not S.min() > 1e-5 * S[0]:
            break  # no precision keeps it
        if S[leading - 1] > least * S[0]:
            E, S, rows = E.to(W), S.to(W), rows.div_(S[:, None]).to(W)
            return (E, S, rows) if W.shape[0] == short else (rows.mT, S, E.mT)
    return whole(W)


def whole(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of a matrix (out, in), of its transpose where that is tall and large: LAPACK takes a third of the time for it."""
    if W.shape[0] >= W.shape[1] or W.shape[0] < 64:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return U, S, Vh
    V, S, Uh = torch.linalg.svd(W.mT, full_matrices=False)
    return Uh.mT, S, V.mT


def upright(rows: Tensor) -> Tensor:
    """One or minus one for each row (..., n), by which its largest entry becomes positive."""
    largest = rows.gather(-1, rows.abs().argmax(-1, keepdim=True))[..., 0]
    return torch.where(largest < 0, -1.0, 1.0).to(rows)


def smallest(W: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` smallest singular directions of a matrix (out, in) as a product, (out, count) @ (count, in)."""
    wide, M = W.shape[0] < W.shape[1], W.double()
    gram = M @ M.mT if wide else M.mT @ M
    rows = torch.linalg.eigh(gram).eigenvectors[:, :count].mT.to(W)  # (count, min), of rising value
    rows = rows * upright(rows)[:, None]
    return (rows.mT.contiguous(), rows @ W) if wide else (W @ rows.mT, rows.contiguous())
