"""Vectors and sparse changes in PEFT's format: (IA)^3, BEFT, SHiRA, Super-Tuning."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from attunement.errors import AttunementError
from attunement.method import Method
from attunement.methods.scaling.beft import BEFT
from attunement.methods.scaling.ia3 import IA3
from attunement.methods.sparse.sparse import Sparse
from attunement.methods.sparse.super_tuning import SuperTuning
from attunement.peft.format import Config, Format, Named, most, one, own, plain, transposed

if TYPE_CHECKING:
    from attunement.part import Part

# --- (IA)^3 ---


def _read_ia3(config: Config, module: str, layer: nn.Module, tensors: Named) -> tuple[Method, Named]:
    listed = config.get("feedforward_modules") or ()
    inside = re.fullmatch(listed, module) if isinstance(listed, str) else module.endswith(tuple(listed))
    values = tensors["ia3_l"].flatten()
    return (IA3(side="input"), {"columns": values}) if inside else (IA3(side="output"), {"rows": values})


def _write_ia3(part: Part, values: Named) -> Named:
    points = (1,) * (own(part.site.module, "weight").dim() - 2)
    if points:
        return {"ia3_l": values["rows"].reshape(1, -1, *points)}
    return {"ia3_l": values["rows"][:, None] if "rows" in values else values["columns"][None]}


def _config_ia3(parts: Mapping[str, Part]) -> Config:
    inside = [name for name, part in parts.items() if part.method.form(part.site) == "input"]
    return {"feedforward_modules": "|".join(map(re.escape, inside)), "fan_in_fan_out": transposed(parts)}


# --- SHiRA ---


def _read_shira(config: Config, module: str, layer: nn.Module, tensors: Named) -> tuple[Method, Named]:
    values, (row, column) = tensors["shira_weight"], tensors["shira_indices"].long()
    out, inputs = own(layer, "weight").shape
    index, order = (row * inputs + column).sort()
    rank, rest = divmod(len(values), out + inputs)
    if rest:
        raise AttunementError(f"peft: {module} has {len(values)} entries, which is no multiple of {out} + {inputs}")
    method = Sparse(lora_rank=rank, seed=config.get("random_seed") or 0)
    return method, {"values": values[order], "index": index}


def _write_shira(part: Part, values: Named) -> Named:
    index, inputs = values["index"].long(), part.site.inputs
    return {
        "shira_weight": values["values"],
        "shira_indices": torch.stack((index // inputs, index % inputs)).int(),  # (2, count)
    }


def _config_shira(parts: Mapping[str, Part]) -> Config:
    for name, part in parts.items():
        method, site = part.method, part.site
        if isinstance(method, Sparse) and method.count(site) % (site.outputs + site.inputs):
            raise AttunementError(
                f"peft: {name} has {method.count(site)} entries; PEFT counts them as a rank, see Sparse(lora_rank=...)"
            )
    counts = (part.method.count(part.site) for part in parts.values())  # type: ignore[attr-defined]
    sums = (part.site.outputs + part.site.inputs for part in parts.values())
    rank = one("rank", (count // size for count, size in zip(counts, sums, strict=True)))
    seed = most(part.method.seed for part in parts.values())  # type: ignore[attr-defined]
    return {"r": rank, "mask_type": "random", "random_seed": seed}


# --- Super-Tuning: PEFT has the density the other way round, and counts entries by it ---


def _read_super(config: Config, module: str, layer: nn.Module, tensors: Named) -> tuple[Method, Named]:
    values, largest = tensors["supertuning_values"], config.get("select_top", True)
    scores = own(layer, "weight").abs().flatten()
    index = tensors.get("supertuning_indices")  # some files leave them to the weights, from which PEFT has them
    index = scores.topk(len(values), largest=largest).indices if index is None else index
    order = index.argsort()
    method = SuperTuning(
        density=1 - config.get("sparsity", 0.99), largest=largest, rank=config.get("r"), alpha=config.get("lora_alpha")
    )
    low_rank = {name: tensors[f"supertuning_lora_{name}.weight"] for name in "AB" if method.rank is not None}
    return method, {"values": values[order], "index": index[order], **low_rank}


def _write_super(part: Part, values: Named) -> Named:
    low_rank = {f"supertuning_lora_{name}.weight": values[name] for name in "AB" if name in values}
    return {"supertuning_values": values["values"], "supertuning_indices": values["index"].int(), **low_rank}


def _config_super(parts: Mapping[str, Part]) -> Config:
    method: Any = one("SuperTuning", (part.method for part in parts.values()))
    counts = {part.site.outputs * part.site.inputs: method.count(part.site) for part in parts.values()}
    whole = 1 - method.density
    sparsity = next(
        (s for s in (whole, whole - 1e-12) if all(int(size * (1 - s)) == n for size, n in counts.items())), None
    )
    if sparsity is None:
        raise AttunementError(f"peft: PEFT has no sparsity that keeps as many entries as a density of {method.density}")
    alpha = {} if method.rank is None else {"lora_alpha": 2 * method.rank if method.alpha is None else method.alpha}
    return {"sparsity": sparsity, "select_top": method.largest, "r": method.rank, **alpha}


BEFT_ = dataclasses.replace(
    plain("BEFT", BEFT, {"beft_bias": "shift"}),
    read=lambda config, module, layer, tensors: (BEFT(), {"shift": tensors["beft_bias"].flatten()}),
    write=lambda part, values: {"beft_bias": values["shift"][None]},
)
IA3_ = Format(
    kind="IA3",
    suffixes=("ia3_l",),
    fields=frozenset({"feedforward_modules"}),
    layers=("Linear", "Conv1D", "Conv2d", "Conv3d"),
    read=_read_ia3,
    write=_write_ia3,
    config=_config_ia3,
)
SHIRA = Format(
    kind="SHIRA",
    suffixes=("shira_weight", "shira_indices"),
    fields=frozenset({"r", "mask_type", "random_seed"}),
    layers=("Linear",),
    read=_read_shira,
    write=_write_shira,
    config=_config_shira,
)
SUPERTUNING = Format(
    kind="SUPERTUNING",
    suffixes=("supertuning_values", "supertuning_indices", "supertuning_lora_A.weight", "supertuning_lora_B.weight"),
    fields=frozenset({"sparsity", "select_top", "r", "lora_alpha", "lora_dropout", "save_precomputed_indices"}),
    layers=("Linear",),
    read=_read_super,
    write=_write_super,
    config=_config_super,
)
