"""TRL's trainers on adapted models: as they are, and as `at.trl` has them."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from safetensors.torch import load_file

import attunement as at

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
pytestmark = pytest.mark.filterwarnings("ignore:save_pretrained on an adapted model")

SITES = {"attention.{query,value}": at.LoRA(rank=4), "head": at.LoRA(rank=2)}
TALK = [
    {
        "prompt": [{"role": "user", "content": f"the film was {i}"}],
        "completion": [{"role": "assistant", "content": "very great plot"}],
    }
    for i in range(8)
]
PAIRS = [
    {
        "prompt": row["prompt"],
        "chosen": row["completion"],
        "rejected": [{"role": "assistant", "content": "awful plot"}],
    }
    for row in TALK
]


@pytest.fixture
def model(llama: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(llama)


@pytest.fixture
def common(llama: Path) -> dict[str, Any]:
    return {"processing_class": transformers.AutoTokenizer.from_pretrained(llama)}


def arguments(kind: Any, folder: Path, **options: Any) -> Any:
    plain = {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
    quiet = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no"}
    return kind(str(folder), **(plain | quiet | {"gradient_checkpointing": False} | options))


def losses(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def shaken(adapter: at.Adapter) -> at.Adapter:
    for parameter in adapter.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    return adapter


@pytest.mark.parametrize("packing", [False, True])
def test_phases_go_on_under_the_forward_that_trl_puts_on_the_model(
    model: Any, common: dict, tmp_path: Path, packing: bool
) -> None:
    adapter = at.adapt(model, at.LTSFT(count=40), on="attention.query")
    args = arguments(trl.SFTConfig, tmp_path, packing=packing, max_length=64, max_steps=2)
    trainer = at.trl.SFTTrainer(model, args, train_dataset=datasets.Dataset.from_list(TALK), **common)
    trainer.train()
    assert (trainer.phase, adapter.count()) == (2, 40)


def test_sft_as_it_is(model: Any, common: dict, tmp_path: Path) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adapter = at.adapt(model, SITES)
    args = arguments(trl.SFTConfig, tmp_path, max_steps=20, save_strategy="steps", save_steps=20)
    rows = datasets.Dataset.from_list(TALK)
    trainer = trl.SFTTrainer(model, args, train_dataset=rows, callbacks=[at.Callback()], **common)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.5
    assert all(parameter.abs().max() > 0 for parameter in adapter.parameters())  # B started at zero, in the head too
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    kept = load_file(tmp_path / "checkpoint-20" / "adapter" / "adapter.safetensors")
    assert all(torch.equal(kept[key], value) for key, value in adapter.state().items())
    adapter.detach()  # TRL leaves a forward of its own on the model
    ids = torch.tensor([[2, 7, 8]])
    fresh = transformers.AutoModelForCausalLM.from_pretrained(model.name_or_path)
    assert torch.equal(model.eval()(ids).logits, fresh(ids).logits)


def test_sft_packs_and_recomputes(model: Any, common: dict, tmp_path: Path) -> None:
    at.adapt(model, at.LoRA(rank=4))
    args = arguments(trl.SFTConfig, tmp_path, packing=True, max_length=32, gradient_checkpointing=True, max_steps=10)
    model.set_attn_implementation("eager")
    rows = datasets.Dataset.from_list(TALK * 4)
    trainer = at.trl.SFTTrainer(model, args, train_dataset=rows, **common)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_ours_trains_alike_and_resumes(model: Any, common: dict, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(TALK)

    def run(kind: Any, folder: Path, resume: str | None = None, **options: Any) -> tuple[Any, dict]:
        fresh = copy.deepcopy(model)
        torch.manual_seed(0)
        adapter = at.adapt(fresh, SITES)
        trainer = kind(fresh, arguments(trl.SFTConfig, folder, **options), train_dataset=rows, **common)
        if kind is trl.SFTTrainer:
            trainer.add_callback(at.Callback())
        trainer.train(resume_from_checkpoint=resume)
        return trainer, adapter.state()

    theirs, _ = run(trl.SFTTrainer, tmp_path / "theirs")
    ours, straight = run(at.trl.SFTTrainer, tmp_path / "ours", save_strategy="steps", save_steps=3)
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-6)
    checkpoint = tmp_path / "ours" / "checkpoint-3"
    assert (checkpoint / "adapter" / "adapter.safetensors").is_file()
    assert not list(checkpoint.glob("*model*")), "the base is not written"
    _, resumed = run(at.trl.SFTTrainer, tmp_path / "again", str(checkpoint))
    assert all(torch.equal(resumed[key], value) for key, value in straight.items())


@pytest.mark.parametrize("name", ["SFT", "DPO"])
def test_a_penalty_counts_once_however_batches_are_accumulated(
    name: str, model: Any, common: dict, tmp_path: Path
) -> None:
    """SFT's loss is a share of the whole accumulated batch, DPO's is divided by the trainer."""
    rows = datasets.Dataset.from_list(TALK if name == "SFT" else PAIRS)

    def first(regularisation: float) -> tuple[float, float]:
        fresh = copy.deepcopy(model)
        torch.manual_seed(1)
        adapter = shaken(at.adapt(fresh, at.HRA(rank=4, regularisation=regularisation)))
        penalty = adapter.penalty().item()
        args = arguments(getattr(trl, f"{name}Config"), tmp_path, max_steps=1, gradient_accumulation_steps=4)
        trainer = getattr(at.trl, f"{name}Trainer")(fresh, args=args, train_dataset=rows, **common)
        trainer.train()
        return losses(trainer)[0], penalty

    (loss, penalty), (without, _) = first(1.0), first(0.0)
    assert penalty > 1
    assert loss - without == pytest.approx(penalty, rel=1e-3)


@pytest.mark.parametrize("how", ["each step", "checkpointed", "precomputed", "precomputed by TRL's own"])
def test_the_reference_is_the_bare_base(how: str, model: Any, common: dict, tmp_path: Path) -> None:
    base = copy.deepcopy(model)
    other = copy.deepcopy(model)
    rows = datasets.Dataset.from_list([row | {"from": how} for row in PAIRS])  # each its own place in the cache

    def adapted(model: Any) -> Any:
        torch.manual_seed(1)
        shaken(at.adapt(model, SITES))
        return model

    args = arguments(trl.DPOConfig, tmp_path, gradient_accumulation_steps=2)
    own = {"train_dataset": rows, "callbacks": [at.Callback()], **common}
    theirs = trl.DPOTrainer(adapted(model), ref_model=base, args=args, **own)
    theirs.train()
    options = {"precompute_ref_log_probs": "precomputed" in how, "gradient_checkpointing": how == "checkpointed"}
    args = arguments(trl.DPOConfig, tmp_path, gradient_accumulation_steps=2, **options)
    if "own" in how:
        with at.using(adapted(other), None):
            ours = trl.DPOTrainer(other, args=args, **own)
    else:
        ours = at.trl.DPOTrainer(adapted(other), args=args, train_dataset=rows, **common)
    ours.train()
    assert ours.ref_model is None or not list(ours.ref_model.parameters())
    assert abs(losses(theirs)[0] - math.log(2)) > 1e-3, "the policy starts away from the base"
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-5)


@pytest.mark.parametrize("precompute", [False, True])
def test_an_earlier_adapter_as_the_reference(precompute: bool, model: Any, common: dict, tmp_path: Path) -> None:
    shaken(at.adapt(model, SITES, name="sft")).trainable = False
    at.adapt(model, at.LoRA(rank=4), name="dpo")
    at.use(model, at.Stack("sft", "dpo"))
    args = arguments(trl.DPOConfig, tmp_path, max_steps=1, precompute_ref_log_probs=precompute)
    rows = datasets.Dataset.from_list(PAIRS)

    def first(**reference: Any) -> float:
        fresh = copy.deepcopy(model)
        trainer = at.trl.DPOTrainer(fresh, args=args, train_dataset=rows, **reference, **common)
        trainer.train()
        return losses(trainer)[0]

    assert abs(first() - math.log(2)) > 1e-3
    assert first(reference="sft") == pytest.approx(math.log(2), abs=1e-6)


def test_refusals(model: Any, common: dict, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(PAIRS)
    adapter = at.adapt(model, {"attention.query": at.LoRA(), "head": at.IA3()})
    with pytest.raises(at.AttunementError, match=r"IA3 .* acts around 'lm_head'"):
        at.trl.SFTTrainer(model, arguments(trl.SFTConfig, tmp_path), train_dataset=rows, **common)
    adapter.detach()
    at.adapt(model, at.LoRA(), name="policy")
    given = {"train_dataset": rows, **common}
    with pytest.raises(at.AttunementError, match="polcy"):
        at.trl.DPOTrainer(model, args=arguments(trl.DPOConfig, tmp_path), reference="polcy", **given)
    with pytest.raises(at.AttunementError, match="sync_ref_model"):
        at.trl.DPOTrainer(model, args=arguments(trl.DPOConfig, tmp_path, sync_ref_model=True), **given)
