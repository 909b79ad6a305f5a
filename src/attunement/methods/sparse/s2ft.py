"""S2FT: a few heads and channels of a block are trained, as one dense piece of a matrix each."""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt
from torch import Tensor

from attunement.fields import Share
from attunement.method import Tensors, WeightMethod, register, seeded
from attunement.methods._schedule import drawn
from attunement.site import Site


@register("sparse/s2ft", source="https://arxiv.org/abs/2412.06289", placement="attention.output|mlp.down")
class S2FT(WeightMethod):
    """Structured sparse fine-tuning: W' = W, plus `columns` (out, k) at the columns `index`, or `rows` (k, in) at the rows.

    What goes between two matrices of a block, heads from values to output, channels from up to down, is cut on the side
    where it is: columns of the output and of down, rows of all others. Backward only the chosen inputs are kept, k of in.

    Args:
        share: of the heads or channels, one at least. 0.02 for down; the published run also takes 0.052 of the heads of the
            output: {"attention.output": S2FT(share=0.052), "mlp.down": S2FT(share=0.02)}.
        side: "columns", "rows", or by "role".
        seed: of the choice, which is the same in all matrices of a block that have as many heads or channels.

    Start: zero. The index follows from the seed and is not stored.
    The reference code draws over all blocks together, so that some have more than others. It reorders the weights of the
    model so that what it chose stands together; here the index says where it is, which is the same function and leaves the
    model as it was. Its published learning rate is 2e-4.
    """

    partners: ClassVar[tuple[str, ...]] = ("value",)

    share: Share = 0.02
    side: Literal["role", "columns", "rows"] = "role"
    seed: NonNegativeInt = 0

    def tensors(self, site: Site) -> Tensors:
        columns = self.side == "columns" or (self.side == "role" and site.role.endswith((".output", ".down")))
        size = site.inputs if columns else site.outputs
        width = site.head_width if site.role.startswith("attention") and site.head_width else 1
        width = width if size % width == 0 else 1
        count = max(1, round(self.share * (size // width)))
        chosen = torch.randperm(size // width, generator=drawn(self.seed, site.block or 0))[:count].sort().values
        index = (chosen[:, None] * width + torch.arange(width)).flatten()  # (k,)
        block = (
            {"columns": torch.zeros(site.outputs, len(index))}
            if columns
            else {"rows": torch.zeros(len(index), site.inputs)}
        )
        return {**block, "index": seeded(index)}

    def output(
        self, x: Tensor, y: Tensor, index: Tensor, columns: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        if columns is not None:
            return y + F.linear(x[..., index].to(columns.dtype), columns)
        assert rows is not None
        return y.index_add(-1, index, F.linear(x.to(rows.dtype), rows).to(y.dtype))

    def factors(
        self, _: Tensor, index: Tensor, columns: Tensor | None = None, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        piece = rows if columns is None else columns
        assert piece is not None
        places = torch.arange(_.shape[-2] if columns is None else _.shape[-1], device=index.device)
        picked = (index[:, None] == places).to(piece.dtype)  # (k, in) or (k, out)
        return (picked.mT, piece) if columns is None else (piece, picked)
