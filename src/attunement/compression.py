"""Smaller bases to adapt: these functions replace weights of a model, for good.

What an adapter adds can be taken off again; what is done here can not: load the model anew for its own weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from attunement.adapter import Adapter
from attunement.adapting import attach, build, check_name
from attunement.anatomy import anatomy
from attunement.choosing import chosen
from attunement.errors import AttunementError
from attunement.method import Tensors, method
from attunement.site import Site
from attunement.subspace import singular

MATRICES = "attention.*|mlp.*"


class Compressed(NamedTuple):
    """What a compression has done.

    Attributes:
        matrices: the names of the modules whose weights were replaced.
        before, after: parameters of the whole model, each counted once.
        error: the largest ||W' - W|| / ||W|| of the new matrices.
    """

    matrices: tuple[str, ...]
    before: int
    after: int
    error: float


# --- two thin matrices for one ---


class LowRankLinear(nn.Sequential):
    """A linear map as two, x -> L (R x) + bias: R (rank, in) is its child 0 and L (out, rank) its child 1."""

    def __init__(self, inputs: int, outputs: int, rank: int, bias: bool, like: Tensor) -> None:
        kind: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        super().__init__(nn.Linear(inputs, rank, bias=False, **kind), nn.Linear(rank, outputs, bias=bias, **kind))
        self.in_features, self.out_features = inputs, outputs

    @property
    def weight(self) -> Tensor:
        """The product of the two, (out, in), for whoever reads the attribute."""
        return self[1].weight @ self[0].weight  # type: ignore[no-any-return,operator,union-attr]

    @property
    def bias(self) -> Tensor | None:
        """That of the second, (out,)."""
        return self[1].bias  # type: ignore[return-value]


def factorise(model: nn.Module, ratio: float = 3.0, on: Any = MATRICES, values: bool = True) -> Compressed:
    """PELA's low-rank model (https://arxiv.org/abs/2310.10700): linear layers are replaced by two thin ones, for good.

    W (out, in) = U S V^T becomes (U sqrt(S)) (sqrt(S) V^T) of rank out in / (ratio (out + in)), rounded down, which has a
    ratio-th of the numbers. The published way on: train the whole with its task, with the features of the model as it was for
    targets and with `drift` as a penalty; then fine-tune, or adapt by `on="type:Linear"`.

    Args:
        ratio: 3, as in the authors' code for ALBEF, 2 for DeiT and Swin. Matrices with fewer than ten outputs stay, as there.
        values: False makes layers without their values, to load a state dict into.

    Raises:
        AttunementError: where nothing is selected, an adapter is on the model, or a matrix has not rank enough to be cut.
    """
    if ratio < 1:
        raise AttunementError(f"factorise: ratio must be at least 1, got {ratio}")
    before = _free(model, "factorise")
    sites = [site for site in _matrices(model, on, "factorise") if site.outputs >= 10]
    made: list[tuple[Site, LowRankLinear]] = []
    error = 0.0
    for site in sites:
        rank = int(site.outputs * site.inputs / (ratio * (site.outputs + site.inputs)))
        if not rank:
            raise AttunementError(
                f"factorise: {site.key}, {site.outputs} x {site.inputs}, has no rank left at a ratio of {ratio}; the largest "
                f"is {site.outputs * site.inputs / (site.outputs + site.inputs):.1f}"
            )
        bias = site.module._parameters.get("bias")
        layer = LowRankLinear(site.inputs, site.outputs, rank, bias is not None, site.module._parameters["weight"])  # type: ignore[arg-type]
        if values:
            U, S, Vh = singular(site.weight, rank, exact=True)
            L, R = U * S.sqrt(), S.sqrt()[:, None] * Vh
            error = max(error, float((L @ R - site.weight).norm() / site.weight.norm()))
            with torch.no_grad():
                for own, value in ((layer[0].weight, R), (layer[1].weight, L), (layer[1].bias, bias)):
                    if value is not None:
                        own.copy_(value)  # type: ignore[operator,union-attr]
        made.append((site, layer.train(site.module.training)))
    for site, layer in made:
        above, _, child = site.name.rpartition(".")
        setattr(model.get_submodule(above), child, layer)
    return Compressed(tuple(site.name for site, _ in made), before, _size(model), error)


def drift(model: nn.Module, original: nn.Module, allowed: float = 1e-3) -> Tensor:
    """PELA's penalty: the mean over the factorised layers of (max |L R - W| - allowed)^2, W those of the original model."""
    terms = [
        (
            torch.linalg.vector_norm(layer.weight - _matrix_of(original.get_submodule(name)), float("inf")) - allowed
        ).square()
        for name, layer in model.named_modules()
        if isinstance(layer, LowRankLinear)
    ]
    if not terms:
        raise AttunementError("drift: this model has no factorised layer")
    return torch.stack(terms).mean()


def _matrix_of(module: nn.Module) -> Tensor:
    weight: Any = module.weight
    return weight.detach() if isinstance(module, nn.Linear) else weight.detach().T  # type: ignore[no-any-return]


# --- one block for several ---

Start = Literal["average", "stepwise", "lower"]


def tie(model: nn.Module, loops: int, start: Start = "average", on: Any = MATRICES) -> Compressed:
    """A recursive transformer (https://arxiv.org/abs/2410.20672): a stack of L blocks becomes L / loops that are passed
    `loops` times. Block l takes the matrices of block l mod (L / loops), for good.

    Args:
        start: the matrices that are shared: the "average" of those that they replace; "stepwise", those of blocks at equal
            distances, the first and the last among them; "lower", those of the first blocks.

    Vectors (biases, norms) stay those of each block. Raises `AttunementError` where blocks are no multiple of `loops`, are
    unlike each other, or carry an adapter.
    """
    return _tied(model, loops, start, on)[0]


