"""What methods with several phases share: what stands beside them goes on, and which entries have changed most."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from attunement.adapter import Adapter
from attunement.errors import AttunementError
from attunement.method import Method, Tagged, Tensors, fixed
from attunement.methods._entries import integer, largest
from attunement.part import Part
from attunement.site import Site, whole


def others_go_on(adapter: Adapter, parts: Sequence[Part]) -> dict[Site, tuple[Method, Tensors]]:
    """For `succeed`: the parts of other methods, a head's for one, with their present values instead of their start."""
    return {
        part.site: (part.method, {name: Tagged(kind, whole(part.tensor(name))) for name, kind in part.kinds.items()})
        for part in adapter.parts
        if part not in parts and type(part.method).succeed is Method.succeed
    }


def most_changed(
    adapter: Adapter, changes: Mapping[Part, Tensor], count: int | None, share: float
) -> dict[Part, Tensor]:
    """The flat indices of the `count` largest changes of all parameters together, or of a share of them.

    Raises:
        AttunementError: where nothing has changed.
    """
    if not any(bool(change.any()) for change in changes.values()):
        raise AttunementError(f"succeed: no parameter of {adapter.name!r} has changed yet; train its first phase")
    total = sum(change.numel() for change in changes.values())
    return largest(
        {part: change.abs() for part, change in changes.items()}, min(count or max(1, round(share * total)), total)
    )


def entries_of(change: Tensor, index: Tensor) -> tuple[Tensor, Tagged]:
    """The values of a change at flat indices, and these as they are kept."""
    return change.flatten()[index], fixed(index.to(integer(change.numel())))
