"""AdaLoRA's budget and masks against PEFT's allocator, its penalty, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import attunement as at


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 9, bias=False), nn.Linear(9, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def adapted(**fields: object) -> at.Adapter:
    torch.manual_seed(0)
    given = {"rank": 2, "initial_rank": 4, "warmup": 2, "final": 3, "interval": 2, "total_steps": 12}
    return at.adapt(Two(), at.AdaLoRA(**{**given, **fields}), on="*")


def values(adapter: at.Adapter, name: str) -> list[torch.Tensor]:
    return [part.tensor(name) for part in adapter.parts]


def test_masks_are_those_of_pefts_allocator() -> None:
    """The same values and gradients at every step; nothing else changes the values, so both see the same ones."""
    allocator = pytest.importorskip("peft.tuners.adalora.layer").RankAllocator
    adapter = adapted()
    named: dict[str, nn.Parameter] = {}
    for i, part in enumerate(adapter.parts):
        for name in "ABE":
            value = torch.rand_like(part.tensor(name)) + 0.1
            part.tensor(name).copy_(value)
            named[f"{i}.lora_{name}.default"] = nn.Parameter(value[:, None] if name == "E" else value)
    theirs = SimpleNamespace(named_parameters=named.items)
    config = SimpleNamespace(target_r=2, tinit=2, tfinal=3, deltaT=2, total_step=12, beta1=0.85, beta2=0.85)
    peft = allocator(theirs, config, "default")
    kept = []
    for step in range(12):
        for i, part in enumerate(adapter.parts):
            for name in "ABE":
                gradient = torch.randn_like(part.tensor(name))
                part.holder._parameters[name].grad = gradient
                own = named[f"{i}.lora_{name}.default"]
                own.grad = gradient.view_as(own).clone()
        adapter.before_step()
        if step <= 12 - 3:
            peft.update_and_allocate(theirs, step, force_mask=step == 12 - 3)
        for i, part in enumerate(adapter.parts):
            effective = part.tensor("E") * part.tensor("mask")
            torch.testing.assert_close(effective, named[f"{i}.lora_E.default"].detach()[:, 0])
        kept.append(int(sum(mask.sum() for mask in values(adapter, "mask"))))
    assert kept == [8, 8, 8, 8, 5, 8, 4, 8, 4, 4, 4, 4]


def test_a_masked_value_counts_as_zero_and_has_its_gradient() -> None:
    adapter = adapted()
    for name in "ABE":
        for value in values(adapter, name):
            value.copy_(torch.rand_like(value))
    x = torch.randn(3, 7)
    full = adapter.model(x)
    for mask in values(adapter, "mask"):
        mask[1] = 0
    masked = adapter.model(x)
    assert not torch.allclose(masked, full)
    masked.square().sum().backward()
    assert all(part.gradient("E")[1] != 0 and part.gradient("A")[1].eq(0).all() for part in adapter.parts)
    for E in values(adapter, "E"):
        E[1] = 0
    assert torch.equal(adapter.model(x), masked)


def test_the_penalty_is_the_mean_distance_from_orthogonality() -> None:
    adapter = adapted(orthogonality=0.3)
    norms = []
    for part in adapter.parts:
        for M in (part.tensor("A"), part.tensor("B").T):
            norms.append((M @ M.T - torch.eye(4)).norm())
    torch.testing.assert_close(adapter.penalty().detach(), 0.3 * torch.stack(norms).mean())


def test_what_the_last_mask_took_away_grows_from_zero() -> None:
    adapter = adapted()
    for _ in range(5):
        for part in adapter.parts:
            for name in "ABE":
                part.holder._parameters[name].grad = torch.randn_like(part.tensor(name))
        for E in values(adapter, "E"):
            E.fill_(1.0)
        adapter.before_step()
    before = [mask.clone() for mask in values(adapter, "mask")]
    assert sum(mask.sum() for mask in before) < 8
    for E in values(adapter, "E"):
        E.fill_(0.5)  # what an optimizer made of them
    adapter.before_step()  # of a step without a mask
    for E, mask in zip(values(adapter, "E"), before, strict=True):
        assert torch.equal(E, 0.5 * mask)


def test_schedules_that_allocate_nothing_are_refused() -> None:
    with pytest.raises(
        at.AttunementError, match=r"initial_rank 4 leaves nothing to take away for a rank of 4; the least is 5"
    ):
        at.AdaLoRA(rank=4, initial_rank=4)
    with pytest.raises(at.AttunementError, match=r"AdaLoRA: rank must be greater than 0, got 0"):
        at.AdaLoRA(rank=0)
    with pytest.raises(at.AttunementError, match=r"rank 6 is larger than a 5 x 9 matrix has; the largest is 5"):
        at.adapt(Two(), at.AdaLoRA(rank=6), on="second")
    adapter = adapted(warmup=8, final=4)
    with pytest.raises(at.AttunementError, match=r"of 12 steps, 8 of warmup and 4 of final leave none"):
        adapter.before_step()
    adapter = adapted(total_steps=None)
    with pytest.raises(at.AttunementError, match=r"needs the number of steps.*total_steps of the adapter 'default'"):
        adapter.before_step()
    adapter.total_steps = 12
    with pytest.raises(at.AttunementError, match=r"where no gradient is; its place is after backward\(\)"):
        adapter.before_step()
    sum(parameter.sum() for parameter in adapter.parameters()).backward()
    adapter.before_step()
    assert adapter.step == 1


def test_shares_of_all_steps_and_a_matrix_that_is_too_small_for_the_initial_rank() -> None:
    adapter = adapted(rank=4, initial_rank=6, warmup=0.25, final=0.25, interval=1, total_steps=None)
    adapter.total_steps = 16
    assert [len(mask) for mask in values(adapter, "mask")] == [6, 5]
    kept = []
    for _ in range(16):
        for part in adapter.parts:
            for name in "ABE":
                part.holder._parameters[name].grad = torch.randn_like(part.tensor(name))
        adapter.before_step()
        kept.append(int(sum(mask.sum() for mask in values(adapter, "mask"))))
    assert kept[:5] == [11] * 5
    assert kept[12:] == [8] * 4
    assert sorted(kept, reverse=True) == kept


def with_ranks(adapter: at.Adapter) -> at.Adapter:
    for i, part in enumerate(adapter.parts):
        for name in "ABE":
            part.tensor(name).copy_(torch.randn_like(part.tensor(name)))
        part.tensor("mask")[i + 1 :] = 0
    return adapter


def test_peft_reads_what_is_written_and_the_other_way_round(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapter = with_ranks(adapted(rank=3, initial_rank=7, alpha=5.0))  # 5 rows, so the second has fewer than 7
    x = torch.randn(4, 7)
    expected = adapter.model(x)
    adapter.save(tmp_path / "ours", format="peft")
    theirs = peft.PeftModel.from_pretrained(Two(), tmp_path / "ours").eval()
    theirs.load_state_dict({f"base_model.model.{n}.base_layer.weight": w for n, w in base(adapter)}, strict=False)
    torch.testing.assert_close(theirs(x), expected)
    theirs.save_pretrained(tmp_path / "theirs")
    model = Two()
    model.load_state_dict({f"{n}.weight": w for n, w in base(adapter)})
    loaded = at.load(model, tmp_path / "theirs")
    torch.testing.assert_close(model(x), expected)
    (method,) = {part.method for part in loaded.parts}
    assert (method.rank, method.initial_rank, method.total_steps, method.warmup) == (3, 7, 12, 2)
    assert [int(part.tensor("mask").sum()) for part in loaded.parts] == [1, 2]


def base(adapter: at.Adapter) -> list[tuple[str, torch.Tensor]]:
    return [(part.site.name, part.site.weight) for part in adapter.parts]


def test_peft_reads_what_was_saved_before_the_first_mask(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapter = adapted(warmup=0.25, total_steps=None)
    adapter.save(tmp_path / "ours", format="peft")
    theirs = peft.PeftModel.from_pretrained(Two(), tmp_path / "ours", is_trainable=True)
    assert theirs.base_model.model.first.lora_A["default"].shape == (4, 7)
