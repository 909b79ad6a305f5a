"""FRoD on disk: what follows from the saved basis and the base is not written, and comes out the same elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import attunement as at

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
IDS = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(0))


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=60, **SIZES)).eval()


def turned(self: at.FRoD, weights: list[torch.Tensor]) -> torch.Tensor:
    """Another basis, as where the last bit of a weight turns directions that are nearly as strong."""
    n = weights[0].shape[1]
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(n)).to(weights[0])).Q


def saved(path: Path) -> tuple[at.Adapter, torch.Tensor]:
    model = llama()
    adapter = at.adapt(model, {"attention.{query,value}|mlp.down": at.FRoD(density=0.1)})
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        expected = model(IDS).logits
        assert (expected - llama()(IDS).logits).abs().max() > 1e-2
    adapter.save(path)
    return adapter, expected


@torch.no_grad()
def test_a_file_without_u_means_the_same_where_the_basis_would_be_another(tmp_path, monkeypatch):
    adapter, expected = saved(tmp_path / "out")
    written = load_file(tmp_path / "out" / "adapter.safetensors")
    assert {key.rpartition(".")[2] for key in written} == (
        {"scales", "scales0", "turns", "V0", "V1", "V2", "places0", "places1", "places2"}
    )
    sizes = [(16, 25), (16, 25), (24, 57)]  # inputs and the entries that are trained, of each role in two layers
    assert sum(t.numel() for t in written.values()) == sum(n * n + k + 2 * (2 * n + k) for n, k in sizes)
    monkeypatch.setattr(at.FRoD, "basis", turned)
    model = llama()
    again = at.load(model, tmp_path / "out")
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-6, rtol=1e-5)
    for one, other in zip(adapter.parts, again.parts, strict=True):
        torch.testing.assert_close(one.tensor("U"), other.tensor("U"))


def test_values_do_not_come_to_an_adapter_that_stands_in_the_weights(tmp_path):
    adapter, _ = saved(tmp_path / "out")
    state = adapter.state()
    adapter.merge()
    with pytest.raises(at.AttunementError, match="unmerge it before it gets others"):
        adapter.load_state(state)
    adapter.unmerge()
    adapter.load_state(state)