def relax(
    model: nn.Module, loops: int, rank: int = 8, start: Start = "average", on: Any = MATRICES, name: str = "default"
) -> Adapter:
    """A relaxed recursive transformer: `tie`, and an adapter of a LoRA for each block that gives back most of its own.

    With W_l what block l had and W the shared matrix: W + B A, B = U S and A = V^T of the `rank` largest singular triplets of
    W_l - W. The model then has one matrix and thin ones for the `loops` that it had. To load the adapter again, `tie` the
    original model in the same way first.

    The paper trains W too, on its original's outputs: with `Train` beside it, or `adapter.parameters()` and the tied ones.
    Its own code is not public: formulas are those of two replications; which vectors it ties could not be verified.
    """
    check_name(model, name)
    groups = chosen(anatomy(model), method("low_rank/lora")(rank=rank), on)
    if (odd := next((site for site in groups[0].sites if site.block is None), None)) is not None:
        raise AttunementError(f"relax: {odd.key} stands in no block; leave it out of the selection")
    _, residuals = _tied(model, loops, start, on)
    given: dict[Site, Tensors] = {}
    for site in groups[0].sites:
        U, S, Vh = singular(residuals[site.key], rank)
        given[site] = {**groups[0].method.tensors(site), "B": U * S, "A": Vh}
    return attach(build(model, groups, name, given=given))


def _tied(model: nn.Module, loops: int, start: Start, on: Any) -> tuple[Compressed, Mapping[str, Tensor]]:
    """What was done, and by how much each block's matrices differ from those that it has now."""
    before = _free(model, "tie")
    stacks: dict[str | None, dict[int, list[Site]]] = {}
    for site in _matrices(model, on, "tie"):
        if site.block is not None:
            stacks.setdefault(site.stack, {}).setdefault(site.block, []).append(site)
    if not stacks:
        raise AttunementError(f"tie: {on!r} selects nothing in the blocks of this model")
    plan: list[tuple[list[Site], Tensor]] = []
    for word, blocks in stacks.items():
        depth = len(blocks)
        if not 1 < loops <= depth or depth % loops or sorted(blocks) != list(range(depth)):
            fits = [n for n in range(2, depth + 1) if depth % n == 0]
            raise AttunementError(
                f"tie: {depth} blocks of {word or 'the model'} are not passed {loops} times; loops may be "
                + ", ".join(map(str, fits))
            )
        for position, first in enumerate(blocks[0]):
            column = [blocks[i][position] for i in range(depth) if len(blocks[i]) == len(blocks[0])]
            if len(column) < depth or any((s.role, _shape(s)) != (first.role, _shape(first)) for s in column):
                raise AttunementError(
                    f"tie: the blocks are not alike: {first.key} is not in each of them with its size"
                )
            plan += _shares(column, depth // loops, start)
    residuals = {site.key: site.weight - W for column, W in plan for site in column}
    error = max(float(residuals[s.key].norm() / s.weight.norm()) for column, _ in plan for s in column)
    for column, W in plan:
        own: Any = column[0].module._parameters[column[0].parameter or ""]
        shared = nn.Parameter(column[0].put(own.detach(), W.to(own.dtype)).clone(), requires_grad=own.requires_grad)
        for site in column:
            site.module._parameters[site.parameter or ""] = shared
    names = tuple(site.name for column, _ in plan for site in column)
    return Compressed(names, before, _size(model), error), residuals


def _shares(column: list[Site], count: int, start: Start) -> list[tuple[list[Site], Tensor]]:
    """Which matrices of one place in all blocks become one, and which."""
    depth, choose = len(column), _CHOOSE[start]
    found = []
    for k in range(count):
        W = torch.stack([column[i].weight for i in choose(k, count, depth)]).mean(0)
        own: Any = column[k].module._parameters[column[k].parameter or ""]
        found.append((column[k::count], W.to(own.dtype).to(W.dtype)))  # as it will be kept
    return found


_CHOOSE: dict[str, Callable[[int, int, int], list[int]]] = {
    "average": lambda k, count, depth: list(range(k, depth, count)),
    "stepwise": lambda k, count, depth: [round(k * (depth - 1) / max(1, count - 1))],
    "lower": lambda k, count, depth: [k],
}


# --- both ---


def _matrices(model: nn.Module, on: Any, verb: str) -> list[Site]:
    """Whole weights of modules that are called with what they are multiplied with."""
    lora = method("low_rank/lora")(rank=1)
    sites = [
        s for s in chosen(anatomy(model), {on: lora, "head": None}, None)[0].sites if s.view is None and not s.batch
    ]
    odd = next(
        (s for s in sites if verb == "factorise" and not (s.called and s.parameter == "weight" and _linear(s))), None
    )
    if odd is not None:
        raise AttunementError(f"{verb}: {odd.key} is no weight of a linear layer; leave it out of the selection")
    return sites


def _linear(site: Site) -> bool:
    return isinstance(site.module, nn.Linear) or (site.weight.dim() == 2 and hasattr(site.module, "nf"))


def _free(model: nn.Module, verb: str) -> int:
    if "_attuned_bench" in model.__dict__:
        raise AttunementError(f"{verb}: there are adapters on this model, whose base would change; detach them first")
    return _size(model)


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _shape(site: Site) -> Any:
    return site.module._parameters[site.parameter or ""].shape  # type: ignore[union-attr]
