"""What several sites need of their weights, computed side by side: a small decomposition has little use for several cores."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from attunement.method import Method
    from attunement.site import Site

T = TypeVar("T")
LARGEST = 1024
"""Entries on a matrix's shorter side: beyond it the parts of one decomposition are large enough for several cores."""


class _Work:
    """The jobs of one group of sites, begun in their order and a few at a time: what nobody has asked for takes memory."""

    def __init__(self, jobs: Iterator[tuple[Any, Site, Callable[[], Any]]], count: int) -> None:
        self.jobs = jobs
        self.begun: dict[tuple[Any, Site], Future[Any]] = {}
        self.pool = ThreadPoolExecutor(count, "attunement", torch.set_num_threads, (1,))
        for _ in range(2 * count):
            self.next()

    def next(self) -> None:
        for function, site, job in self.jobs:
            self.begun[function, site] = self.pool.submit(job)
            break


_work: ContextVar[_Work | None] = ContextVar("work", default=None)


def ahead(unless: str | None = None) -> Callable[[Callable[[Any, Site], T]], Callable[[Any, Site], T]]:
    """Marks what a method computes of a site before anything else, such as the directions of its weight.

    `adapt` and `load` compute it for several small sites at once, one core each, and `tensors` finds it done:

        @ahead()
        def directions(self, site):
            return torch.linalg.svd(site.weight, full_matrices=False)

    It must depend on the method's fields and the site alone: it draws no random numbers but from a generator of its own,
    and changes nothing. Values are those of one core to the bit, however many there are; on several, an SVD in single
    precision differs by up to 1e-4 in the vectors of its smallest values. What it raises is raised by `adapt` or `load`.

    Args:
        unless: a field of the method that, where it is true, leaves the computation to all cores: its values are to be
            those that others find who compute it so.
    """

    def marked(function: Callable[[Any, Site], T]) -> Callable[[Any, Site], T]:
        @functools.wraps(function)
        def found(self: Any, site: Site) -> T:
            work = _work.get()
            begun: Future[T] | None = None if work is None else work.begun.pop((function, site), None)
            if work is None or begun is None:
                return function(self, site)
            work.next()
            return begun.result()

        found.ahead = (function, unless)  # type: ignore[attr-defined]
        return found

    return marked


@contextlib.contextmanager
def working(method: Method, sites: Sequence[Site]) -> Iterator[None]:
    """While this lasts, what `method` marks with `ahead` is computed for the sites that are small and on the CPU."""
    kind = type(method)
    found = [one.ahead for name in dir(kind) if hasattr(one := getattr(kind, name), "ahead")]
    marked = [function for function, unless in found if unless is None or not getattr(method, unless)]
    threads = torch.get_num_threads()
    small = [site for site in sites if _small(site)] if marked and threads > 1 else []
    if not small or torch.is_inference_mode_enabled():
        yield
        return
    graded = torch.is_grad_enabled()

    def job(function: Any, site: Site) -> Any:
        with torch.set_grad_enabled(graded):  # that of the thread that waits
            return function(method, site)

    work = _Work(((f, site, functools.partial(job, f, site)) for site in small for f in marked), threads)
    token = _work.set(work)
    try:
        yield
    finally:
        _work.reset(token)
        work.pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # of threads that are still to come; this one's has not changed


def _small(site: Site) -> bool:
    held = site.module._parameters.get(site.parameter or "")
    plain = held is not None and held.device.type == "cpu" and not site.layout.beside_only  # reading it changes nothing
    return plain and not site.batch and min(site.outputs, site.inputs) <= LARGEST
