"""CLOVER: what each head of an attention computes, in an orthonormal basis that stays and a full matrix that learns."""

from typing import ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from attunement.ahead import ahead
from attunement.errors import AttunementError
from attunement.method import Tensors, WeightMethod, fixed, register, seeded
from attunement.site import Site


@register("orthogonal/clover", source="https://arxiv.org/abs/2411.17426", placement="attention.{query,value}|mlp.up")
class CLOVER(WeightMethod):
    """Cross-layer orthogonal vectors: the rows Z (d, in) of each head become M^T Q^T, Q^T (d, in) frozen, M (d, d) trained.

    Alone, Z^T = Q M by QR at the start. As a pair, values with the output's columns O (out, d) of the head: O Z = V S U^T
    by SVD, and the head computes V M^T U^T with M = diag(S) at the start. The published code writes U^T into the values,
    V into the output and M behind the values. The same function, with the same M, is reached from the values alone:
    Z' = Z + (V^T O)^-1 (M - diag(S))^T U^T. A bias is one more column of Z; d columns of Z' come from d of Z, so frames are
    kept as (d, d) matrices: U^T = right Z, and W' = W + left (M - start)^T right W for each head.

    Args:
        frame: "pair" for values with the output, and for keys with queries; "single" for QR; "role" is the pair where there
            is one, at values and keys, else QR. Grouped queries share a head of keys and values, and rotary positions or
            norms stand between queries and keys: there are no such pairs there, as in the published code.
        head_width: None is the attention's. Matrices of an mlp are cut in pieces of half of it, as published.

    Start: M - start is zero. QR has a unique result, with a positive diagonal, and is computed again from the base at load.
    Singular vectors have signs that another machine may choose otherwise, and turn where the base is rounded: for a pair
    `left`, `right` and `start` are saved, so that a file means the same everywhere, at three times the size.
    Published for Llama: queries and mlp.up alone, values as pairs, learning rate 1e-4, dropout of 0.05 between the basis
    and M, which is no function of a weight and left out here. Its pruning is left out. Its SVD is a randomised one.
    """

    partners: ClassVar[tuple[str, ...]] = ("query", "output")

    frame: Literal["role", "single", "pair"] = "role"
    head_width: PositiveInt | None = None

    def rows(self, site: Site) -> int:
        """How many rows a piece has; 0 where that is not known."""
        width = self.head_width or site.head_width
        return width // 2 if site.role.startswith("mlp.") else width

    def no_pair(self, site: Site) -> str | None:
        """Why a matrix is not one of a pair (the end of a sentence), or None."""
        word = site.role.rpartition(".")[2]
        if word not in ("value", "key"):
            return "only values, with the output, and keys, with queries, are one of a pair"
        other = site.partner("output" if word == "value" else "query")
        if other is None:
            return "the matrix that would make a pair with it is not known"
        if site.outputs != (other.inputs if word == "value" else other.outputs):
            return "its heads are shared by groups of queries, which makes no pairs of heads; use frame='single'"
        if word == "key" and site.between is not None:
            return f"{site.between}: between them there is no one matrix to split; use frame='single'"
        return None

    def refuse(self, site: Site) -> str | None:
        d = self.rows(site)
        if not d:
            return "how wide a head is is not known here; say it with head_width"
        if site.outputs % d or site.inputs < d:
            return f"a {site.outputs} x {site.inputs} matrix has no heads of {d} rows with a basis each"
        return self.no_pair(site) if self.frame == "pair" else None

    @ahead()
    def tensors(self, site: Site) -> Tensors:
        R = _triangle(site, _heads(site, self.rows(site)).mT)  # (heads, d, d)
        eye = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
        right = torch.linalg.solve_triangular(R.mT, eye, upper=False)  # (heads, d, d): Q^T = right Z
        if self.frame == "single" or self.no_pair(site) is not None:
            return {"M": R.clone(), "start": seeded(R), "right": seeded(right)}
        Ro = _triangle(site, self._others(site, len(R)))
        V, S, Uh = torch.linalg.svd(Ro @ R.mT)  # of O Z in the bases of both
        return {
            "M": torch.diag_embed(S),  # (heads, d, d)
            "start": fixed(S),  # (heads, d)
            "right": fixed(Uh @ right),  # (heads, d, d)
            "left": fixed(torch.linalg.solve_triangular(Ro, V, upper=True)),  # (heads, d, d)
        }

    def _others(self, site: Site, heads: int) -> Tensor:
        """What the heads meet: columns of the output (heads, out, d), or the heads of queries (heads, in + 1, d)."""
        value = site.role.endswith(".value")
        other = site.partner("output" if value else "query")
        assert other is not None
        if not value:
            return _heads(other, other.outputs // heads).mT
        return other.weight.double().unflatten(1, (heads, -1)).movedim(1, 0)

    def delta(self, W: Tensor, M: Tensor, start: Tensor, right: Tensor, left: Tensor | None = None) -> Tensor:
        T = _change(M, start, right, left)  # (heads, d, d)
        return (T @ W.unflatten(0, T.shape[:2])).flatten(0, 1)  # (out, in)

    def bias(self, b: Tensor, M: Tensor, start: Tensor, right: Tensor, left: Tensor | None = None) -> Tensor:
        T = _change(M, start, right, left)
        return b + (T @ b.unflatten(0, (*T.shape[:2], 1))).flatten()  # (out,)


def _change(M: Tensor, start: Tensor, right: Tensor, left: Tensor | None) -> Tensor:
    T = (M - (start if start.dim() == 3 else torch.diag_embed(start))).mT @ right
    return T if left is None else left @ T


def _heads(site: Site, d: int) -> Tensor:
    """The rows of each head, with their bias as a last column: (heads, d, in + 1), or (heads, d, in)."""
    Z = site.weight.double()
    bias = site.module._parameters.get(site.bias)
    if bias is not None:
        Z = torch.cat([Z, site.take_bias(bias.detach()).double()[:, None]], dim=1)
    return Z.unflatten(0, (-1, d))


def _triangle(site: Site, columns: Tensor) -> Tensor:
    """The triangle R (heads, d, d) of QR, with a positive diagonal."""
    R = torch.linalg.qr(columns, mode="r").R
    if not R.is_meta:
        values = torch.linalg.svdvals(R)
        if bool((poor := values[:, -1] <= 1e-6 * values[:, 0]).any()):
            head = int(poor.nonzero()[0])
            raise AttunementError(
                f"adapt: CLOVER cannot act on {site.key}: head {head} has less than {R.shape[-1]} independent directions"
            )
    return R * R.diagonal(dim1=-2, dim2=-1).sign()[..., None]
