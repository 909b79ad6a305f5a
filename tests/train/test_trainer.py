"""`at.Trainer` and `at.Callback` from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from safetensors.torch import load_file

import attunement as at


def model() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=2
    )
    return transformers.BertForSequenceClassification(config)


def rows(count: int = 32) -> Dataset:
    ids = torch.randint(4, 40, (count, 6), generator=torch.Generator().manual_seed(1))
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 2).tolist()})


def arguments(folder: Path, **changes: Any) -> transformers.TrainingArguments:
    given = {"per_device_train_batch_size": 8, "num_train_epochs": 1, "learning_rate": 1e-2, "report_to": "none"}
    return transformers.TrainingArguments(folder, use_cpu=True, disable_tqdm=True, logging_steps=1, **(given | changes))


def values(adapter: at.Adapter) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in adapter.state().items()}


def test_it_trains_the_adapter_and_leaves_the_base(tmp_path: Path) -> None:
    adapted = model()
    base = {name: value.clone() for name, value in adapted.state_dict().items()}
    adapter = at.adapt(adapted, at.LoRA(rank=2))
    before = values(adapter)
    at.Trainer(adapted, arguments(tmp_path, save_strategy="no"), train_dataset=rows()).train()
    moved = {name for name, value in values(adapter).items() if not torch.equal(value, before[name])}
    assert moved == {name for name, _ in adapter.named_parameters()}
    adapter.detach()
    assert all(torch.equal(value, base[name]) for name, value in adapted.state_dict().items())


def test_checkpoints_hold_the_adapter_alone_and_resume(tmp_path: Path) -> None:
    straight = model()
    at.adapt(straight, at.LoRA(rank=2, dropout=0.1), name="one")
    at.Trainer(straight, arguments(tmp_path, save_steps=2, save_strategy="steps"), train_dataset=rows()).train()
    kept = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert kept == {"adapter", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}

    again = model()
    adapter = at.adapt(again, at.LoRA(rank=2, dropout=0.1), name="one")
    trainer = at.Trainer(again, arguments(tmp_path, save_strategy="no"), train_dataset=rows())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = at.adapters(straight)["one"].state()
    assert all(torch.equal(value, expected[name]) for name, value in adapter.state().items())


def test_a_checkpoint_of_other_methods_is_refused(tmp_path: Path) -> None:
    first = model()
    at.adapt(first, at.LoRA(rank=2))
    at.Trainer(
        first, arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=2), train_dataset=rows()
    ).train()
    other = model()
    adapter = at.adapt(other, at.LoRA(rank=4))
    trainer = at.Trainer(other, arguments(tmp_path, max_steps=4), train_dataset=rows())
    with pytest.raises(
        at.AttunementError, match=r"was written by LoRA\(rank=2.* is LoRA\(rank=4.*adapt as the run began"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert at.adapters(other)["default"] is adapter
    assert type(adapter.parts[0].method) is at.LoRA
    assert adapter.parts[0].method.rank == 4


def test_a_model_made_by_model_init(tmp_path: Path) -> None:
    def made() -> transformers.PreTrainedModel:
        adapted = model()
        at.adapt(adapted, at.LoRA(rank=2))
        return adapted

    trainer = at.Trainer(args=arguments(tmp_path), model_init=made, train_dataset=rows())
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-4" / "adapter" / "adapter.safetensors")
    state = at.adapters(trainer.model)["default"].state()
    assert all(torch.equal(value, saved[name]) for name, value in state.items())
    assert any(value.any() for name, value in state.items() if name.endswith(".B"))


def test_the_best_adapter_is_loaded_at_the_end(tmp_path: Path) -> None:
    adapted = model()
    adapter = at.adapt(adapted, at.LoRA(rank=2))
    scores = iter([0.1, 0.9, 0.5, 0.4])
    plan = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}
    trainer = at.Trainer(
        adapted,
        arguments(tmp_path, **plan, **best),
        train_dataset=rows(),
        eval_dataset=rows(8),
        compute_metrics=lambda _: {"score": next(scores)},
    )
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-2" / "adapter" / "adapter.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in adapter.state().items())


def test_several_adapters_are_kept_apart(tmp_path: Path) -> None:
    adapted = model()
    first, second = (at.adapt(adapted, at.LoRA(rank=2), name=name) for name in ("first", "second"))
    at.use(adapted, at.Sum("first", "second"))
    trainer = at.Trainer(adapted, arguments(tmp_path), train_dataset=rows())
    trainer.train()
    for adapter in (first, second):
        saved = load_file(tmp_path / "checkpoint-4" / f"adapter-{adapter.name}" / "adapter.safetensors")
        assert all(torch.equal(value, saved[name]) for name, value in adapter.state().items())


def test_rates_of_a_method_reach_the_optimizer(tmp_path: Path) -> None:
    adapted = model()
    at.adapt(adapted, {"attention.query": at.LoRA(rank=2, lora_plus=16), "head": None})
    trainer = at.Trainer(adapted, arguments(tmp_path, weight_decay=0.1), train_dataset=rows())
    groups = trainer.create_optimizer().param_groups
    assert {(group["lr"], group["weight_decay"]) for group in groups} == {(1e-2, 0.1), (0.16, 0.1)}


def test_a_head_has_the_rate_that_is_asked_for(tmp_path: Path) -> None:
    adapted = model()
    adapter = at.adapt(adapted, at.LoRA(rank=3, lora_plus=4), on="attention.query")
    assert {group["lr"]: len(group["params"]) for group in adapter.groups(lr=1e-3, head_lr=0.1)} == {
        1e-3: 2,
        4e-3: 2,
        0.1: 2,
    }
    with pytest.raises(at.AttunementError, match="head_lr must be a number"):
        adapter.groups(lr=1e-3, head_lr="fast")  # type: ignore[arg-type]
    trainer = at.Trainer(adapted, arguments(tmp_path, learning_rate=1e-3), head_learning_rate=0.1)
    assert {group["lr"] for group in trainer.create_optimizer().param_groups} == {1e-3, 4e-3, 0.1}


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_penalty_is_added_once_in_training_and_never_in_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulated: int
) -> None:
    adapted = model()
    adapter = at.adapt(adapted, {"attention.query": at.LoRA(rank=2), "head": None})
    weight = dict(adapter.named_parameters())
    (name,) = [name for name in weight if name.endswith(".A") and ".0." in name]
    monkeypatch.setattr(type(adapter), "penalty", lambda self: weight[name].sum())
    changes = {"gradient_accumulation_steps": accumulated, "per_device_train_batch_size": 8 // accumulated}
    plan = arguments(
        tmp_path, save_strategy="no", max_steps=1, optim="sgd", max_grad_norm=0.0, learning_rate=1.0, **changes
    )
    before = weight[name].detach().clone()
    trainer = at.Trainer(adapted, plan, train_dataset=rows(8), eval_dataset=rows(8))
    loss = trainer.evaluate()["eval_loss"]
    trainer.train()
    # B is zero, so the task gives A no gradient: what moves it is the penalty, whose gradient is one
    torch.testing.assert_close(before - weight[name].detach(), torch.ones_like(before))
    with torch.no_grad():
        weight[name].copy_(before + 5)
    at.use(adapted, None)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)


def test_before_step_sees_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = model()
    adapter = at.adapt(adapted, at.LoRA(rank=2))
    seen: list[bool] = []
    monkeypatch.setattr(
        type(adapter), "before_step", lambda self: seen.append(all(p.grad is not None for p in self.parameters()))
    )
    at.Trainer(adapted, arguments(tmp_path, save_strategy="no"), train_dataset=rows()).train()
    assert seen == [True] * 4


def test_what_would_not_train_is_refused(tmp_path: Path) -> None:
    bare = model()
    with pytest.raises(at.AttunementError, match="has no adapter, so nothing would train"):
        at.Trainer(bare, arguments(tmp_path), train_dataset=rows()).train()
    adapter = at.adapt(bare, at.LoRA(rank=2))
    adapter.save(tmp_path / "adapter")
    loaded = model()
    at.load(loaded, tmp_path / "adapter")
    with pytest.raises(at.AttunementError, match=r"nothing would train.*\(default\) is frozen or inactive"):
        at.Trainer(loaded, arguments(tmp_path), train_dataset=rows()).train()
    bare.bert.pooler.dense.weight.requires_grad_(True)
    with pytest.raises(at.AttunementError, match=r"'bert\.pooler\.dense\.weight'.* would not be saved"):
        at.Trainer(bare, arguments(tmp_path), train_dataset=rows()).train()


def test_a_quantised_base_passes_the_check_and_is_not_marked(tmp_path: Path) -> None:
    adapted = model()
    at.adapt(adapted, at.LoRA(rank=2))
    adapted.is_quantized = True
    adapted.hf_quantizer = type("Quantizer", (), {"is_trainable": True, "is_qat_trainable": False})()
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(adapted, arguments(tmp_path), train_dataset=rows())
    at.Trainer(adapted, arguments(tmp_path), train_dataset=rows())
    assert not adapted._hf_peft_config_loaded


def test_groups_of_like_length_depend_on_seed_and_epoch_alone() -> None:
    from attunement.train.trainer import LengthGrouped

    lengths = [3 + i % 17 for i in range(400)]
    sampler = LengthGrouped(lengths, 8, seed=0)
    first = list(sampler)
    torch.rand(3)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert sorted(first) == list(range(400))
    spread = [
        max(lengths[i] for i in first[n : n + 8]) - min(lengths[i] for i in first[n : n + 8]) for n in range(0, 400, 8)
    ]
    assert sum(spread) / len(spread) < 4


def test_a_plain_trainer_with_the_callback(tmp_path: Path) -> None:
    adapted = model()
    adapter = at.adapt(adapted, at.LoRA(rank=2))
    trainer = transformers.Trainer(adapted, arguments(tmp_path), train_dataset=rows(), callbacks=[at.Callback()])
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-4" / "adapter" / "adapter.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in adapter.state().items())


def test_the_callback_says_what_a_plain_trainer_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = model()
    adapter = at.adapt(adapted, at.LoRA(rank=2, lora_plus=16))
    trainer = transformers.Trainer(adapted, arguments(tmp_path), train_dataset=rows(), callbacks=[at.Callback()])
    with pytest.raises(at.AttunementError, match=r"'default' has learning rates of its own.*use at.Trainer"):
        trainer.train()
    first = next(adapter.parameters())
    monkeypatch.setattr(type(adapter), "penalty", lambda self: first.sum())
    with pytest.raises(at.AttunementError, match=r"'default' adds a penalty to the loss.*use at.Trainer"):
        trainer.train()
