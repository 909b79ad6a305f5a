"""What methods compute of several sites at once is what they compute of them one by one, and leaves nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attunement as at
from attunement.ahead import LARGEST, ahead
from attunement.method import Tensors, _registry
from attunement.site import Site

MARKED = [
    name
    for name in sorted(_registry)
    if any(hasattr(getattr(at.method(name), one), "ahead") for one in dir(at.method(name)))
]
"""Methods of which something is marked."""
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = dict(_registry)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)
    _registry.clear()
    _registry.update(before)


def layers(count: int = 9, width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(count)))


def watched() -> tuple[type[at.WeightMethod], dict[str, tuple[bool, int, bool]]]:
    """A method that notes whether another thread computed for a site, with how many cores and with gradients or not."""
    seen: dict[str, tuple[bool, int, bool]] = {}

    @at.register("test/watched", source="here")
    class Watched(at.WeightMethod):
        here: bool = False

        @ahead(unless="here")
        def norm(self, site: Site) -> Tensor:
            alone = threading.current_thread() is not threading.main_thread()
            seen[site.key] = (alone, torch.get_num_threads(), torch.is_grad_enabled())
            if not site.weight.any():
                raise at.AttunementError(f"adapt: {site.key} is zero")
            return torch.linalg.matrix_norm(site.weight)

        def tensors(self, site: Site) -> Tensors:
            return {"a": self.norm(site) * torch.rand(site.inputs)}

        def delta(self, W: Tensor, a: Tensor) -> Tensor:
            return torch.zeros_like(W) * a

    return Watched, seen


def values(adapter: at.Adapter) -> dict[tuple[str, str], Tensor]:
    return {(part.key, name): part.tensor(name).clone() for part in adapter.parts for name in part.kinds}


@pytest.mark.parametrize("name", MARKED)
def test_values_are_those_of_one_core_to_the_bit(name: str) -> None:
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(**LLAMA))
    method = at.method(name)
    options: dict[str, Any] = {"rank": 4} if "rank" in method.__dataclass_fields__ else {}
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        adapter = at.adapt(model, method(**options), on="attention.{query,value}")
        found.append(values(adapter))
        adapter.detach()
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


def test_small_matrices_are_computed_elsewhere_one_core_each_and_large_ones_here() -> None:
    model = layers()
    model.append(nn.Linear(LARGEST + 1, LARGEST + 1))
    method, seen = watched()
    with torch.no_grad():
        at.adapt(model, {"*": method(), "head": None})
    large = seen.pop("9.weight")
    assert set(seen.values()) == {(True, 1, False)}
    assert len(seen) == 9
    assert large == (False, 2, False)
    at.adapt(layers(), method(here=True))
    assert set(seen.values()) == {(False, 2, True)}


def test_threads_are_as_before() -> None:
    at.adapt(layers(), watched()[0]())
    counts = [torch.get_num_threads()]
    later = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert counts == [2, 2]
    assert not [one for one in threading.enumerate() if one.name.startswith("attunement")]


def test_no_more_is_begun_than_is_soon_asked_for() -> None:
    model = layers(40)
    nn.init.zeros_(model[2].weight)
    method, seen = watched()
    with pytest.raises(at.AttunementError, match=r"^adapt: 2\.weight is zero$"):
        at.adapt(model, method())
    assert len(seen) <= 8
    assert type(model) is nn.Sequential
    assert not model.state_dict().keys() ^ layers(40).state_dict().keys()


def test_stacked_matrices_are_several() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 8, 6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("eoi,bi->beo", self.weight, x)

    method, seen = watched()
    adapter = at.adapt(nn.Sequential(Experts()), method(), on="0")
    assert adapter.parts[0].tensor("a").shape == (5, 6)
    assert len(set(adapter.parts[0].tensor("a").norm(dim=1).tolist())) == 5
    assert set(seen.values()) == {(True, 1, True)}
