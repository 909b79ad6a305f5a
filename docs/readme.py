"""Write the table of methods into README.md from the registry; with --check, fail where it is out of date."""

import sys
from pathlib import Path

import attunement as at

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- methods: written by docs/readme.py -->\n", "<!-- methods: end -->"


def table() -> str:
    rows = ["| method | what it does | source |", "|---|---|---|"]
    for name in at.methods():
        cls = at.method(name)
        if cls.__module__.startswith("attunement."):
            first = " ".join((cls.__doc__ or "").strip().split("\n\n")[0].split()).replace("|", "\\|")
            rows.append(f"| `{name}` ({cls.__name__}) | {first} | [paper]({cls.source}) |")
    return "\n".join(rows) + "\n"


def written(text: str) -> str:
    before, rest = text.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    if "--check" in sys.argv and text != written(text):
        sys.exit("README.md: the table of methods is out of date; run `make readme`")
    README.write_text(written(text), encoding="utf-8")
