"""The pages that are made from the code: one for each method, the table of all, the reference, and the navigation."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import textwrap
import warnings
from typing import Any

import mkdocs_gen_files
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, ViTConfig, ViTModel

import attunement as at
from attunement.errors import AttunementError

GUIDE = {
    "Start": "index.md",
    "A tour": "guide/tour.md",
    "Choosing sites": "guide/sites.md",
    "Several adapters": "guide/several.md",
    "Training": "guide/training.md",
    "Comparing methods": "guide/comparing.md",
    "Saving and serving": "guide/saving.md",
    "Writing a method": "guide/writing.md",
}
PUBLIC = {
    "Adapting": ("adapt", "use", "using", "adapters", "detach", "anatomy", "Adapter"),
    "Saving": ("load", "to_lora"),
    "Several adapters": ("Sum", "Stack", "Average", "Weighted", "Rows"),
    "Training": ("Trainer", "Callback", "open_run"),
    "Writing methods": ("register", "method", "methods", "Method"),
    "Errors": ("AttunementError",),
}
MODULES = {
    "Recipes": "attunement.recipes",
    "Fields": "attunement.fields",
    "TRL": "attunement.trl",
    "Optimisers": "attunement.optim",
    "Compression": "attunement.compression",
}
"""Modules of which everything public is shown."""
KINDS = {
    "matrix": "weights of layers, each as a matrix (out, in)",
    "output": "what modules and sublayers give",
    "parameter": "parameters of any shape",
    "sequence": "the sequence of tokens that a backbone reads",
    "attention": "attentions",
    "network": "a frozen stack of blocks as a whole",
}
SIZES = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 1}


def ours() -> list[str]:
    """The methods of the library itself."""
    return [name for name in at.methods() if at.method(name).__module__.startswith("attunement.")]


@functools.cache
def bases() -> dict[str, torch.nn.Module]:
    """One block as wide as RoBERTa-base's, and one of a Llama and a ViT of that width, for what each method takes."""
    torch.manual_seed(0)
    with torch.device("cpu"):
        return {
            "an encoder": BertModel(BertConfig(vocab_size=1000, **SIZES)),
            "a decoder": LlamaModel(LlamaConfig(vocab_size=1000, **SIZES)),
            "a vision model": ViTModel(ViTConfig(**SIZES)),
        }


