"""HyperFormer: bottleneck adapters that one small network makes for every task, layer and place."""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from attunement.errors import AttunementError
from attunement.method import OutputMethod, Tensors, fixed, register
from attunement.site import Site


@register("bottleneck/hyperformer", source="https://arxiv.org/abs/2106.04489", placement="self_attention|mlp")
class HyperFormer(OutputMethod):
    """HyperFormer++: y' = y + LN_t(U gelu(D y + d) + u), with D, d, U, u and the scale and shift of LN_t made from e.

    e = LN(W_2 relu(W_1 [z_task; l_layer; p_place])) is (width of e,); each of D (size, width), U (width, size), d, u, scale
    and shift is a linear function of it with a bias. All of these are shared by the sites, embeddings included, so that
    tasks learn from one another.

    The task of a batch is told by `adapter.give(task=i)`, that of each row by `adapter.give(task=tensor)` (batch,).

    Args:
        tasks: how many.
        reduction: size is width // reduction; 32 as in the source's runs for T5-base.
        task_size, hidden, size: of z, l and p (64), between W_1 and W_2 (128), and of e (64), as there.

    The source also trains the norms of the model: give them to `Train`. It has a generator for each stack: name the two
    in a recipe. Start, as in the source: embeddings normal of 1, all else normal of 0.01 with zero biases, so that the
    change is small and not zero.
    """

    cannot: ClassVar[Mapping[str, str]] = {
        "identity": "the network that makes its matrices starts small, not at zero",
        "merge": "its output is not linear in its input",
    }

    asks: ClassVar[tuple[str, ...]] = ("task",)

    tasks: PositiveInt = 1
    reduction: PositiveInt = 32
    task_size: PositiveInt = 64
    hidden: PositiveInt = 128
    size: PositiveInt = 64

    def refuse(self, site: Site) -> str | None:
        if site.outputs < self.reduction:
            return f"reduction={self.reduction} leaves nothing of its width {site.outputs}"
        return "it stands in no block" if site.block is None else None

    def shared(self, sites: list[Site]) -> Tensors:
        width = sites[0].outputs
        if odd := next((site for site in sites if site.outputs != width), None):
            raise AttunementError(
                f"HyperFormer: one network makes adapters of one width; {sites[0].key} has {width}, {odd.key} {odd.outputs}"
            )
        inner, z = width // self.reduction, self.task_size
        made = {
            "Z": torch.randn(self.tasks, z),
            "L": torch.randn(1 + max(site.block or 0 for site in sites), z),
            "P": torch.randn(2, z),
            "W1": torch.randn(self.hidden, 3 * z) * 0.01,
            "b1": torch.zeros(self.hidden),
            "W2": torch.randn(self.size, self.hidden) * 0.01,
            "b2": torch.zeros(self.size),
            "scale": torch.ones(self.size),
            "shift": torch.zeros(self.size),
        }
        lengths = {"D": inner * width, "d": inner, "U": width * inner, "u": width, "gain": width, "offset": width}
        for name, length in lengths.items():
            made |= {f"to_{name}": torch.randn(length, self.size) * 0.01, f"at_{name}": torch.zeros(length)}
        return made

    def tensors(self, site: Site) -> Tensors:
        place = 0 if site.role.startswith("mlp") else 1
        return {"where": fixed(torch.tensor([site.block or 0, place]))}  # (2,)

    def output(
        self, _: Tensor | None, y: Tensor, where: Tensor, task: Tensor | int | None = None, **t: Tensor
    ) -> Tensor:
        if task is None and self.tasks > 1:
            raise AttunementError(
                f"HyperFormer: which of its {self.tasks} tasks this is has to be said: adapter.give(task=0)"
            )
        task = 0 if task is None else task
        tasks = torch.as_tensor(task, device=y.device).reshape(-1)  # (1,) or (batch,)
        if isinstance(task, int) and not 0 <= task < self.tasks:
            raise AttunementError(f"HyperFormer: task must be from 0 to {self.tasks - 1}, got {task}")
        if len(tasks) not in (1, y.shape[0]):
            raise AttunementError(
                f"HyperFormer: expected one task, or one for each of {y.shape[0]} rows, got {len(tasks)}"
            )
        z = torch.cat(
            (t["Z"][tasks], t["L"][where[:1]].expand(len(tasks), -1), t["P"][where[1:]].expand(len(tasks), -1)), 1
        )
        e = F.linear(F.relu(F.linear(z, t["W1"], t["b1"])), t["W2"], t["b2"])
        e = F.layer_norm(e, e.shape[-1:], t["scale"], t["shift"], 1e-6)  # (tasks, size of e)
        made = {name: F.linear(e, t[f"to_{name}"], t[f"at_{name}"]) for name in ("D", "d", "U", "u", "gain", "offset")}
        width = y.shape[-1]
        x = y.reshape(y.shape[0], -1, width).to(e.dtype)  # (batch, tokens, width)
        D, U = made["D"].unflatten(1, (-1, width)), made["U"].unflatten(1, (width, -1))
        h = F.gelu(x @ D.mT + made["d"][:, None], approximate="tanh") @ U.mT + made["u"][:, None]
        h = F.layer_norm(h, (width,)) * made["gain"][:, None] + made["offset"][:, None]
        return (x + h).reshape(y.shape)
