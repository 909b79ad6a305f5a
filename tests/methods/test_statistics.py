"""What is gathered from data, against the same computed from all inputs at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import attunement as at
from attunement.choosing import chosen
from attunement.statistics import Components, Covariance, Fisher, Gradient, Mean, collect


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, num_labels=3
    )
    return BertForSequenceClassification(config).double().train()


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(count):
        ids = torch.randint(30, (4, 6), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 3:] = 0
        mask[1, :i] = 0
        made.append({"input_ids": ids, "attention_mask": mask, "labels": torch.randint(3, (4,), generator=generator)})
    return made


def seen(model: nn.Module, path: str, data: list[dict[str, Tensor]]) -> list[Tensor]:
    """The unpadded inputs of a module, batch by batch."""
    found: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
    with torch.no_grad():
        for batch in data:
            model.eval()(**batch)
    hook.remove()
    return [x[b["attention_mask"].bool()] for x, b in zip(found, data, strict=True)]


def sites(model: nn.Module, on: str) -> list:
    return [
        site for group in chosen(at.anatomy(model), {on: at.LoRA(rank=2), "head": None}, None) for site in group.sites
    ]


QUERY, DOWN = "bert.encoder.layer.1.attention.self.query", "bert.encoder.layer.1.output.dense"


@pytest.mark.parametrize("path", [QUERY, DOWN])
def test_moments_are_those_of_all_tokens_without_padding(path):
    model, data = bert(), batches()
    X = torch.cat(seen(model, path, data))
    (site,) = sites(model, path)
    got = collect(model, {site: (Covariance(), Mean())}, data)[site]
    torch.testing.assert_close(got["covariance"], X.T @ X / len(X))
    torch.testing.assert_close(got["mean"], X.mean(0))
    assert (got.tokens, got.batches, got.peak) == (len(X), 3, float(X.max()))


def test_components_are_those_of_all_tokens_where_none_is_cut_off():
    model, data = bert(), batches()
    X = torch.cat(seen(model, QUERY, data))
    (site,) = sites(model, QUERY)
    got = collect(model, {site: (Components(8, tau=1.1),)}, data)[site]["components"]
    _, singular, Vh = torch.linalg.svd(X - X.mean(0), full_matrices=False)
    torch.testing.assert_close(got.singular[:-1], singular[:-1])  # the last is zero: a layer norm stands before
    torch.testing.assert_close(got.share, singular.square() / singular.square().sum(), atol=1e-9, rtol=1e-7)
    assert ((got.directions * Vh)[:-1].sum(1).abs() > 1 - 1e-9).all()


def test_gradients_and_fisher_information():
    model, data = bert(), batches()
    (site,) = sites(model, DOWN)
    got = collect(model, {site: (Gradient(), Fisher())}, data)[site]
    W = model.get_submodule(DOWN).weight
    each = [torch.autograd.grad(model.eval()(**batch).loss, W)[0] for batch in data]
    torch.testing.assert_close(got["gradient"], torch.stack(each).mean(0))
    torch.testing.assert_close(got["fisher"], torch.stack(each).square().mean(0))


def test_a_weight_that_nothing_reads_carries_no_information_and_has_no_gradient():
    model, data = bert(), batches()
    model.bert.pooler.spare = nn.Linear(8, 8).double()
    spare, read = (sites(model, path)[0] for path in ("bert.pooler.spare", DOWN))
    got = collect(model, {site: (Fisher(),) for site in (spare, read)}, data)
    assert not got[spare]["fisher"].any()
    assert got[read]["fisher"].all()
    for wanted in ({spare: (Fisher(),)}, {spare: (Gradient(),), read: (Fisher(),)}):
        with pytest.raises(at.AttunementError, match=r"does not depend on bert\.pooler\.spare"):
            collect(model, wanted, data)


def test_sites_with_the_same_input_share_and_part_when_it_differs():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return self.a(x) + self.b(x if y is None else y)

    model = Two()
    x, y = torch.randn(2, 5, 3)
    a, b = sites(model, "a|b")
    wanted = {a: (Covariance(),), b: (Covariance(),)}
    got = collect(model, wanted, [(x,), (y,)])
    assert got[a]["covariance"] is got[b]["covariance"]
    got = collect(model, wanted, [(x,), (x, y)])
    torch.testing.assert_close(got[a]["covariance"], x.T @ x / 5)
    torch.testing.assert_close(got[b]["covariance"], (x.T @ x + y.T @ y) / 10)


def test_a_convolution_sees_windows():
    model = nn.Sequential(nn.Conv2d(4, 6, (2, 3), stride=(1, 2), padding=(1, 1), groups=2))
    x = torch.randn(2, 4, 5, 7)
    (site,) = sites(model, "0")
    got = collect(model, {site: (Covariance(),)}, [x])[site]["covariance"]
    windows = torch.nn.functional.unfold(x, (2, 3), padding=(1, 1), stride=(1, 2))  # (batch, 4*2*3, positions)
    X = windows.unflatten(1, (2, -1)).movedim(-1, 1).reshape(-1, 12)
    torch.testing.assert_close(got, X.T @ X / len(X))


def test_nothing_is_left_behind():
    model, data = bert(), batches()
    at.adapt(model, at.LoRA(rank=2), name="first")
    model.bert.eval()
    keep = [(m.training, len(m._forward_pre_hooks)) for m in model.modules()]
    wanted = [p.requires_grad for p in model.parameters()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    (site,) = sites(model, DOWN)
    collect(model, {site: (Gradient(), Covariance())}, data)
    assert [(m.training, len(m._forward_pre_hooks)) for m in model.modules()] == keep
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_data_that_cannot_be_used_are_refused_before_anything_changes():
    model, data = bert(), batches()
    wrong = [
        (None, "CorDA starts from data and got none"),
        ([], "no batch"),
        (data[0], r"pass \[batch\]"),
        ([3], "a batch of the data must be"),
        ([{**data[0], "inputs_embeds": torch.full((4, 6, 8), float("nan")).double(), "input_ids": None}], "not finite"),
    ]
    for given, sentence in wrong:
        with pytest.raises(at.AttunementError, match=sentence):
            at.adapt(model, at.CorDA(rank=2), on="attention.query", data=given)
        assert at.adapters(model) == {}
    (site,) = sites(model, DOWN)
    unlabelled = [{k: v for k, v in batch.items() if k != "labels"} for batch in data]
    with pytest.raises(at.AttunementError, match="need a loss"):
        collect(model, {site: (Gradient(),)}, unlabelled)
    with pytest.raises(at.AttunementError, match="never reached spare"):
        at.adapt(Half(), at.CorDA(rank=2), on="spare", data=[torch.randn(2, 3)])


class Half(nn.Module):
    """Calls one of its two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)
