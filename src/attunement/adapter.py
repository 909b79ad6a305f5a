"""`adapt`, `use`, `detach`, and the handle they work on: an `Adapter`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attunement.compose import Active, checked
from attunement.errors import AttunementError
from attunement.method import Method
from attunement.part import Group, Part, getattr_tensor
from attunement.root import bench_of
from attunement.site import put, whole

if TYPE_CHECKING:
    from os import PathLike

    from attunement.merging import Merged
    from attunement.summary import Summary


class Adapter:
    """A named set of tensors on a model: saveable, removable, mergeable.

    Attributes:
        name: its name on the model.
        model: the model it stands on.
        groups_: its methods, each with its parts.
        parts: one for each method and site, with `.site`, `.method` and `.key`.
        metrics: figures that `save` writes along, such as {"accuracy": 0.91}.
        step, total_steps: how many steps `before_step` has seen, and how many are to come in all, None where unknown:
            for methods that follow a schedule. `at.Trainer` sets both.
        objective: a function without arguments that returns a loss, for methods that measure one beside the training's;
            None where nobody has set it.
    """

    def __init__(self, name: str, model: nn.Module, groups: list[Group]) -> None:
        self.name, self.model, self.groups_ = name, model, groups
        self.metrics: dict[str, float] = {}
        self.info: dict[str, Any] = {}
        self.step = 0
        self._total_steps: int | None = None
        self.objective: Callable[[], Tensor] | None = None
        self._given: dict[str, Any] = {}
        for part in self.parts:
            part.given = self._given
        self._trainable = True
        self._merged: list[Merged] | None = None  # what `unmerge` puts back
        self._fingerprint: dict[str, Any] | None = None  # of the base before any merge, while one is in place
        self._untied = False  # whether its merge changed the model's config
        self._merged_at = 0  # counts merges on this model, so that they come off in order

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(part for group in self.groups_ for part in group.parts)

    def give(self, **values: Any) -> None:
        """Provide what expressions ask for besides tensors, such as `task=2`, or `task=ids` (batch,), until given anew.

        Raises:
            AttunementError: for a name that no method of this adapter asks for.
        """
        for name in values:
            if name not in self.asks:
                asked = ", ".join(self.asks) or "nothing"
                raise AttunementError(
                    f"give: no method of adapter {self.name!r} asks for {name!r}; they ask for {asked}"
                )
        self._given.update(values)

    @property
    def asks(self) -> list[str]:
        """The names of what its methods take from `give`."""
        return sorted({name for group in self.groups_ for name in group.method.asks})

    def __repr__(self) -> str:
        return f"Adapter({self.name!r}, {len(self.parts)} parts, {self.count():,} trainable parameters)"

    # --- tensors ---

    def owners(self) -> Iterator[tuple[str, nn.Module, Mapping[str, str]]]:
        """Every module that owns tensors of this adapter: the prefix of their saved names, the module, their kinds."""
        for number, group in enumerate(self.groups_):
            if group.shared is not None:
                yield f"shared.{number}", group.shared, group.shared_kinds
            for part in group.parts:
                yield part.key, part.holder, part.kinds
                for path, module in part.holder.named_modules():  # what `build` gave
                    owned = (("trained", module._parameters), ("fixed", module._buffers))
                    kinds = {name: kind for kind, own in owned for name, value in own.items() if value is not None}
                    if path and kinds:
                        yield f"{part.key}.{path}", module, kinds

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained tensors, under the names they have when saved."""
        for prefix, owner, _ in self.owners():
            for name, parameter in owner._parameters.items():
                if parameter is not None:
                    yield f"{prefix}.{name}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trained tensors."""
        return (parameter for _, parameter in self.named_parameters())

    def count(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters())

    def state(self, kinds: Collection[str] = ("trained", "fixed")) -> dict[str, Tensor]:
        """The tensors of these kinds, detached, by name; those that are saved by default. See `method.KINDS`."""
        return {key: whole(getattr_tensor(owner, name)) for key, (owner, name) in self._owned(kinds).items()}

    def _owned(self, wanted: Collection[str]) -> dict[str, tuple[nn.Module, str]]:
        return {
            f"{prefix}.{name}": (owner, name)
            for prefix, owner, kinds in self.owners()
            for name, kind in kinds.items()
            if kind in wanted
        }

    def load_state(self, state: Mapping[str, Tensor], kinds: Collection[str] = ("trained", "fixed")) -> None:
        """Put the values of these kinds in place, after checking names both ways, shapes and finiteness.

        Raises:
            AttunementError: while it is merged, or naming the first tensor that is missing, unexpected, ill-shaped or not
                finite.
        """
        own = self._owned(kinds)
        where = f"adapter {self.name!r}"
        if self.merged:
            raise AttunementError(
                f"{where}: the weights hold the values that it has now; unmerge it before it gets others"
            )
        if missing := sorted(own.keys() - state.keys()):
            raise AttunementError(f"{where}: {len(missing)} tensors are missing, first {missing[0]!r}")
        if extra := sorted(state.keys() - own.keys()):
            raise AttunementError(f"{where}: {len(extra)} tensors were not expected, first {extra[0]!r}")
        for key, (owner, name) in own.items():
            here, came = getattr_tensor(owner, name), state[key]
            if here.shape != came.shape:
                raise AttunementError(f"{where}: {key!r} must have shape {tuple(here.shape)}, got {tuple(came.shape)}")
            if came.is_floating_point() and not torch.isfinite(came).all():
                raise AttunementError(f"{where}: {key!r} has values that are not finite")
        for key, (owner, name) in own.items():
            put(getattr_tensor(owner, name), state[key])
        for group in self.groups_:
            group.method.follow(group.parts)

    # --- training ---

    @property
    def total_steps(self) -> int | None:
        """How many steps are to come in all, None where that is not known."""
        return self._total_steps

    @total_steps.setter
    def total_steps(self, value: int | None) -> None:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise AttunementError(
                f"total_steps of adapter {self.name!r} must be a positive whole number, got {value!r}"
            )
        self._total_steps = value

    @property
    def trainable(self) -> bool:
        """Whether its tensors require gradients while it is active."""
        return self._trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        self._trainable = bool(value)
        bench_of(self.model).mark()

    def groups(self, lr: float, weight_decay: float = 0.0, head_lr: float | None = None) -> list[dict[str, Any]]:
        """Parameter groups for an optimiser: `lr` and `weight_decay` times the factors of each method (LoRA+, ...).

        `head_lr` takes the place of `lr` for task heads: new ones often want ten to a hundred times more than the rest.
        """
        head_lr = lr if head_lr is None else head_lr
        for word, value in {"lr": lr, "weight_decay": weight_decay, "head_lr": head_lr}.items():
            if isinstance(value, (str, bool)) or not hasattr(value, "__float__"):
                raise AttunementError(f"groups: {word} must be a number, got {value!r}")
        found: dict[tuple[float, float], list[nn.Parameter]] = {}
        for group in self.groups_:
            rates = group.method.rates()
            for owner in group.holders():
                for name, parameter in owner.named_parameters():
                    factors = rates.get(name.partition(".")[0], {})
                    own = factors.get("lr", 1.0) * (head_lr if group.on == "head" else lr)
                    key = (own, weight_decay * factors.get("weight_decay", 1.0))
                    found.setdefault(key, []).append(parameter)
        return [{"params": p, "lr": own, "weight_decay": decay} for (own, decay), p in found.items()]

    def penalty(self) -> Tensor:
        """The sum of the terms that its methods add to the loss; a 0-d zero where there are none."""
        terms = [
            part.method.penalty(**part.values("penalty"))  # type: ignore[attr-defined]
            for part in self.parts
            if "penalty" in part.takes
        ]
        if terms:
            return torch.stack([term.reshape(()) for term in terms]).sum()
        return torch.zeros((), device=next((p.device for p in self.parameters()), None))

    @property
    def chooses(self) -> bool:
        """Whether a method leaves parts out of some steps: they get no gradient then, which DDP has to be told."""
        return any(type(group.method).choose is not Method.choose for group in self.groups_)

    def begin(self) -> None:
        """Call before the first forward of a training, and of a resumed one after setting `step`.

        It lets methods choose what that step trains; `before_step` does so for every step after. Without it all of the
        adapter is in the first backward pass, which costs memory and changes nothing.
        """
        if self.chooses:
            for group in self.groups_:
                group.method.choose(self, group.parts)
            bench_of(self.model).mark()

    def before_step(self) -> None:
        """Call after the backward pass and before the optimiser's step; does nothing unless a method schedules."""
        self.begin()  # the gradients of what this step leaves out, from whoever has not called it, go
        for _, owner, _ in self.owners():
            for parameter in owner._parameters.values() if getattr(owner, "resting", False) else ():
                parameter.grad = None  # type: ignore[union-attr]
        for group in self.groups_:
            if type(group.method).gradient is not Method.gradient:
                for part in group.parts:
                    for name, parameter in part.holder._parameters.items():
                        if parameter is not None and parameter.grad is not None:
                            put(parameter.grad, group.method.gradient(part, name, whole(parameter.grad)))
            group.method.before_step(self, group.parts)
        self.step += 1
        self.begin()

    def succeed(self) -> Adapter | None:
        """Go on to the next phase of its methods; None where nothing is left to train.

        This very adapter then stands there with the methods of the next phase, under the same name, active where it was, to
        be trained with a new optimiser and schedule. Methods without a next phase start again from their initial values.
        Where the last phase only gives what was learned its final form, they keep what they have learned.

        Raises:
            AttunementError: while it is merged, or where a method beside could only start again from data.
        """
        from attunement.phases import succeed

        return succeed(self)

    # --- the base ---

    @property
    def merged(self) -> bool:
        """Whether its change stands in the base's weights at present."""
        return self._merged is not None

    @property
    def _restorable(self) -> bool:
        """Whether it is merged, with copies of the weights before."""
        return self._merged is not None and all(one.keep for one in self._merged)

    def merge(self, *, keep: bool = True, partial: bool = False, untie: bool = False) -> None:
        """Write the change into the base's weights, computed in float32 (float64 over float64) and rounded once.

        Args:
            keep: hold a CPU copy of the weights, so that `unmerge` restores them bit for bit.
            partial: leave the parts that cannot be merged in place beside the merged ones, instead of refusing.
            untie: give a tied weight its own copy first; without it, merging into a tied weight is refused.

        Raises:
            AttunementError: where a part cannot be merged, is not finite, or the base is quantised or tied; for good on top
                of another adapter that can be unmerged.
        """
        from attunement.merging import merge

        merge(self, keep=keep, partial=partial, untie=untie)

    def unmerge(self) -> None:
        """Put the base's weights back, bit for bit. Adapters merged later at the same weights come off first."""
        from attunement.merging import unmerge

        unmerge(self)

    def save(self, path: str | PathLike[str], format: str = "attunement") -> None:
        """Write the adapter to a folder, atomically; `format="peft"` writes PEFT's format instead. See `load`.

        An adapter that stands there in the same format is replaced. One in the other format stays, and the save is refused: of
        two in a folder `load` would read one, which may be the older.

        Raises:
            AttunementError: an unknown format, a path that is a file or holds an adapter in the other format, a metric that is
                no number, or what PEFT's format cannot express.
        """
        from attunement import storage

        storage.save(self, path, format)

    def push(
        self,
        repository: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        license: str | None = None,
        message: str | None = None,
    ) -> str:
        """Upload the adapter to the Hugging Face hub as `user/repository`, with a card; returns the address.

        Args:
            private: whether a repository that is made now can be read by its owner only.
            revision: a branch, made where there is none; the main one by default.
            token: with the right to write; by default the one that `hf auth login` or HF_TOKEN gave.
            license: the hub's word for the adapter's licence, such as "apache-2.0", for the card. A card that somebody has
                written there stays as it is.
            message: of the commit.

        Raises:
            AttunementError: an address that is none, or what the hub refuses.
        """
        from attunement import hub

        options = {"private": private, "revision": revision, "token": token, "license": license, "message": message}
        return hub.push(self, repository, **options)  # type: ignore[arg-type]

    def detach(self) -> None:
        """Take the adapter off: classes, keys and bits of the model are what they were. A kept merge is undone first."""
        detach(self.model, self.name)

    def summary(self) -> Summary:
        """What was adapted, how much of it is trained, and how large the saved tensors are: prints as a table."""
        from attunement.summary import Summary

        return Summary(self)