def batch(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a method that starts from data is shown; its values say nothing about the cost."""
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(1, 3, 224, 224, generator=generator)}
    return {"input_ids": torch.randint(1000, (4, 64), generator=generator)}


def cost(method: at.Method) -> str:
    """A table of the tensors that a method has at each site of one block, and of what it trains."""
    for what, model in bases().items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                adapter = at.adapt(model, method, data=[batch(model)] if method.needs else None)
        except AttunementError:
            continue
        try:
            rows, shown = ["| site | tensor | shape | kind |", "|---|---|---|---|"], set()
            for prefix, owner, kinds in adapter.owners():
                for name, kind in kinds.items():
                    tensor = owner._parameters.get(name)
                    tensor = owner._buffers.get(name) if tensor is None else tensor
                    if tensor is not None and len(shown) < 12:
                        shown.add((prefix, name))
                        rows.append(f"| `{prefix}` | `{name}` | {tuple(tensor.shape)} | {kind} |")
            total = sum(len(kinds) for *_, kinds in adapter.owners())
            more = f"\n\n... and {total - len(shown)} tensors more." if total > len(shown) else ""
            saved = sum(t.numel() * t.element_size() for t in adapter.state().values())
            trained = adapter.count()
            intro = (
                f"At its published placement in one block of {what} 768 wide it trains {trained:,} numbers and saves "
                f"{saved / 1000:,.1f} kB:"
            )
            return intro + "\n\n" + "\n".join(rows) + more
        finally:
            adapter.detach()
    return "It needs data, or sites that a plain transformer does not have, before its tensors are known."


def placement(method: at.Method) -> str:
    chosen = method.placement
    return f"`{chosen}`" if isinstance(chosen, str) else f"`{getattr(chosen, '__name__', 'a function')}`"


def described(doc: str) -> str:
    """A docstring as Markdown: the formula set apart, the fields as a list."""
    first, _, rest = doc.partition("\n\n")
    out = [f"> {plain(' '.join(first.split()))}", ""]
    for block in rest.split("\n\n"):
        if not block.startswith("Args:"):
            out += [plain(block), ""]
            continue
        for line in textwrap.dedent(block.partition("\n")[2]).splitlines():
            name, colon, text = line.partition(": ")
            starts = colon and not line.startswith(" ")
            out.append(f"- **{name}**: {plain(text)}" if starts else f"    {plain(line.strip())}")
        out.append("")
    return "\n".join(out)


def plain(text: str) -> str:
    """Text in which stars and underscores are themselves; code in backticks is left as it is."""
    pieces = text.split("`")
    return "`".join(piece if i % 2 else re.sub(r"([*_])", r"\\\1", piece) for i, piece in enumerate(pieces))


def example(cls: Any) -> at.Method | None:
    """The method with its defaults, where every field has one."""
    try:
        made: at.Method = cls()
    except AttunementError:
        return None
    return made


def page(name: str) -> str:
    cls: Any = at.method(name)
    doc = described(inspect.cleandoc(cls.__doc__ or ""))
    made = example(cls)
    parts = [f"# {cls.__name__}", "", f"`{name}` · acts on {KINDS[cls.acts_on]} · [source]({cls.source})", "", doc, ""]
    given = ", data=batches" if cls.needs else ""
    made_by = f"at.{cls.__name__}()" if hasattr(at, cls.__name__) else f"at.method({name!r})()"
    call = f"at.adapt(model, {made_by}{given})"
    parts += ["## Use", "", f"```python\nimport attunement as at\n\nadapter = {call}\n```", ""]
    parts += ["| field | default |", "|---|---|"]
    for field in dataclasses.fields(cls):
        default = field.default if field.default is not dataclasses.MISSING else "required"
        default = getattr(default, "default", default)
        parts.append(f"| `{field.name}` | `{default!r}` |")
    if made is not None:
        parts += ["", f"Published placement: {placement(made)}.", "", "## Tensors and cost", "", cost(made), ""]
        if made.cannot:
            parts += ["## What it cannot do", ""]
            parts += [f"- **{word}**: {why}." for word, why in made.cannot.items()]
    return "\n".join(parts) + "\n"


def main() -> None:
    navigation = mkdocs_gen_files.Nav()
    for title, path in GUIDE.items():
        navigation[title] = path
    rows = ["# Methods", "", "| method | what it does | merges |", "|---|---|---|"]
    navigation["Methods", "All"] = "methods/index.md"
    for name in ours():
        cls = at.method(name)
        family = name.partition("/")[0]
        first = plain(" ".join((cls.__doc__ or "").strip().split("\n\n")[0].split())).replace("|", "\\|")
        made = example(cls)
        merges = "" if made is None else "no" if "merge" in made.cannot else "yes"
        rows.append(f"| [{cls.__name__}]({name}.md) | {first} | {merges} |")
        with mkdocs_gen_files.open(f"methods/{name}.md", "w") as file:
            file.write(page(name))
        navigation["Methods", family.replace("_", " "), cls.__name__] = f"methods/{name}.md"
    with mkdocs_gen_files.open("methods/index.md", "w") as file:
        file.write("\n".join(rows) + "\n")
    for title, names in PUBLIC.items():
        path = f"reference/{title.lower().replace(' ', '_')}.md"
        with mkdocs_gen_files.open(path, "w") as file:
            file.write(f"# {title}\n\n" + "".join(f"::: {where(name)}\n\n" for name in names))
        navigation["Reference", title] = path
    for title, module in MODULES.items():
        path = f"reference/{title.lower()}.md"
        with mkdocs_gen_files.open(path, "w") as file:
            file.write(f"# {title}\n\n::: {module}\n")
        navigation["Reference", title] = path
    with mkdocs_gen_files.open("SUMMARY.md", "w") as file:
        file.writelines(navigation.build_literate_nav())


def where(name: str) -> str:
    """The module path under which a public name is defined."""
    thing = getattr(at, name)
    return f"{thing.__module__}.{thing.__qualname__}"


main()
