"""The code of the guide, run page by page from top to bottom, and the navigation against the files."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "guide").glob("*.md"))
WITH_CODE = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    scope: dict = {"__name__": "guide"}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(block, page.name, "exec"), scope)


def test_every_page_of_the_guide_is_in_the_navigation():
    named = (ROOT / "docs" / "pages.py").read_text(encoding="utf-8")
    assert [page.stem for page in PAGES if f"guide/{page.name}" not in named] == []


@pytest.mark.parametrize("page", [ROOT / "docs" / "index.md", *PAGES], ids=lambda page: page.stem)
def test_links_lead_to_files_of_the_repository(page):
    found = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert [link for link in found if "://" not in link and not (page.parent / link).exists()] == []