# --- the active set ---


def use(model: nn.Module, active: Active) -> None:
    """Make a name, `None` (the bare base) or a composition the active set.

    Raises:
        AttunementError: for a name that this model does not have, with the nearest one.
    """
    bench_of(model).use(active)


@contextlib.contextmanager
def using(model: nn.Module, active: Active) -> Iterator[None]:
    """The active set within a `with` block; the one before it comes back afterwards.

    A backward pass may come after the block, also where checkpoints compute parts of the forward again. Three things are
    computed again under what is active by then, so that `backward` belongs inside the block: a module compiled by itself
    within a checkpoint written by hand, reentrant checkpoints one within another, and checkpoints by hand where several
    threads run or switch the model.
    """
    bench = bench_of(model)
    before = bench.active
    bench.switch(active)
    try:
        yield
    finally:
        bench.switch(before)
        if not torch.is_grad_enabled():  # no backward pass will come for what ran in the block
            bench.mark()


def active(model: nn.Module) -> Active:
    """The active set as it was made: a name, a composition, or `None`, as it is for a model without adapters."""
    bench = model.__dict__.get("_attuned_bench")
    return None if bench is None else bench.active


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters on a model, by name, in the order they came."""
    bench = model.__dict__.get("_attuned_bench")
    return dict(bench.adapters) if bench is not None else {}


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter off a model, or all of them. After the last one the model is what it was before the first.

    An adapter merged with a copy is unmerged first; one merged with `keep=False` leaves its change in the weights.
    """
    bench = bench_of(model)
    latest = sorted(bench.adapters, key=lambda one: bench.adapters[one]._merged_at)[::-1]
    names = latest if name is None else [name]
    for one in names:
        checked(one, bench.adapters, "detach")
        adapter = bench.adapters[one]
        if adapter._restorable:
            adapter.unmerge()
        bench.remove(adapter)
