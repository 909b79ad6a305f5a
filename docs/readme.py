"""Write the table of methods into README.md from the registry; with --check, fail where it is out of date."""

import sys
from pathlib import Path

import attunement as at

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- methods: written by docs/readme.py -->\n", "<!-- methods: end -->"


FAMILIES = {
    "low_rank": "changes of weights of low rank",
    "orthogonal": "rotations of weights, and changes within chosen subspaces",
    "spectral": "changes that are sparse in a transformed basis",
    "sparse": "changes of a few entries",
    "selective": "chosen parameters, or chosen blocks at a time",
    "scaling": "scales and shifts of features",
    "bottleneck": "small networks behind or beside a layer",
    "prompts": "tokens, prefixes and what attention reads",
    "side": "networks beside a frozen model",
}


def table() -> str:
    """One folded table a family."""
    found: dict[str, list[str]] = {family: [] for family in FAMILIES}
    for name in at.methods():
        cls = at.method(name)
        if cls.__module__.startswith("attunement."):
            first = " ".join((cls.__doc__ or "").strip().split("\n\n")[0].split()).replace("|", "\\|")
            word = "paper" if "arxiv.org" in cls.source else "source"
            found[name.partition("/")[0]].append(f"| `{name}` ({cls.__name__}) | {first} | [{word}]({cls.source}) |")
    made = [f"{sum(map(len, found.values()))} methods; `attune methods NAME` and the site have each in full.\n"]
    for family, rows in found.items():
        made += [f"<details>\n<summary><code>{family}</code>: {FAMILIES[family]} ({len(rows)})</summary>\n"]
        made += ["| method | what it does | source |\n|---|---|---|", *rows, "\n</details>\n"]
    return "\n".join(made)


def written(text: str) -> str:
    before, rest = text.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    if "--check" in sys.argv and text != written(text):
        sys.exit("README.md: the table of methods is out of date; run `make readme`")
    README.write_text(written(text), encoding="utf-8")
