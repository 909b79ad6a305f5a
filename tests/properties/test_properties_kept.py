"""Adapters that are saved, copied, moved and made before there are values."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from grid import LIVES, STRUCTURES, adapted, every_cell, every_home, gradients, loss, once, promise, selected
from homes import PLACES, alone, fill, home, out, run
from safetensors.torch import save_file
from toy_model import bits, distance, same_bits

import attunement as at

HERE = Path(__file__).parent


@every_cell
@promise("save")
def test_what_is_saved_comes_back(sample, layer, tmp_path):
    model, fresh = home(PLACES[layer].home), home(PLACES[layer].home)
    adapter = adapted(model, sample, layer)
    adapter.save(tmp_path / "saved")
    before = bits(fresh)
    loaded = at.load(fresh, tmp_path / "saved", trainable=True)
    assert same_bits(loaded.state(), adapter.state())
    assert [part.key for part in loaded.parts] == [part.key for part in adapter.parts]
    assert distance(out(fresh), out(model)) <= 1e-12
    assert same_bits(bits(fresh), before)
    loss(run(fresh)).backward()
    assert all(gradient.abs().max() > 0 for gradient in gradients(loaded).values())


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory, request):
    """What every method, saved here, gives in one other process: {sample: a sentence, empty where all is right}."""
    return once("elsewhere", tmp_path_factory, lambda: loaded(tmp_path_factory.mktemp("saved"), set(selected(request))))


def loaded(folder: Path, wanted: set[str]) -> dict[str, str]:
    torch.manual_seed(0)
    for sample, where in (pair for pair in LIVES if f"{pair[0].id}@{pair[1]}" in wanted):
        model = home(where)
        with contextlib.suppress(Exception):  # its own test says so
            adapted(model, sample).save(folder / f"{sample.id}@{where}")
        save_file({"out": out(model)}, folder / f"{sample.id}@{where}.safetensors")
    done = subprocess.run(
        [sys.executable, str(HERE / "fresh_process.py"), str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"": done.stderr[-3000:]}


@every_home
@promise("save")
def test_a_fresh_process_loads_it(sample, where, elsewhere):
    assert elsewhere.get(f"{sample.id}@{where}", elsewhere.get("", "not reached")) == ""


@every_home
@promise("save")
def test_another_base_and_spoilt_files_are_refused(sample, where, tmp_path):
    adapted(home(where), sample).save(tmp_path / "saved")
    other = home(where)
    file = tmp_path / "saved" / "adapter.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(at.AttunementError, match="truncated"):
        at.load(other, tmp_path / "saved")
    file.write_bytes(whole)
    assert at.adapters(other) == {}
    assert torch.equal(out(other), alone(where))


@every_home
@promise("head")
def test_a_task_head_trains_and_is_saved_with_it(sample, where, tmp_path):
    model, fresh = home(where, classes=3), home(where, classes=3)
    adapter = adapted(model, sample)
    heads = [place.name for place in at.anatomy(model).task_heads]
    assert heads
    assert all(any(key.startswith(f"{name}.weight") for key in adapter.state()) for name in heads)
    others = [place.name for place in STRUCTURES[where].places if place.role == "head"]
    alone = adapted(home(where), sample).state()
    assert not any(key.startswith(f"{name}.") for key in alone for name in others), "a language model's does not"
    adapter.save(tmp_path / "saved")
    at.load(fresh, tmp_path / "saved")
    assert distance(out(fresh), out(model)) <= 1e-12


@every_home
@promise("copy")
@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_a_model_of_its_own(sample, where, again):
    model = home(where)
    adapted(model, sample, name="a")
    adapted(model, sample, name="b", seed=1)
    twin = again(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for name in (None, "a", "b", at.Stack("a", "b")):
        with at.using(model, name), at.using(twin, name):
            assert distance(out(twin), out(model)) <= 1e-12, name
    loss(run(twin)).backward()
    handle = at.adapters(twin)["b"]
    assert all(gradient.abs().max() > 0 for gradient in gradients(handle).values())
    torch.optim.SGD(handle.groups(lr=1.0)).step()
    assert distance(out(twin), out(model)) > 1e-4
    assert same_bits(model.state_dict(), state)
    at.detach(twin)
    assert torch.equal(out(twin), alone(where))
    assert set(at.adapters(model)) == {"a", "b"}


@every_home
@promise("copy")
def test_the_model_moves_with_its_adapter(sample, where):
    model = home(where)
    adapter = adapted(model, sample)
    expected = out(model)
    model.to(torch.float32)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert distance(out(model).double(), expected) <= 1e-4
    model.to(torch.float64)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    here = out(model)
    model.to("meta")
    assert all(p.is_meta for p in adapter.parameters())
    fill(model, state, assign=True)
    assert distance(out(model), here) <= 1e-12
    loss(run(model)).backward()
    assert all(gradient.abs().max() > 0 for gradient in gradients(adapter).values())


@every_home
@promise("meta")
@pytest.mark.parametrize("assign", [True, False], ids=["assign", "to_empty"])
def test_a_model_is_adapted_before_it_has_values(sample, where, assign):
    model = home(where)
    adapted(model, sample)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    empty = home(where).to("meta")
    adapter = adapted(empty, sample, seed=None)
    assert all(p.is_meta for p in adapter.parameters())
    assert set(empty.state_dict()) == set(state)
    if not assign:
        empty.to_empty(device="cpu")
    fill(empty, state, assign)
    assert distance(out(empty), out(model)) <= 1e-12
    loss(run(empty)).backward()
    assert all(gradient.abs().max() > 0 for gradient in gradients(adapter).values())
