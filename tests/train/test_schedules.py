"""Methods with a schedule: killed in the middle of it, they go on to the same weights; nothing of it stays behind."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pair_of_trainers import METHODS, trained
from processes import killed, pair
from safetensors.torch import load_file
from test_trainer import arguments, model, rows, values
from test_training import Attune, final, run, same, written

import attunement as at
from attunement.train.trainer import last_checkpoint

# 36 steps, killed at 25, gone on with from 20: between two changes of the ranks
SCHEDULED: dict[str, dict[str, Any]] = {
    "adalora": {"rank": 2, "initial_rank": 6, "final": 0.2, "interval": 3},
    "increlora": {"rank": 3, "top": 1, "final": 0.2},
}


@pytest.mark.parametrize("method", SCHEDULED)
def test_a_run_killed_while_ranks_change_goes_on_to_the_same_weights(
    attune: Attune, recipe: dict, tmp_path: Path, method: str
) -> None:
    recipe["adapter"] = {"method": method, "on": "attention.{query,value}", **SCHEDULED[method]}
    recipe["training"] |= {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 10, "eval_strategy": "no"}
    recipe["training"] |= {"load_best_model_at_end": False}
    straight, folder = tmp_path / "straight", tmp_path / "run"
    run(recipe | {"output": str(straight)})
    file = written(recipe | {"output": str(folder)}, tmp_path)
    assert killed(file, 25)
    assert last_checkpoint(folder) == folder / "checkpoint-20"
    before = ranks(final(folder / "checkpoint-20"))
    code, _, errors = attune("train", file, "--resume")
    assert code == 0, errors
    assert same(final(folder), final(straight))
    for name in ("adapter/adapter.safetensors", "adapter-schedule/running.safetensors"):
        assert same(*(load_file(here / "checkpoint-36" / name) for here in (folder, straight)))
    assert ranks(final(folder)) == 4 * recipe["adapter"]["rank"] != before, "they have changed since the checkpoint"


def ranks(state: dict[str, torch.Tensor]) -> int:
    return int(sum(value.sum() for name, value in state.items() if name.endswith((".mask", ".live"))))


SAMPLED = [at.LISA(active=1, interval=1), at.LISA(active=1, interval=3), at.IST(rank=2, interval=2, dropout=0.1)]


@pytest.mark.parametrize("method", SAMPLED, ids=lambda method: f"{method.name}-{method.interval}")
def test_blocks_that_take_turns_go_on_as_they_were(tmp_path: Path, method: at.Method) -> None:
    straight = model()
    adapter = at.adapt(straight, method)
    plan = {"save_steps": 2, "save_strategy": "steps"}
    at.Trainer(straight, arguments(tmp_path, **plan), train_dataset=rows(48)).train()
    assert all(p.requires_grad for p in adapter.parameters())
    assert adapter.objective is None
    copy.deepcopy(straight)  # nothing of the trainer stays

    again = model()
    resumed = at.adapt(again, method)
    trainer = at.Trainer(again, arguments(tmp_path, save_strategy="no"), train_dataset=rows(48))
    seen: list[list[bool]] = []
    step = trainer.training_step
    trainer.training_step = lambda *a, **k: [  # type: ignore[method-assign]
        seen.append([p.requires_grad for p in resumed.parameters()]),
        step(*a, **k),
    ][1]
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = values(adapter)
    assert all(torch.equal(value, expected[name]) for name, value in values(resumed).items())
    assert len(seen) == 4
    assert not any(all(one) for one in seen), "also the first step after resuming leaves blocks out"
    assert resumed.state(["running"]).keys() == adapter.state(["running"]).keys()
    for name, value in resumed.state(["running"]).items():
        assert torch.equal(value, adapter.state(["running"])[name])
        assert value.any()


def test_a_checkpoint_without_its_statistics_is_refused(tmp_path: Path) -> None:
    adapted = model()
    at.adapt(adapted, at.AdaLoRA(rank=2, warmup=0, final=1, interval=1))
    trainer = at.Trainer(adapted, arguments(tmp_path), train_dataset=rows())
    trainer.train()
    (tmp_path / "checkpoint-4" / "adapter-schedule" / "running.safetensors").unlink()
    with pytest.raises(at.AttunementError, match=r"checkpoint-4 holds no statistics of 'default': expected .*running"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_plain_trainer_begins_a_schedule_too(tmp_path: Path) -> None:
    import transformers

    adapted = model()
    adapter = at.adapt(adapted, at.LISA(active=1, interval=2), on="blocks")
    seen: list[set[int]] = []

    class Looks(transformers.TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            trained = {p.site.block for p in adapter.parts if next(p.holder.parameters()).requires_grad}
            seen.append(trained - {None})

    given = arguments(tmp_path, save_strategy="no")
    transformers.Trainer(adapted, given, train_dataset=rows(), callbacks=[at.Callback(), Looks()]).train()
    assert [len(blocks) for blocks in seen] == [1, 1, 1, 1]
    assert seen[0] == seen[1]
    assert seen[2] == seen[3]


def test_two_processes_choose_alike(tmp_path: Path) -> None:
    """Under plain DDP, with parameters that a step leaves out; and what one process gives with the whole batch."""
    assert pair(Path(__file__).with_name("pair_of_trainers.py"), tmp_path) == [0, 0]
    for name, method in METHODS.items():
        one, other = (load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in (0, 1))
        assert one.keys() == other.keys()
        for key in one:
            torch.testing.assert_close(other[key], one[key], rtol=0, atol=0, msg=f"{name}: {key}")
        if name == "increlora":  # the importance of a half batch is another number: sum |D * g| is not linear in g
            continue
        for key, value in trained(method, tmp_path, per_device_train_batch_size=8).items():
            torch.testing.assert_close(one[key], value, rtol=1e-3, atol=1e-6, msg=f"{name}: {key}")
