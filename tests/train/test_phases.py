"""Recipes whose method starts from data, and runs of two phases that are killed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from processes import killed
from rich.console import Console
from safetensors.torch import load_file

from attunement.train.recipe import Recipe
from attunement.train.run import train
from attunement.train.section import read
from attunement.train.trainer import last_checkpoint


def run(values: dict, **options: bool) -> dict:
    return train(read(Recipe, values, "recipe"), Console(quiet=True), **options)


def final(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter.safetensors")


@pytest.mark.parametrize("method", ["eva", "corda"])
def test_a_recipe_gives_its_rows_to_a_method_that_starts_from_data(recipe: dict, method: str, tmp_path: Path) -> None:
    recipe["training"]["num_train_epochs"] = 3
    metrics = run(recipe | {"adapter": {"method": method, "rank": 4, "on": "attention.{query,value}"}})
    assert metrics["eval"]["accuracy"] > 0.8
    tensors = final(tmp_path / "run")
    assert any(key.endswith(".A") and value.any() for key, value in tensors.items())


def test_a_run_killed_in_either_phase_goes_on_to_the_same_weights(recipe: dict, tmp_path: Path) -> None:
    recipe["adapter"] = {"method": "lt_sft", "share": 0.02}
    recipe["training"] |= {"save_strategy": "steps", "save_steps": 10, "eval_strategy": "no"}
    recipe["training"] |= {"load_best_model_at_end": False}
    run(recipe | {"output": str(tmp_path / "straight")})
    expected = final(tmp_path / "straight")
    assert any(key.endswith(".index") for key in expected)
    for phase, step, found in ((1, 12, "checkpoint-10"), (2, 3, "checkpoint-18"), (2, 12, "phase-2/checkpoint-10")):
        values = recipe | {"output": str(tmp_path / f"killed-{phase}-{step}")}
        file = tmp_path / f"recipe-{phase}-{step}.yaml"
        file.write_text(yaml.safe_dump(values))
        assert killed(file, step, phase)
        folder = Path(values["output"])
        assert last_checkpoint(folder) == folder / found
        run(values, resume=True)
        again = final(folder)
        assert again.keys() == expected.keys()
        assert all(torch.equal(again[key], expected[key]) for key in expected), (phase, step)
