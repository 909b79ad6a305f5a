"""GaLore: an optimiser sees the gradient of a matrix in a few directions, and its step is lifted back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from attunement.errors import AttunementError, nearest

Sides = Literal["std", "reverse_std", "left", "right", "full"]


class GaLore(Optimizer):
    """Gradient low-rank projection (https://arxiv.org/abs/2403.03507) around an optimiser.

    A matrix W (out, in) with gradient G is moved by W += scale lift(step), where the step is the inner optimiser's for the
    gradient R = G Q^T (out, rank), or P^T G (rank, in), or P^T G Q^T (rank, rank): Q (rank, in) and P (out, rank) are the
    first singular vectors of G at the steps 0, gap, 2 gap and so on, and lift(R) is R Q, P R or P R Q. What the optimiser
    remembers has the size of R.

        optimizer = GaLore([{"params": matrices}, {"params": others, "rank": None}], torch.optim.AdamW, lr=0.01)

    Args:
        params: parameters or groups of them, which may have the fields below and the optimiser's options of their own. To
            train parameters of a model as an adapter: `at.Train()` and `adapter.groups(lr)`.
        optimizer: makes the optimiser from groups and `options`: any whose step depends on gradients and on what it
            remembers of them. Its weight decay is taken off W, W *= 1 - lr decay after the step, as R knows nothing of W.
        rank: 128, as in the reference's example; None leaves a group as it is. Parameters that are no matrices, or have no
            side larger than the rank that is projected, are left as they are too.
        update_proj_gap: steps between two decompositions; 200, as in the reference's example.
        scale: of the step, alpha; 0.25, as there for training from the start. Its fine-tuning takes 4, with rank 4.
        proj_type: "std" has Q where out >= in, else P; "reverse_std" the other way; "right" Q, "left" P, "full" both.

    `state_dict` holds the directions too, so that a resumed run takes the same steps. The fields have the names of the
    reference code (https://github.com/jiaweizzhao/GaLore); with `torch.optim.AdamW` the steps are those of its GaLoreAdamW
    but for epsilon, which it adds before the bias correction. Its tensors of more than two dimensions are left out. To step
    inside the backward pass, make one for each parameter and call it from `register_post_accumulate_grad_hook`.

    Raises:
        AttunementError: a field that is out of range, an optimiser that computes gradients itself.
    """

    _own: ClassVar[tuple[str, ...]] = ("rank", "update_proj_gap", "scale", "proj_type")

    def __init__(
        self,
        params: Iterable[Any],
        optimizer: Callable[..., Optimizer] = torch.optim.AdamW,
        *,
        rank: int | None = 128,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: Sides = "std",
        **options: Any,
    ) -> None:
        if optimizer is torch.optim.LBFGS:
            raise AttunementError(
                f"{type(self).__name__}: LBFGS computes gradients itself; take one that is given them"
            )
        self._options = options
        self._stands: dict[Tensor, list[Tensor]] = {}
        own = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale, "proj_type": proj_type}
        super().__init__(params, own)
        self.inner = optimizer([self._inside(group) for group in self.param_groups], **options)
        self._tell_options()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take in another group; see `torch.optim.Optimizer`."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check(type(self).__name__, group)
        for p in group["params"]:
            self._stands[p] = self._stand_ins(p, group) if self.projects(p, group) else [p]
        if hasattr(self, "inner"):
            self.inner.add_param_group(self._inside(group))
            self._tell_options()

    def _inside(self, group: dict[str, Any]) -> dict[str, Any]:
        """A group as the inner optimiser gets it."""
        options = {name: value for name, value in group.items() if name not in (*self._own, "params", "param_names")}
        return {"params": [stand for p in group["params"] for stand in self._stands[p]], **options}

    def _tell_options(self) -> None:
        for group, inside in zip(self.param_groups, self.inner.param_groups, strict=True):
            for name in inside.keys() - {"params"}:
                group.setdefault(name, inside[name])

    # --- one parameter ---

    def projects(self, p: Tensor, group: Mapping[str, Any]) -> bool:
        """Whether a parameter is moved in a low rank."""
        return (
            group["rank"] is not None
            and p.dim() == 2
            and any(
                side and size > min(group["rank"], *p.shape)
                for side, size in zip(_sides(p, group), p.shape, strict=True)
            )
        )

    def _stand_ins(self, p: Tensor, group: Mapping[str, Any]) -> list[Tensor]:
        """What the inner optimiser moves in place of a parameter: zeros, which its step then is."""
        rank = min(group["rank"], *p.shape)
        sizes = [rank if side else n for side, n in zip(_sides(p, group), p.shape, strict=True)]
        return [nn.Parameter(p.new_zeros(sizes))]

    def _give(self, p: Tensor, grad: Tensor, group: Mapping[str, Any]) -> None:
        """Give the stand-ins of a parameter their gradients."""
        self._stands[p][0].grad = self._projected(p, grad, group)

    def _move(self, p: Tensor, group: Mapping[str, Any]) -> None:
        """Bring what the stand-ins have become to the parameter."""
        p.add_(self._lifted(p), alpha=group["scale"])
        p.mul_(1 - group["lr"] * group.get("weight_decay", 0.0))

    def _projected(self, p: Tensor, grad: Tensor, group: Mapping[str, Any]) -> Tensor:
        state, rank = self.state[p], group["rank"]
        if state.setdefault("steps", 0) % group["update_proj_gap"] == 0:
            left, right = _sides(p, group)
            U, _, Vh = torch.linalg.svd(grad if grad.dtype == torch.float64 else grad.float(), full_matrices=False)
            state["left"] = U[:, :rank].to(grad.dtype).contiguous() if left else None  # (out, rank)
            state["right"] = Vh[:rank].to(grad.dtype).contiguous() if right else None  # (rank, in)
        state["steps"] += 1
        low = grad if state["left"] is None else state["left"].mT @ grad
        return low if state["right"] is None else low @ state["right"].mT

    def _lifted(self, p: Tensor) -> Tensor:
        state, low = self.state[p], self._stands[p][0]
        high = low if state["left"] is None else state["left"] @ low
        return high if state["right"] is None else high @ state["right"]

    # --- all of them ---

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of all parameters that have a gradient; `closure`, optional, makes the gradients and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, inside in zip(self.param_groups, self.inner.param_groups, strict=True):
            inside.update({name: value for name, value in group.items() if name not in (*self._own, "params")})
        moved = [
            (p, group) for group in self.param_groups for p in group["params"]
            if self._stands[p][0] is not p and p.grad is not None
        ]  # fmt: skip
        for p, group in moved:
            self._give(p, p.grad, group)  # type: ignore[arg-type]
        self.inner.step()
        for p, group in moved:
            self._move(p, group)
            for stand in self._stands[p]:
                stand.zero_()
                stand.grad = None
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state of the inner optimiser and the directions."""
        return {**super().state_dict(), "inner": self.inner.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, whose parameters must stand in the same order."""
        if "inner" not in state_dict:
            raise AttunementError(f"{type(self).__name__}: this is the state of another optimiser: it has no 'inner'")
        self.inner.load_state_dict(state_dict["inner"])
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "inner"})


def _sides(p: Tensor, group: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether a matrix is projected on the side of its rows, and of its columns."""
    kind, tall = group["proj_type"], p.shape[0] >= p.shape[1]
    left = kind in ("left", "full") or (kind == "std" and not tall) or (kind == "reverse_std" and tall)
    return left, not left or kind == "full"


def _check(name: str, group: Mapping[str, Any]) -> None:
    for word, least in (("rank", 1), ("update_proj_gap", 1)):
        value = group[word]
        if not (value is None and word == "rank") and (not isinstance(value, int) or value < least):
            raise AttunementError(f"{name}: {word} must be a number of at least {least}, got {value!r}")
    if group["proj_type"] not in get_args(Sides):
        close = nearest(str(group["proj_type"]), get_args(Sides))
        raise AttunementError(f"{name}: there is no proj_type {group['proj_type']!r}{close}")
