"""A method's link leads to its file in the sources of the guide, and to its page on the site."""

from __future__ import annotations

import re
from typing import Any

METHOD = re.compile(r"\]\((?:\.\./)*src/attunement/methods(/[\w/]+)?(?:\.py)?\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The text of a page with links to the files of methods turned to their pages."""
    up = "../" * page.file.src_uri.count("/")
    return METHOD.sub(lambda found: f"]({up}methods{found[1] or '/index'}.md)", markdown)
