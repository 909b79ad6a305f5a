"""Masks: which entries are chosen from data, what gates learn, and the form that is left at the end."""

from __future__ import annotations

import shutil

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import attunement as at


class Net(nn.Module):
    """Two layers; with targets it returns a loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        y = self.down(torch.tanh(self.up(x)))
        return y if target is None else nn.functional.cross_entropy(y, target)


X = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
Y = torch.arange(12) % 3
ROWS = [(x[None], y[None]) for x, y in zip(X, Y, strict=True)]


def on_all(method: at.Method) -> dict:
    return {"up|down": method, "head": None}


def fisher(net: Net) -> dict[str, Tensor]:
    """The squared gradients of single rows, summed."""
    found = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for row in ROWS:
        for name, g in zip(found, torch.autograd.grad(net(*row), list(net.parameters())), strict=True):
            found[name] += g.square()
    return found


def descend(model: nn.Module, adapter: at.Adapter, steps: int = 20, lr: float = 0.05) -> None:
    optimizer = torch.optim.Adam(adapter.groups(lr=lr))
    adapter.begin()
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X, Y) + adapter.penalty()).backward()
        adapter.before_step()
        optimizer.step()


def test_fish_mask_trains_the_entries_with_the_most_fisher_information_of_all_parameters():
    expected = fisher(Net())
    threshold = torch.cat([f.flatten() for f in expected.values()]).topk(11).values.min()
    model = Net()
    adapter = at.adapt(model, on_all(at.FishMask(count=11)), data=ROWS)
    assert adapter.count() == 11
    state = adapter.state()
    for name, f in expected.items():
        index = state.get(f"{name}.index", torch.zeros(0))
        assert index.tolist() == (f.flatten() >= threshold).nonzero()[:, 0].tolist(), name
    base = {name: p.clone() for name, p in Net().named_parameters()}
    descend(model, adapter)
    adapter.merge()
    moved = {name: model.state_dict()[name] != p for name, p in base.items()}
    assert all(torch.equal(m, expected[name] >= threshold) for name, m in moved.items())


def test_fish_mask_counts_a_share_and_refuses_statistics_that_are_not_finite():
    assert at.adapt(Net(), on_all(at.FishMask(share=0.2)), data=ROWS).count() == round(0.2 * 51)
    with pytest.raises(at.AttunementError, match="starts from data and got none"):
        at.adapt(Net(), on_all(at.FishMask()))
    with pytest.raises(at.AttunementError, match="not finite"):
        at.adapt(Net(), on_all(at.FishMask()), data=[(X * float("nan"), Y)])


def test_spt_gives_sensitive_matrices_a_lora_and_the_others_their_entries():
    scores = {name: f for name, f in fisher(Net()).items() if name.endswith("weight")}
    model = Net()
    adapter = at.adapt(model, on_all(at.SPT(budget=14, rank=1, ease=2.0)), data=ROWS)
    kinds = {part.site.name: part.method.name for part in adapter.parts}
    sizes = {"up": 4 + 6, "down": 6 + 3}
    flat = torch.cat([f.flatten() for f in scores.values()])

    def total(t: int) -> tuple[int, dict[str, int]]:
        least = flat.topk(t).values.min()
        counts = {name.partition(".")[0]: int((f >= least).sum()) for name, f in scores.items()}
        return sum(sizes[n] if c >= sizes[n] / 2 else c for n, c in counts.items()), counts

    best = min((abs(total(t)[0] - 14), t) for t in range(1, 23))[1]
    assert adapter.count() == total(best)[0]
    for name, count in total(best)[1].items():
        wanted = "low_rank/lora" if count >= sizes[name] / 2 else "sparse/spt"
        assert kinds.get(name) == (wanted if count else None)


def test_taps_opens_its_gates_by_their_score_and_saves_the_layers_that_are_used():
    model = Net()
    adapter = at.adapt(model, on_all(at.TAPS(sparsity=0.5)))
    assert adapter.penalty().item() == pytest.approx(0.5 * 0.15)
    assert adapter.count() == 2 * (1 + 0) + 24 + 18
    parts = {part.site.name: part for part in adapter.parts}
    with torch.no_grad():
        for part in parts.values():
            part.tensor("change").normal_()
        parts["down"].tensor("score").fill_(0.0999)
    bare = Net()
    expected = bare.up.weight + parts["up"].tensor("change")
    assert torch.equal(model.up.weight, expected)
    assert torch.equal(model.down.weight, bare.down.weight), "its gate is shut"
    model(X, Y).backward()
    change = parts["down"].tensor("change")
    W = bare.down.weight.detach().requires_grad_()
    y = nn.functional.linear(torch.tanh(nn.functional.linear(X, expected, bare.up.bias)), W, bare.down.bias)
    (g,) = torch.autograd.grad(nn.functional.cross_entropy(y, Y), W)
    assert float(parts["down"].gradient("score")) == pytest.approx(float((g * change).sum()), rel=1e-4)
    y = model(X)
    assert adapter.succeed() is None
    torch.testing.assert_close(model(X), y)
    assert list(adapter.state()) == ["up.weight.change"]
    assert adapter.succeed() is None


def test_r_amt_masks_by_score_and_drops_gradients_that_disagree():
    model = Net()
    adapter = at.adapt(model, on_all(at.RAMT()))
    assert adapter.count() == 24 + 18
    assert adapter.penalty().item() == pytest.approx(1e-4 * (24**0.5 + 18**0.5) * 1e-2)
    up = next(part for part in adapter.parts if part.site.name == "up")
    with torch.no_grad():
        up.tensor("score")[:, ::2] = 4.9e-3
    mask = torch.tensor([0.0, 1.0, 0.0, 1.0]).expand(6, 4)
    assert torch.equal(model.up.weight, Net().up.weight * mask)
    model(X, Y).backward()
    with pytest.raises(at.AttunementError, match="set objective"):
        adapter.before_step()
    a = up.gradient("score").clone()
    adapter.objective = lambda: model(X, Y)  # agrees everywhere
    adapter.before_step()
    assert torch.equal(up.gradient("score"), a)
    adapter.objective = lambda: -model(X, Y)  # disagrees everywhere: an entry is kept with a chance of one half
    adapter.before_step()
    left = up.gradient("score")
    assert torch.equal(left, torch.where(left == 0, torch.zeros(()), a))
    assert 0 < int((left == 0).sum()) < a.numel()
    y = model(X)
    adapter.succeed()
    torch.testing.assert_close(model(X), y)
    assert {key: value.dtype for key, value in adapter.state().items()} == {
        "up.weight.bits": torch.uint8,
        "down.weight.bits": torch.uint8,
    }
    assert sum(value.numel() for value in adapter.state().values()) == 3 + 3, "a bit an entry"


def test_diff_pruning_draws_gates_and_goes_on_with_the_largest_entries(tmp_path):
    model = Net()
    method = at.DiffPruning(count=5, gate_start=0.5, mask_rate=1.0, sparsity=0.1)
    adapter = at.adapt(model, on_all(method))
    assert adapter.count() == 2 * 51 + 4
    chance = torch.sigmoid(torch.tensor(0.5))
    assert adapter.penalty().item() == pytest.approx(float(0.1 * chance * (51 + 4)), rel=1e-5)
    adapter.begin()
    part = adapter.parts[0]
    noise = part.tensor("noise").clone()
    assert noise.any()
    part.tensor("change").fill_(2.0)
    gate = (torch.sigmoid(0.5 + noise) * 3 - 1.5).clamp(0, 1)
    group = (torch.sigmoid(0.5 + part.tensor("shift")) * 3 - 1.5).clamp(0, 1)
    torch.testing.assert_close(model.up.weight, Net().up.weight + 2 * group * gate)
    adapter.step = 1
    adapter.begin()
    assert not torch.equal(part.tensor("noise"), noise)
    adapter.step = 0
    adapter.begin()
    assert torch.equal(part.tensor("noise"), noise), "a resumed step has its noise"
    part.tensor("change").zero_()
    descend(model, adapter)
    moved = {p.site.key: (p.change(p.site.module._parameters[p.site.parameter])).flatten() for p in adapter.parts}
    change = {p.site.key: p.tensor("change").flatten().clone() for p in adapter.parts}
    least = torch.cat(list(moved.values())).abs().topk(5).values.min()
    adapter.succeed()
    assert adapter.count() == 5
    for p in adapter.parts:
        index = (moved[p.site.key].abs() >= least).nonzero()[:, 0]
        assert p.tensor("index").tolist() == index.tolist()
        assert torch.equal(p.tensor("values"), change[p.site.key][index]), "it goes on from its change"
    adapter.save(tmp_path / "a")
    fresh = Net()
    at.load(fresh, tmp_path / "a")
    assert torch.equal(fresh(X), model(X))


def test_grafting_starts_close_to_the_largest_changes_and_keeps_what_its_gates_say():
    model = Net()
    adapter = at.adapt(model, {"up|down": at.Grafting(count=7), "head": None})
    descend(model, adapter)
    change = {p.site.key: p.tensor("change").clone() for p in adapter.parts}
    least = torch.cat([c.flatten() for c in change.values()]).abs().topk(7).values.min()
    adapter.succeed()
    assert adapter.count() == 51
    for p in adapter.parts:
        base = change[p.site.key].abs() >= least
        assert torch.equal(p.tensor("base"), base)
        moved = p.change(p.site.module._parameters[p.site.parameter])
        torch.testing.assert_close(moved, change[p.site.key] * base, atol=1e-3, rtol=0)
    first = adapter.parts[0]
    first.tensor("score").view(-1)[0] = 20.0  # this gate goes to the other side
    adapter.succeed()
    assert adapter.count() == 0
    flipped = (change[first.site.key].abs() >= least).flatten().clone()
    flipped[0] = ~flipped[0]
    kept = {p.site.key: p for p in adapter.parts}
    assert kept[first.site.key].tensor("index").tolist() == flipped.nonzero()[:, 0].tolist()
    assert torch.equal(kept[first.site.key].tensor("values"), change[first.site.key].flatten()[flipped])
    assert adapter.succeed() is None


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    return BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=3, **sizes))


def rows(count: int = 24) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    return [
        {"input_ids": torch.randint(20, (6,), generator=generator), "labels": torch.tensor(i % 3)} for i in range(count)
    ]


@pytest.mark.parametrize("method", [at.Grafting(count=40), at.TAPS(), at.RAMT(dropout_share=0)], ids=lambda m: m.name)
def test_the_trainer_leaves_the_last_form_and_does_not_train_it(method, tmp_path):
    model = bert()
    adapter = at.adapt(model, method)
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, per_device_train_batch_size=4,
        max_steps=3, learning_rate=1e-2, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    trainer = at.Trainer(model=model, args=args, train_dataset=rows())
    trainer.train()
    assert trainer.phase == (2 if method.name == "sparse/grafting" else 1)
    trained = {name.partition(".")[0] for name, _ in adapter.named_parameters()}
    assert trained == {"classifier"}, "the head went on beside it"
    start = bert().classifier.weight
    assert not torch.equal(next(p for n, p in adapter.named_parameters() if "weight" in n), start)


def test_s2ft_takes_the_same_heads_and_channels_in_a_block_and_keeps_only_their_inputs():
    model = bert()
    recipe = {"attention.output": at.S2FT(share=0.5), "attention.value": at.S2FT(share=0.5), "mlp": at.S2FT(share=0.25)}
    adapter = at.adapt(model, recipe | {"head": None})
    parts = {(part.site.block, part.site.role): part for part in adapter.parts}
    for block in (0, 1):
        index = {role: part.tensor("index").tolist() for (b, role), part in parts.items() if b == block}
        assert index["attention.output"] == index["attention.value"] in ([0, 1, 2, 3], [4, 5, 6, 7]), "one whole head"
        assert index["mlp.up"] == index["mlp.down"]
        assert len(index["mlp.up"]) == 3
    assert adapter.count() == 2 * (4 * 8 + 8 * 4 + 3 * 8 + 8 * 3)
    down = parts[0, "mlp.down"]
    with torch.no_grad():
        down.tensor("columns").normal_()
    base = model.bert.encoder.layer[0].output.dense._parameters["weight"].clone()
    base[:, down.tensor("index")] += down.tensor("columns")
    x = torch.randn(5, 12, requires_grad=True)
    kept: list[tuple[int, ...]] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model.bert.encoder.layer[0].output.dense(x)
    torch.testing.assert_close(y, x @ base.T + model.bert.encoder.layer[0].output.dense.bias)
    assert (5, 12) not in kept, "the whole input is not kept"
    assert (5, 3) in kept


@pytest.mark.parametrize(
    "method", [at.DiffPruning(count=60, gate_start=0.5, mask_rate=1.0), at.Grafting(count=40)], ids=lambda m: m.name
)
def test_a_run_killed_in_either_phase_resumes_to_the_same_weights(method, tmp_path):
    def run(folder, resume=None) -> dict[str, Tensor]:
        model = bert()
        adapter = at.adapt(model, method, on="blocks")
        args = transformers.TrainingArguments(
            output_dir=str(folder), report_to=[], use_cpu=True, disable_tqdm=True, per_device_train_batch_size=4,
            max_steps=4, learning_rate=1e-2, save_strategy="steps", save_steps=2, logging_strategy="no",
        )  # fmt: skip
        at.Trainer(model=model, args=args, train_dataset=rows()).train(resume_from_checkpoint=resume)
        return adapter.state()

    expected = run(tmp_path / "whole")
    assert any(key.endswith(".index") for key in expected)
    for place in ("checkpoint-2", "checkpoint-4", "phase-2/checkpoint-2", "phase-2/checkpoint-4"):
        folder = tmp_path / "killed" / place
        shutil.copytree(tmp_path / "whole" / place, folder)
        found = run(tmp_path / "killed", True if "phase" in place else str(folder))
        assert found.keys() == expected.keys(), place
        assert all(torch.equal(found[key], expected[key]) for key in expected), place
        shutil.rmtree(tmp_path / "killed")
