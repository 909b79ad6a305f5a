"""Scaled vectors and sparse changes in PEFT's format: VeRA, (IA)^3, SHiRA."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from attunement.errors import AttunementError
from attunement.method import Method
from attunement.methods.low_rank.vera import VeRA
from attunement.methods.scaling.ia3 import IA3
from attunement.methods.sparse.sparse import Sparse
from attunement.peft.format import Config, Format, Named, most, one, own, transposed

if TYPE_CHECKING:
    from attunement.part import Part

# --- VeRA ---


def _read_vera(config: Config, module: str, layer: nn.Module, tensors: Named) -> tuple[Method, Named]:
    b, d = tensors["vera_lambda_b"], tensors["vera_lambda_d"]
    method = VeRA(
        rank=d.shape[0],
        start=config.get("d_initial", 0.1),
        seed=config.get("projection_prng_key", 0),
        stored=bool(config.get("save_projection", True)),
        dropout=config.get("vera_dropout", 0.0),
    )
    return method, {"b": b, "d": d}


def _write_vera(part: Part, values: Named) -> Named:
    return {"vera_lambda_b": values["b"], "vera_lambda_d": values["d"]}


def _config_vera(parts: Mapping[str, Part]) -> Config:
    vera: Any = one("VeRA", (part.method for part in parts.values()))
    return {
        "r": vera.rank,
        "d_initial": vera.start,
        "projection_prng_key": vera.seed,
        "save_projection": vera.stored,
        "vera_dropout": vera.dropout,
        "fan_in_fan_out": transposed(parts),
        "bias": "none",
    }


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


VERA = Format(
    kind="VERA",
    suffixes=("vera_lambda_b", "vera_lambda_d"),
    fields=frozenset({"r", "d_initial", "projection_prng_key", "save_projection", "vera_dropout"}),
    layers=("Linear", "Conv1D"),
    read=_read_vera,
    write=_write_vera,
    config=_config_vera,
    shared={"base_model.vera_A": "A", "base_model.vera_B": "B"},
    stored=lambda config: bool(config.get("save_projection", True)),
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
