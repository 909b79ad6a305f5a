"""What follows when a training is over: the next phase of an adapter's methods, on the same sites under the same name."""

from __future__ import annotations

from attunement.adapter import Adapter, use
from attunement.adapting import attach, build, shares
from attunement.errors import AttunementError
from attunement.method import Tensors
from attunement.part import Group
from attunement.root import bench_of
from attunement.site import Site


def succeed(adapter: Adapter) -> Adapter | None:
    """See `Adapter.succeed`."""
    nexts = [group.method.succeed(adapter, group.parts) for group in adapter.groups_]
    if all(plan is None for plan in nexts):
        return None
    if adapter.merged:
        raise AttunementError(f"succeed: {adapter.name!r} is merged; unmerge it first")
    groups: list[Group] = []
    following: list[Group] = []  # of methods that go on
    waiting: list[tuple[Group, Group]] = []  # of others, as they are and as they would begin again
    given: dict[Site, Tensors] = {}
    for group, plan in zip(adapter.groups_, nexts, strict=True):
        old = Group(group.method, group.on, [part.site for part in group.parts])
        if plan is None and group.method.needs:
            word = type(group.method).__name__
            raise AttunementError(f"succeed: {word} would start the next phase afresh, and its data are gone")
        methods = {}
        for site, then in (dict.fromkeys(old.sites, group.method) if plan is None else plan).items():
            methods[site] = then[0] if isinstance(then, tuple) else then
            if isinstance(then, tuple):
                given[site] = then[1]
        made = shares(old, methods)
        groups += made
        if plan is None:
            waiting.append((group, made[0]))
        else:
            following += made
    built = build(adapter.model, groups, adapter.name, given=given)
    if any(p.numel() for group in following for holder in group.holders() for p in holder.parameters()):
        return become(adapter, built)
    for before, after in waiting:  # nothing is left to train, and what was learned beside stays
        for learned, fresh in zip(before.holders(), after.holders(), strict=True):
            fresh.load_state_dict(learned.state_dict())
    become(adapter, built)
    return None


def become(adapter: Adapter, other: Adapter) -> Adapter:
    """Give an adapter the methods and tensors of another one, which is built but not attached, where it stands."""
    active = bench_of(adapter.model).active
    bench_of(adapter.model).remove(adapter)
    adapter.groups_, adapter.step, adapter.total_steps = other.groups_, 0, None
    for part in adapter.parts:
        part.given = adapter._given
    attach(adapter)
    use(adapter.model, active)
    return adapter
