"""`Rows`: each row of a batch has its own adapter, in one pass where the sites can tell rows apart.

Where one cannot (routed tokens, sequence first), the model runs once per distinct adapter and its outputs are joined.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attunement.compose import Active, Rows, checked
from attunement.course import Batch, Course
from attunement.errors import AttunementError
from attunement.method import split
from attunement.plan import Acting, Plan, may_add_to, plan_of
from attunement.site import LinearLayout, QuantisedLayout, base_of

if TYPE_CHECKING:
    from attunement.root import Bench

_version = operator.attrgetter("_version")


class RowsElsewhere(AttunementError):  # noqa: N818 - a signal to the root, and an error where no root is there to hear it
    """A site cannot tell which row of the batch it serves: the model has to run once per distinct adapter."""

    def __str__(self) -> str:
        return (
            "Rows: a site of this model cannot tell rows apart, and only a call of the adapted model itself can run once "
            "per adapter; call that, or run each adapter by itself under `using`"
        )


def rows_plan_of(
    module: nn.Module, active: Active, held: Mapping[str, Sequence[Acting]], course: Course
) -> Plan | RowsPlan | None:
    """The plan of one module for any active set; see `plan.plan_of`."""
    if not isinstance(active, Rows):
        return plan_of(module, active, held)
    distinct = list(dict.fromkeys(active.items))
    plans = [plan_of(module, item, held) for item in distinct]
    if len(distinct) == 1:
        return plans[0]
    if all(plan is None for plan in plans):
        return None
    return RowsPlan(module, plans, [distinct.index(item) for item in active.items], course)


class RowsPlan:
    """What one module does when each row of the batch has its own adapter.

    Attributes:
        rows: how many rows the active set has.
        plans: the distinct plans at this module, None for the bare module.
        index: for each row the position of its plan, (rows,).
    """

    def __init__(self, module: nn.Module, plans: list[Plan | None], index: list[int], course: Course) -> None:
        self.forward: Callable[..., Any] = base_of(type(module)).forward  # type: ignore[attr-defined]
        self.plans, self.index, self.rows, self.course = plans, index, len(index), course
        self.members = [[row for row, i in enumerate(index) if i == which] for which in range(len(plans))]
        self.batched = all(
            plan is None
            or (
                plan.only_adds
                and isinstance(plan.layout, (LinearLayout, QuantisedLayout))
                and "bias" not in plan.parameters
                and all(part.site.view is None for part, _ in plan.terms or ())
                and not any(part.dropout for part, _ in plan.terms or ())
            )
            for plan in plans
        )
        some = [plan for plan in plans if plan is not None]
        leaving = [part for plan in some if plan.leaves is not None for part in plan.leaves.parts()]
        tapped = [part for part in (*leaving, *(part for plan in some for part in plan.taps)) if part.taps]
        # one part cannot keep the x of two groups of rows, and what is around a forward sees the whole of it
        self.elsewhere = len(set(tapped)) < len(tapped) or any(p.around or p.attends or p.heard for p in some)
        trees = [tree for p in some for tree in (p.enters, p.leaves, p.beside, *p.parameters.values()) if tree]
        parts = {id(part): part for tree in trees for part in tree.parts()}
        self.elsewhere |= any(part.joins for part in parts.values())  # rows of other lengths
        parts |= {id(part): part for plan in some for part, _ in plan.terms or ()}
        roles = {part.site.place.role for part in parts.values()}
        self.elsewhere |= any(role == "embedding.relative" or role.startswith("experts") for role in roles)
        self.layout: Any = next((plan.layout for plan in some), None)
        parts = {id(p): p for plan in some for p, _ in plan.terms or ()}
        self._owners = list({id(o): o for p in parts.values() for o in (p.holder, *p.common)}.values())
        self._reads = any(part.reads_weight for part in parts.values())
        self._asks = any(part.method.asks for part in parts.values())
        self._gathered: tuple[Any, ...] | None = None

    def parameter(self, module: nn.Module, name: str, base: Any) -> Any:
        if all(plan is None or name not in plan.parameters for plan in self.plans):
            return base
        raise RowsElsewhere

    def run(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) + len(kwargs) != 1 or self.elsewhere:
            raise RowsElsewhere
        x = args[0] if args else next(iter(kwargs.values()))
        if not isinstance(x, Tensor) or x.dim() < 2 or (isinstance(module, nn.Embedding) and x.is_floating_point()):
            raise RowsElsewhere
        size = self.course.batch.size or self.rows
        if x.shape[0] == 1 and isinstance(module, nn.Embedding):  # positions, the same for all rows
            x = x.expand(size, *x.shape[1:])
        else:
            self._check(module, x, size)
        repeat = x.shape[0] // self.rows  # each row's stand together, as windows and beams do
        if self.batched:
            return self._run_batched(module, x, repeat)
        y: Tensor | None = None
        for plan, members in zip(self.plans, self.members, strict=True):
            rows = torch.tensor([row * repeat + i for row in members for i in range(repeat)], device=x.device)
            module._attuned_plan = plan
            try:
                some = self.forward(module, x[rows]) if plan is None else plan.run(module, (x[rows],), {})
            finally:
                module._attuned_plan = self
            if not isinstance(some, Tensor) or some.shape[0] != len(rows):
                raise RowsElsewhere
            y = some.new_empty(x.shape[0], *some.shape[1:]) if y is None else y
            y = y.index_copy(0, rows, some)
        assert y is not None
        return y

    def _check(self, module: Any, x: Tensor, size: int) -> None:
        """Raise unless x is (size * entries, ...), the entries of each row one after the other."""
        course, count = self.course, x.shape[0]
        if isinstance(module, nn.Embedding):  # ids may be relative positions (tokens, tokens)
            if count != size or (x.shape[1] == size and not course.batch_first):
                raise RowsElsewhere
        elif self.layout is not None and self.layout.channels == 1:
            if x.dim() != module._parameters["weight"].dim():
                raise RowsElsewhere
        elif x.dim() > 2 and (count != size or not course.batch_first):
            if x.shape[1] == size:  # (tokens, batch, width) as far as one can see
                course.batch_first = course.batch_first if count == size else False
                raise RowsElsewhere
            if count == size and course.batch_first is None:
                course.batch_first = True
        if count != size:
            batch = course.batch
            chance = x.dim() == 2 and count // size not in batch.lengths  # of routed tokens any number may come
            if count % size or chance or batch.loose or not batch.size:
                raise RowsElsewhere

    def _run_batched(self, module: Any, x: Tensor, repeat: int) -> Tensor:
        W: Any = module._parameters.get("weight")
        quantised = self.layout.beside_only
        y = self.forward(module, x) if quantised else self.layout.call(module, x, W, module._parameters.get("bias"))
        own = not quantised and may_add_to(y, W)
        At, Bt = self._factors(module, x, repeat)  # (rows, in, r), (rows, r, out)
        flat = x.flatten(1, -2) if x.dim() > 2 else x[:, None]
        z, y = torch.bmm(flat, At), y.view(x.shape[0], -1, y.shape[-1])  # (rows, tokens, r), (rows, tokens, out)
        own &= y.dtype is z.dtype is Bt.dtype  # autocast leaves Bt as it is
        return (y.baddbmm_(z, Bt) if own else y.baddbmm(z, Bt)).view(*x.shape[:-1], y.shape[-1])

    def _factors(self, module: Any, x: Tensor, repeat: int) -> tuple[Tensor, Tensor]:
        """The factors of every row, ranks padded with zeros; kept until a tensor of theirs changes."""
        tensors: list[Any] = [module._parameters["weight"]] if self._reads else []
        for owner in self._owners:
            tensors += owner._parameters.values()
            tensors += owner._buffers.values()
        fresh = self._asks or torch.compiler.is_compiling()
        fresh |= torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        here: tuple[Any, ...] = ()
        if not fresh:
            here, kept = (x.device, x.dtype, repeat, torch.is_inference_mode_enabled()), self._gathered
            if (
                kept
                and kept[0] == here
                and all(map(operator.is_, kept[1], tensors))
                and kept[2] == [*map(_version, tensors)]
                and kept[3] == [*map(Tensor.data_ptr, tensors)]
            ):
                return kept[4], kept[5]
        pairs = [self._pair(module, plan, x) for plan in self.plans]
        rank = max(A.shape[0] for A, _ in pairs)
        index = torch.tensor(self.index, device=x.device).repeat_interleave(repeat)
        At = torch.stack([F.pad(A, (0, 0, 0, rank - A.shape[0])) for A, _ in pairs])[index].mT.contiguous()
        Bt = torch.stack([F.pad(B, (0, rank - B.shape[1])) for _, B in pairs])[index].mT.contiguous()
        if not fresh and not any(map(Tensor.is_inference, tensors)):  # those count no versions
            stamps = [*map(_version, tensors)], [*map(Tensor.data_ptr, tensors)]
            self._gathered = (here, tensors, *stamps, At, Bt)
        return At, Bt

    def _pair(self, module: Any, plan: Plan | None, x: Tensor) -> tuple[Tensor, Tensor]:
        """One plan's change as A (r, in) and B (out, r)."""
        if plan is None:
            out, inputs = self.layout.size(module, "weight")
            return x.new_zeros(0, inputs), x.new_zeros(out, 0)
        As, Bs = [], []
        for part, gain in plan.terms or ():
            B, A = split(part.chain(module, x.dtype))
            B = torch.eye(A.shape[0], dtype=A.dtype, device=A.device) if B is None else B
            As.append(A)
            Bs.append(B if gain is None else B * gain)
        return torch.cat(As), torch.cat(Bs, dim=1)


