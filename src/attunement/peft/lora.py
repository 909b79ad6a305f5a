"""LoRA and its kin in PEFT's format."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from attunement.errors import AttunementError
from attunement.method import Method
from attunement.methods.low_rank.adalora import AdaLoRA
from attunement.methods.low_rank.dora import DoRA
from attunement.methods.low_rank.kasa import KaSA
from attunement.methods.low_rank.lora import LoRA
from attunement.methods.low_rank.olora import OLoRA
from attunement.methods.low_rank.pissa import PiSSA
from attunement.peft.format import Config, Format, Named, number, one, own, patterned, said, transposed

if TYPE_CHECKING:
    from attunement.part import Part


def _read_lora(config: Config, module: str, layer: nn.Module, tensors: Named) -> tuple[Method, Named]:
    start = config.get("init_lora_weights", True)
    plain = tensors.keys() == {"lora_A.weight", "lora_B.weight"} and all(t.dim() == 2 for t in tensors.values())
    if start in ("pissa", "olora") and plain:
        return _read_started(config, module, start, tensors)
    if "lora_diag" in tensors:
        return _read_kasa(config, module, tensors)
    if start not in (True, False, None, "gaussian", "eva", "orthogonal"):
        raise AttunementError(
            f"peft: this adapter started from {start!r}, which changed the base weights too; save it in PEFT with "
            "path_initial_model_for_weight_conversion, which makes it a LoRA on the base as it is"
        )
    ours = {"lora_A.weight": "A", "lora_embedding_A": "A", "lora_B.weight": "B", "lora_embedding_B": "B"}
    values = {ours.get(suffix, "magnitude"): tensor for suffix, tensor in tensors.items()}
    alpha = said({**config, "module": module}, "lora_alpha", "alpha_pattern", 8)
    stabilised = bool(config.get("use_rslora"))
    made = {name: tensor.flatten() if name == "magnitude" else tensor.flatten(1) for name, tensor in values.items()}
    B, A = made["B"], made["A"]
    rank, largest = A.shape[0], min(B.shape[0], A.shape[1])
    if rank > largest:  # more than a matrix has: the same product and scale at the rank of the matrix
        product, identity = B.float() @ A.float(), torch.eye(largest)
        made["B"], made["A"] = (product, identity) if largest == A.shape[1] else (identity, product)
        alpha, rank = alpha * ((largest / rank) ** 0.5 if stabilised else largest / rank), largest
    fields: dict[str, Any] = {"rank": rank, "alpha": alpha, "rank_stabilised": stabilised}
    if config.get("use_dora"):
        return DoRA(**fields), made
    return LoRA(**fields, dropout=config.get("lora_dropout", 0.0)), made


def _read_started(config: Config, module: str, start: str, tensors: Named) -> tuple[Method, Named]:
    """What stands on a base without its principal part, which PEFT takes off again at load."""
    A, B = tensors["lora_A.weight"], tensors["lora_B.weight"]
    alpha = said({**config, "module": module}, "lora_alpha", "alpha_pattern", 8)
    fields: dict[str, Any] = {"rank": A.shape[0], "alpha": alpha, "rank_stabilised": bool(config.get("use_rslora"))}
    method = PiSSA(**fields, exact=True) if start == "pissa" else OLoRA(**fields)
    return method, {"A": A, "B": B}


def _read_kasa(config: Config, module: str, tensors: Named) -> tuple[Method, Named]:
    rank, penalties = len(tensors["lora_diag"]), config.get("kasa_config") or {}
    alpha = said({**config, "module": module}, "lora_alpha", "alpha_pattern", 8)
    alpha *= rank**0.5 if config.get("use_rslora") else 1
    method = KaSA(rank=rank, alpha=alpha, beta=penalties.get("beta", 1e-4), gamma=penalties.get("gamma", 1e-3))
    return method, {"A": tensors["lora_A.weight"], "B": tensors["lora_B.weight"], "d": tensors["lora_diag"]}


def _write_lora(part: Part, values: Named) -> Named:
    A, B = values["A"], values["B"]
    shape = own(part.site.module, "weight").shape
    if isinstance(part.site.module, nn.Embedding):
        made = {"lora_embedding_A": A, "lora_embedding_B": B}
    else:
        points = (1,) * (len(shape) - 2)  # a convolution's A has the kernel, its B is pointwise
        A = A.reshape(-1, *shape[1:]) if points else A
        made = {"lora_A.weight": A, "lora_B.weight": B.reshape(*B.shape, *points)}
    if "magnitude" in values:
        magnitude = values["magnitude"]  # (out,); behind a convolution (1, out, 1, ...)
        made["lora_magnitude_vector"] = magnitude.reshape(1, -1, *points) if len(shape) > 2 else magnitude
    return made


def _config_lora(parts: Mapping[str, Part]) -> Config:
    methods: dict[str, Any] = {name: part.method for name, part in parts.items()}
    stabilised = all(method.rank_stabilised for method in methods.values())
    ranks, alphas = {}, {}
    for name, method in methods.items():
        alpha = method.rank if method.alpha is None else method.alpha
        if method.rank_stabilised and not stabilised:  # PEFT has one flag for all: another alpha keeps the scale
            alpha *= math.sqrt(method.rank)
        ranks[name], alphas[name] = method.rank, number(alpha)
    return {
        **patterned("r", ranks, "rank_pattern"),
        **patterned("lora_alpha", alphas, "alpha_pattern"),
        "use_rslora": stabilised,
        "use_dora": any(isinstance(method, DoRA) for method in methods.values()),
        "lora_dropout": one("dropout", (getattr(method, "dropout", 0.0) for method in methods.values())),
        "fan_in_fan_out": transposed(parts),
        "bias": "none",
    }


def _write_started(part: Part, values: Named) -> Named:
    """A LoRA of twice the rank on the base as it is, as PEFT converts its own."""
    A0, B0 = (values[name] if name in values else part.tensor(name).cpu() for name in ("A0", "B0"))
    A, B = torch.cat([values["A"], A0]), torch.cat([values["B"], -B0], dim=1)
    return _write_lora(part, {"A": A, "B": B})


def _config_started(parts: Mapping[str, Part]) -> Config:
    alike: dict[str, Any] = {}
    for name, part in parts.items():
        method: Any = part.method
        alpha, stabilised = getattr(method, "alpha", None) or method.rank, getattr(method, "rank_stabilised", False)
        alpha *= 2**0.5 if stabilised else 2  # the scale stays that of half the rank
        dropout = getattr(method, "dropout", 0.0)
        twice = LoRA(rank=2 * method.rank, alpha=alpha, rank_stabilised=stabilised, dropout=dropout)
        alike[name] = SimpleNamespace(method=twice, site=part.site)
    return _config_lora(alike)


def _write_kasa(part: Part, values: Named) -> Named:
    return {"lora_A.weight": values["A"], "lora_B.weight": values["B"], "lora_diag": values["d"]}


def _config_kasa(parts: Mapping[str, Part]) -> Config:
    alike: dict[str, Any] = {}
    for name, part in parts.items():
        method: Any = part.method
        alike[name] = SimpleNamespace(method=LoRA(rank=method.rank, alpha=method.alpha), site=part.site)
    weights = one("KaSA", ((part.method.beta, part.method.gamma) for part in parts.values()))  # type: ignore[attr-defined]
    return {**_config_lora(alike), "kasa_config": dict(zip(("beta", "gamma"), weights, strict=True))}


LORA = Format(
    kind="LORA",
    suffixes=(
        "lora_A.weight",
        "lora_B.weight",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
        "lora_diag",
    ),
    fields=frozenset({"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout"})
    | {"init_lora_weights", "kasa_config"},
    layers=("Linear", "Conv1D", "Embedding", "Conv1d", "Conv2d", "Conv3d"),
    read=_read_lora,
    write=_write_lora,
    config=_config_lora,
)
STARTED = dataclasses.replace(LORA, write=_write_started, config=_config_started)
KASA = dataclasses.replace(LORA, layers=("Linear",), write=_write_kasa, config=_config_kasa)


# --- AdaLoRA: a file holds the triplets that the masks keep, its configuration their `rank_pattern` ---

ADALORA_FIELDS = frozenset(
    {"init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"}
)
ADALORA_FIELDS |= {
    "rank_pattern",
    "r",
    "lora_alpha",
    "lora_dropout",
    "init_lora_weights",
}  # `r` is LoRA's, and not looked at


def _read_adalora(config: Config, name: str, _: nn.Module, tensors: Named) -> tuple[Method, Named]:
    """What the masks took away is not in the file: it is zero here and masked, wherever it stood."""
    alpha = config.get("lora_alpha", 8)
    method = AdaLoRA(
        rank=config.get("target_r", 8),
        initial_rank=config.get("init_r", 12),
        alpha=alpha if alpha > 0 else None,  # as PEFT reads it
        dropout=config.get("lora_dropout", 0.0),
        orthogonality=config.get("orth_reg_weight", 0.5),
        warmup=config.get("tinit", 0),
        final=config.get("tfinal", 0),
        interval=config.get("deltaT", 1),
        beta1=config.get("beta1", 0.85),
        beta2=config.get("beta2", 0.85),
        total_steps=config.get("total_step"),
    )
    A, B, E = tensors["lora_A"].flatten(1), tensors["lora_B"], tensors["lora_E"].flatten()
    r, kept = min(method.ranks, B.shape[0], A.shape[1]), len(E)
    if kept > r:
        raise AttunementError(f"peft: {name} has {kept} ranks, more than a {B.shape[0]} x {A.shape[1]} matrix can use")
    made = {
        "A": A.new_zeros(r, A.shape[1]),
        "B": B.new_zeros(B.shape[0], r),
        "E": E.new_zeros(r),
        "mask": torch.zeros(r),
    }
    made["A"][:kept], made["B"][:, :kept], made["E"][:kept], made["mask"][:kept] = A, B, E, 1
    return method, made


def _write_adalora(part: Part, values: Named) -> Named:
    kept = values["mask"] != 0
    return {"lora_A": values["A"][kept], "lora_B": values["B"][:, kept], "lora_E": values["E"][kept, None]}


def _config_adalora(parts: Mapping[str, Part]) -> Config:
    method: AdaLoRA = one("AdaLoRA", (part.method for part in parts.values()))
    total = method.total_steps
    steps = [method.warmup, method.final]
    if total is not None:
        steps = [round(total * length) if length < 1 else int(length) for length in steps]
    elif any(length < 1 for length in steps):
        total, steps = 1, [0, 0]  # shares of a number of steps that only the training knew: to PEFT it is over
    masks = {name: part.tensor("mask").bool().tolist() for name, part in parts.items()}
    pattern = {f"{name}.lora_E": kept + [False] * (method.ranks - len(kept)) for name, kept in masks.items()}
    return {
        "init_r": method.ranks,
        "target_r": method.rank,
        "lora_alpha": method.ranks if method.alpha is None else method.alpha,
        "lora_dropout": method.dropout,
        "orth_reg_weight": method.orthogonality,
        "tinit": steps[0],
        "tfinal": steps[1],
        "deltaT": method.interval,
        "beta1": method.beta1,
        "beta2": method.beta2,
        "total_step": total or int(sum(steps)) + 1,
        "rank_pattern": None if all(all(kept) for kept in pattern.values()) else pattern,
        "fan_in_fan_out": transposed(parts),
        "bias": "none",
    }


ADALORA = Format(
    kind="ADALORA",
    suffixes=("lora_A", "lora_B", "lora_E"),
    fields=ADALORA_FIELDS,
    layers=("Linear", "Conv1D", "Conv2d"),
    read=_read_adalora,
    write=_write_adalora,
    config=_config_adalora,
)
