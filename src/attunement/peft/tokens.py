"""Rows of an embedding in PEFT's format: its type TRAINABLE_TOKENS, and `trainable_token_indices` beside a LoRA."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attunement.errors import AttunementError
from attunement.methods.selective.train import Train
from attunement.peft.format import Config, one
from attunement.site import whole

if TYPE_CHECKING:
    from attunement.part import Part

TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
FIELDS = {"token_indices", "trainable_token_indices"}
ENDING, BESIDE = ".trainable_tokens_delta", ".token_adapter"


def read_rows(config: Config, found: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> dict[str, Train]:
    """The method at each module that has trained rows in a file, without heads that are tied to another one.

    `found` has the rows, by what stands before `ENDING` in their names.
    """
    said = config.get("token_indices") or config.get("trainable_token_indices") or ()
    made: dict[str, Train] = {}
    for name in sorted(found, key=lambda name: not isinstance(modules[name], nn.Embedding)):
        listed = (
            next((rows for end, rows in said.items() if name.endswith(end)), ()) if isinstance(said, dict) else said
        )
        if len(listed) != len(found[name]):
            raise AttunementError(f"peft: {name} has {len(found[name])} trained rows, and {len(listed)} are named")
        weight = modules[name]._parameters["weight"]
        twin = next((n for n, m in modules.items() if n != name and m._parameters.get("weight") is weight), None)
        if twin is not None and not isinstance(modules[name], nn.Embedding):
            if made.get(twin) != Train(rows=tuple(listed)) or not torch.equal(found[twin], found[name]):
                raise AttunementError(
                    f"peft: the file trains rows of {name} apart from {twin}, to which this model ties it; untie them first"
                )
            continue
        made[name] = Train(rows=tuple(listed))
    return made


def write_rows(parts: Iterable[Part], beside_lora: bool, tied: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fields of the configuration and tensors, these by module and ending; `tied`: whether the model says that it ties.

    Raises:
        AttunementError: for rows of what is no embedding, or of one whose head PEFT does not know to be tied.
    """
    tensors: dict[str, Tensor] = {}
    rows: dict[str, list[int]] = {}
    for part in parts:
        site, method = part.site, part.method
        assert isinstance(method, Train)
        if not isinstance(site.module, nn.Embedding) or (part.twins and not tied):
            raise AttunementError(
                f"peft: {site.key} is trained in some rows; PEFT has that for embeddings, with heads that the model's "
                "configuration says are tied to them"
            )
        count = len(site.weight)
        rows[site.name] = [row % count for row in method.rows or ()]
        tensors[f"{site.name}{BESIDE if beside_lora else ''}{ENDING}"] = whole(part.tensor("copy"))
    if beside_lora:
        return {"trainable_token_indices": rows}, tensors
    return {"token_indices": list(one("choice of rows", map(tuple, rows.values())))}, tensors