def run_rows(bench: Bench, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The forward of a model when each row of the batch has its own adapter."""
    sizes = [v.shape[0] for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim()]
    if not sizes or sizes[0] != bench.rows * bench.repeat:
        came = sizes[0] if sizes else "no batch"
        copies = f" for {bench.repeat} copies each" if bench.repeat > 1 else ""
        raise AttunementError(f"Rows names {bench.rows} rows, but the batch has {came}{copies}")
    given = [*args, *kwargs.values()]
    loose = [v for v in given if isinstance(v, Tensor) and _loose(v, sizes[0])]
    if not bench.one_by_one:
        before = bench.course.batch
        rows = (v for v in given if isinstance(v, Tensor) and v.dim() > 1 and v.shape[0] == sizes[0])
        bench.course.batch = Batch(sizes[0], tuple(v.shape[1] for v in rows), bool(loose))
        bench.course.note(bench.applied)
        try:
            return forward(bench.model, *args, **kwargs)
        except RowsElsewhere:
            bench.one_by_one = True
            if bench.generating:
                raise
        finally:
            bench.course.batch = before
    if loose:
        raise AttunementError(
            f"Rows: a site of this model cannot tell rows apart, and a tensor {tuple(loose[0].shape)} does not say which "
            f"of its entries belong to which of {sizes[0]} rows; run each adapter by itself under `using`"
        )
    _share_no_cache(kwargs)
    if "use_cache" in inspect.signature(forward).parameters:
        kwargs = {**kwargs, "use_cache": False}
    tree = checked(bench.active, bench.adapters)
    assert isinstance(tree, Rows)
    results, members = [], []
    each = torch.arange(sizes[0]).view(bench.rows, bench.repeat)
    try:
        for item in dict.fromkeys(tree.items):
            index = each[[own == item for own in tree.items]].flatten()
            bench.apply(item)
            some = _rows_only((args, kwargs), index, sizes[0])
            results.append(forward(bench.model, *some[0], **some[1]))
            members.append(index)
    finally:
        bench.apply(tree)
    return _joined(results, members, sizes[0])


def _loose(value: Tensor, batch: int) -> bool:
    """Whether entries belong to rows unseen (three images here, one there); a vector and a mask (T, T) serve every row."""
    square = value.dim() == 2 and value.shape[0] == value.shape[1]
    return value.dim() > 1 and value.shape[0] not in (1, batch) and not square


def _share_no_cache(kwargs: Mapping[str, Any]) -> None:
    if any(kwargs.get(word) is not None for word in ("past_key_values", "cache_params")):
        raise AttunementError(
            "Rows: a site of this model cannot tell rows apart, so a cache cannot be shared; pass use_cache=False"
        )


def generate_rows(bench: Bench, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a model generates when it runs once per distinct adapter: the rows filled up to the longest with pads."""
    tree, rows = checked(bench.active, bench.adapters), bench.rows
    assert isinstance(tree, Rows)
    sizes = [v.shape[0] for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim()]
    if not sizes or sizes[0] != rows:
        raise AttunementError(f"Rows names {rows} rows, but the batch has {sizes[0] if sizes else 'no tensor'}")
    _share_no_cache(kwargs)
    found: list[Tensor | None] = [None] * rows
    try:
        for item in dict.fromkeys(tree.items):
            index = [row for row, own in enumerate(tree.items) if own == item]
            bench.apply(item)
            some = _rows_only((args, kwargs), torch.tensor(index), rows)
            made = generate(bench.model, *some[0], **some[1])
            if not isinstance(made, Tensor):
                raise AttunementError("Rows: these adapters generate one after the other, which gives ids alone")
            for row, ids in zip(index, made.view(len(index), -1, made.shape[-1]), strict=True):
                found[row] = ids  # (copies, tokens)
    finally:
        bench.apply(tree)
    config: Any = kwargs.get("generation_config") or getattr(bench.model, "generation_config", None)
    pad = kwargs.get("pad_token_id", getattr(config, "pad_token_id", None)) or 0
    longest = max(ids.shape[-1] for ids in found if ids is not None)
    return torch.cat([F.pad(ids, (0, longest - ids.shape[-1]), value=pad) for ids in found if ids is not None])


def _rows_only(value: Any, index: Tensor, batch: int) -> Any:
    if isinstance(value, Tensor):
        return value[index.to(value.device)] if value.dim() and value.shape[0] == batch else value
    if isinstance(value, (tuple, list)):
        return type(value)(_rows_only(v, index, batch) for v in value)
    if isinstance(value, dict):
        return {k: _rows_only(v, index, batch) for k, v in value.items()}
    return value


def _joined(results: Sequence[Any], members: Sequence[Tensor], batch: int) -> Any:
    """The outputs of several runs as if of one."""
    first = results[0]
    if isinstance(first, Tensor):
        if not first.dim() or first.shape[0] != len(members[0]):
            raise AttunementError(
                "Rows: this model runs once per distinct adapter, so a loss over all rows must be computed from its logits"
            )
        shape = [max(sizes) for sizes in zip(*(some.shape[1:] for some in results), strict=True)]
        out = first.new_empty(batch, *shape)
        for some, index in zip(results, members, strict=True):
            if list(some.shape[1:]) != shape:  # what an encoder gives its decoder, where adapters add to its tokens
                fewer = [a - b for a, b in zip(shape, some.shape[1:], strict=True)]
                some = F.pad(some, [n for missing in reversed(fewer) for n in (missing, 0)])
            out = out.index_copy(0, index.to(out.device), some)
        return out
    if isinstance(first, dict):
        joined = {key: _joined([r[key] for r in results], members, batch) for key in first}
        return type(first)(**joined)
    if isinstance(first, (tuple, list)):
        return type(first)(_joined(column, members, batch) for column in zip(*results, strict=True))
    return first
