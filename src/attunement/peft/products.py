"""What PEFT has under other names and in the same shapes: products of factors, spectra, rotations of outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attunement.errors import AttunementError
from attunement.method import Method
from attunement.methods.bottleneck.bottleneck import ACTIVATIONS
from attunement.methods.low_rank.bone import Bone
from attunement.methods.low_rank.deft import DEFT
from attunement.methods.low_rank.delora import DeLoRA
from attunement.methods.low_rank.glora import GLoRA
from attunement.methods.low_rank.gralora import GraLoRA
from attunement.methods.low_rank.hira import HiRA
from attunement.methods.low_rank.loha import LoHa
from attunement.methods.low_rank.lokr import LoKr
from attunement.methods.low_rank.miss import MiSS
from attunement.methods.low_rank.peanut import PEANuT
from attunement.methods.low_rank.poly import Poly
from attunement.methods.low_rank.randlora import RandLoRA
from attunement.methods.low_rank.vb_lora import VBLoRA
from attunement.methods.orthogonal.road import RoAd
from attunement.methods.spectral.c3a import C3A
from attunement.methods.spectral.fourierft import FourierFT
from attunement.methods.spectral.waveft import WaveFT
from attunement.peft.format import Config, Format, Named, number, one, patterned, plain, said, transposed

if TYPE_CHECKING:
    from attunement.part import Part

Parts = Mapping[str, "Part"]


def each(parts: Parts, get: Callable[[Any], Any]) -> dict[str, Any]:
    """Something of every method, by the name of its module."""
    return {name: get(part.method) for name, part in parts.items()}


def ranks(parts: Parts) -> Config:
    """`r` and its pattern."""
    return patterned("r", each(parts, lambda method: method.rank), "rank_pattern")


def scales(parts: Parts) -> Config:
    """`alpha` and its pattern beside those of the rank."""
    alphas = each(parts, lambda method: number(method.rank if method.alpha is None else method.alpha))
    return {**ranks(parts), **patterned("alpha", alphas)}


def _waves(config: Config, tensors: Named) -> Config:
    if not config.get("use_idwt", True) or config.get("wavelet_family", "db1") not in ("db1", "haar"):
        raise AttunementError(
            f"peft: {config['module']} is changed by other wavelets than Haar's: {config.get('wavelet_family')!r}, "
            f"use_idwt={config.get('use_idwt')!r}"
        )
    return {"frequencies": len(tensors["spectrum"])}


_SIZES = ("r", "alpha", "rank_pattern", "alpha_pattern")
_DROPOUTS = ("rank_dropout", "module_dropout", "rank_dropout_scale")

LOHA = plain(
    "LOHA",
    LoHa,
    {"hada_w1_a": "B1", "hada_w1_b": "A1", "hada_w2_a": "B2", "hada_w2_b": "A2"},
    layers=("Linear", "Conv1d", "Conv2d"),
    passed_over=(*_SIZES, *_DROPOUTS),
    sizes=lambda config, t: {"rank": t["A1"].shape[0], "alpha": said(config, "alpha", "alpha_pattern", 8)},
    also=scales,
)
LOKR = plain(
    "LOKR",
    LoKr,
    {"lokr_w1": "C", "lokr_w1_a": "CB", "lokr_w1_b": "CA", "lokr_w2": "D", "lokr_w2_a": "DB", "lokr_w2_b": "DA"},
    {"decompose_both": "both"},
    passed_over=(*_SIZES, *_DROPOUTS, "decompose_factor"),
    sizes=lambda config, t: {
        "rank": said(config, "r", "rank_pattern", 8),
        "alpha": said(config, "alpha", "alpha_pattern", 8),
        "factor": None if config.get("decompose_factor", -1) == -1 else config["decompose_factor"],
    },
    also=lambda parts: {
        **scales(parts),
        "decompose_factor": one("factor", each(parts, lambda method: method.factor).values()) or -1,
    },
)
HIRA = plain(
    "HIRA",
    HiRA,
    {"hira_A": "A", "hira_B": "B"},
    {"r": "rank", "hira_dropout": "dropout"},
    layers=("Linear", "Conv1D"),
    passed_over=("rank_pattern",),  # which PEFT knows and does not follow
    also=lambda parts: {"fan_in_fan_out": transposed(parts)},
)
DELORA = plain(
    "DELORA",
    DeLoRA,
    {"delora_A": "A", "delora_B": "B", "delora_lambda": "strength", "delora_w_norm": "norms"},
    passed_over=("r", "rank_pattern", "delora_lambda", "lambda_pattern", "module_dropout"),
    sizes=lambda config, t: {"rank": t["A"].shape[0], "strength": said(config, "delora_lambda", "lambda_pattern", 15)},
    also=lambda parts: {
        **ranks(parts),
        **patterned("delora_lambda", each(parts, lambda method: number(method.strength)), "lambda_pattern"),
    },
)
VBLORA = plain(
    "VBLORA",
    VBLoRA,
    {"vblora_logits_A": "A_logits", "vblora_logits_B": "B_logits"},
    {
        "r": "rank",
        "num_vectors": "vectors",
        "vector_length": "vector_length",
        "topk": "topk",
        "init_vector_bank_bound": "bound",
        "init_logits_std": "spread",
        "vblora_dropout": "dropout",
    },
    layers=("Linear", "Conv1D"),
    also=lambda parts: {"fan_in_fan_out": transposed(parts)},
    shared={"base_model.vblora_vector_bank": "bank"},
)
RANDLORA = plain(
    "RANDLORA",
    RandLoRA,
    {"randlora_lambda": "left", "randlora_gamma": "right"},
    {"r": "rank", "projection_prng_key": "seed", "randlora_dropout": "dropout"},
    layers=("Linear", "Conv1D"),
    passed_over=("randlora_alpha", "save_projection", "sparse", "very_sparse"),  # the last two: how bases were drawn
    sizes=lambda config, t: {"stored": True, "scale": config.get("randlora_alpha", 640) / config.get("r", 32)},
    also=lambda parts: {
        "randlora_alpha": one("scale", each(parts, lambda method: number(method.scale * method.rank)).values()),
        "save_projection": True,
        "fan_in_fan_out": transposed(parts),
    },
    shared={"base_model.randlora_A": "A", "base_model.randlora_B": "B"},
    repeated=(".randlora_A", ".randlora_B"),
)
FOURIERFT = plain(
    "FOURIERFT",
    FourierFT,
    {"fourierft_spectrum": "spectrum"},
    {"scaling": "scale", "random_loc_seed": "seed"},
    layers=("Linear", "Conv1D"),
    passed_over=("n_frequency", "n_frequency_pattern"),
    sizes=lambda config, t: {"frequencies": len(t["spectrum"])},
    also=lambda parts: {
        **patterned("n_frequency", each(parts, lambda method: method.frequencies), expressions=False),
        "fan_in_fan_out": transposed(parts),
    },
)
WAVEFT = plain(
    "WAVEFT",
    WaveFT,
    {"waveft_spectrum": "spectrum"},
    {"scaling": "scale", "random_loc_seed": "seed"},
    passed_over=("n_frequency", "n_frequency_pattern", "proportional_parameters", "use_idwt", "wavelet_family"),
    sizes=_waves,
    also=lambda parts: {
        **patterned("n_frequency", each(parts, lambda method: method.frequencies), expressions=False),
        "wavelet_family": "db1",
        "use_idwt": True,
    },
)
GRALORA = plain(
    "GRALORA",
    GraLoRA,
    {
        "gralora_A": "A",
        "gralora_B": "B",
        "gralora_A_general.weight": "A_hybrid",
        "gralora_B_general.weight": "B_hybrid",
    },
    {"r": "rank", "hybrid_r": "hybrid_rank", "gralora_k": "tiles", "gralora_dropout": "dropout"},
    layers=("Linear", "Conv1D"),
    passed_over=("alpha",),
    sizes=lambda config, t: {"alpha": config.get("alpha", 64)},
    also=lambda parts: {
        "alpha": one("alpha", each(parts, lambda method: number(method.alpha or 2 * method.rank)).values()),
        "fan_in_fan_out": transposed(parts),
    },
)
C3A_ = plain(
    "C3A",
    C3A,
    {"c3a_kernel": "kernel"},
    passed_over=("block_size", "block_size_pattern"),
    sizes=lambda config, t: {"block_size": t["kernel"].shape[-1]},
    also=lambda parts: patterned("block_size", each(parts, lambda method: method.block_size), expressions=False),
)
ROAD = plain(
    "ROAD",
    RoAd,
    {"road_theta": "theta", "road_alpha": "alpha"},
    {"group_size": "group_size"},
    passed_over=("variant",),
    sizes=lambda config, t: {"variant": int(config.get("variant", "road_1").removeprefix("road_"))},
    also=lambda parts: {"variant": f"road_{one('variant', each(parts, lambda method: method.variant).values())}"},
)


# --- DEFT: PEFT takes the signs of orthonormal directions as its decomposition gives them ---


def _turned(method: Any, values: Named) -> Named:
    """P and R with the rows of R to the directions of the other side, which differ in their signs at most."""
    if method.decomposition != "qr" or "R" not in values:
        return values
    sign = torch.linalg.qr(values["P"].float()).R.diagonal().sign()
    return {**values, "R": values["R"] * sign.to(values["R"])[:, None]}


def _read_deft(config: Config, module: str, layer: nn.Module, tensors: Named) -> tuple[Method, Named]:
    values = {suffix.removeprefix("deft_"): tensor for suffix, tensor in tensors.items()}
    fields = {"decomposition_method": "decomposition", "alpha": "alpha", "deft_dropout": "dropout", "para": "para"}
    known: dict[str, Any] = {ours: config[theirs] for theirs, ours in fields.items() if theirs in config}
    method = DEFT(rank=values["P"].shape[1], **known)
    return method, _turned(method, values)


def _config_deft(parts: Parts) -> Config:
    deft: Any = one("DEFT", each(parts, lambda method: method).values())
    said = {"decomposition_method": deft.decomposition, "alpha": deft.alpha, "deft_dropout": deft.dropout}
    return {"r": deft.rank, **said, "para": deft.para, "fan_in_fan_out": transposed(parts), "bias": "none"}


DEFT_ = Format(
    kind="DEFT",
    suffixes=("deft_P", "deft_R"),
    fields=frozenset({"r", "decomposition_method", "init_scale", "alpha", "para", "deft_dropout"}),
    layers=("Linear", "Conv1D"),
    read=_read_deft,
    write=lambda part, values: {f"deft_{name}": value for name, value in _turned(part.method, values).items()},
    config=_config_deft,
)


# --- PEANuT: its layers are numbered ---

_DEEPEST = 16
_LAYERS = {"peanut_encoders": "E", "peanut_decoders": "D"}


def _read_peanut(config: Config, module: str, layer: nn.Module, tensors: Named) -> tuple[Method, Named]:
    depth, activation = config.get("depth", 0), config.get("act_fn", "relu")
    if activation not in ACTIVATIONS or depth > _DEEPEST:
        raise AttunementError(
            f"peft: {module} has act_fn={activation!r} and depth={depth}; PEANuT here has one of "
            f"{', '.join(ACTIVATIONS)} and is read to a depth of {_DEEPEST}"
        )
    values = {"A": tensors["peanut_A.weight"], "B": tensors["peanut_B.weight"]}
    if depth:
        values |= {
            ours: torch.stack([tensors[f"{theirs}.{i}.weight"] for i in range(depth)])
            for theirs, ours in _LAYERS.items()
        }
    rank, scale = values["A"].shape[0], config.get("scaling", 1.0)
    return PEANuT(rank=rank, depth=depth, scale=scale, activation=activation), values


def _write_peanut(part: Part, values: Named) -> Named:
    made = {"peanut_A.weight": values["A"], "peanut_B.weight": values["B"]}
    for theirs, ours in _LAYERS.items():
        made |= {f"{theirs}.{i}.weight": layer for i, layer in enumerate(values.get(ours, ()))}
    return made


def _config_peanut(parts: Parts) -> Config:
    peanut: Any = one("PEANuT", each(parts, lambda method: method).values())
    return {"r": peanut.rank, "depth": peanut.depth, "scaling": peanut.scale, "act_fn": peanut.activation}


PEANUT = Format(
    kind="PEANUT",
    suffixes=(
        "peanut_A.weight",
        "peanut_B.weight",
        *(f"{theirs}.{i}.weight" for theirs in _LAYERS for i in range(_DEEPEST)),
    ),
    fields=frozenset({"r", "depth", "scaling", "act_fn"}),
    layers=("Linear",),
    read=_read_peanut,
    write=_write_peanut,
    config=_config_peanut,
)

# --- Poly: its splits come first, and its factors are transposed ---


def _read_poly(config: Config, module: str, layer: nn.Module, tensors: Named) -> tuple[Method, Named]:
    A, B, logits = (tensors[f"poly_{word}"] for word in ("lora_A", "lora_B", "router.module_logits"))
    splits, skills, _, rank = A.shape
    return Poly(tasks=len(logits), rank=rank, skills=skills, splits=splits), {
        "A": A.permute(1, 3, 0, 2).flatten(2),
        "B": B.permute(1, 0, 3, 2).flatten(1, 2),
        "logits": logits.unflatten(1, (splits, skills)),
    }


def _write_poly(part: Part, values: Named) -> Named:
    poly: Any = part.method
    return {
        "poly_lora_A": values["A"].unflatten(2, (poly.splits, -1)).permute(2, 0, 3, 1),
        "poly_lora_B": values["B"].unflatten(1, (poly.splits, -1)).permute(1, 0, 3, 2) * poly.alpha,
        "poly_router.module_logits": values["logits"].flatten(1),
    }


POLY = dataclasses.replace(
    plain(
        "POLY",
        Poly,
        dict.fromkeys(("poly_lora_A", "poly_lora_B", "poly_router.module_logits"), ""),
        {"r": "rank", "n_tasks": "tasks", "n_skills": "skills", "n_splits": "splits"},
        passed_over=("poly_type",),
    ),
    read=_read_poly,
    write=_write_poly,
)


# --- GLoRA: what is missing stands as zeros ---


def _read_glora(config: Config, module: str, layer: nn.Module, tensors: Named) -> tuple[Method, Named]:
    values: dict[str, Tensor] = {}
    for suffix, tensor in tensors.items():
        name, end = suffix.removeprefix("glora_").split(".")
        if end == "X":
            values[name] = tensor.reshape(-1, 1) if tensor.numel() > 1 else tensor.reshape(())
        elif end != "zeros":
            values[f"{name}_{'left' if end == 'Xd' else 'right'}"] = tensor
    shapes = {"weights": "config_A_B", "coupling": "config_C", "shifts": "config_D_E"}
    fields: dict[str, Any] = {ours: config[theirs] for ours, theirs in shapes.items() if theirs in config}
    return GLoRA(rank=config.get("r", 8), **fields), values


def _write_glora(part: Part, values: Named) -> Named:
    made = {}
    for name, tensor in values.items():
        letter, _, side = name.partition("_")
        flat = letter in "DE" or not tensor.dim()
        end = {"left": "Xd", "right": "Xu"}.get(side, "X")
        made[f"glora_{letter}.{end}"] = tensor.reshape(-1) if flat and not side else tensor
    return made


def _config_glora(parts: Parts) -> Config:
    glora: Any = one("GLoRA", each(parts, lambda method: method).values())
    shapes = {"config_A_B": glora.weights, "config_C": glora.coupling, "config_D_E": glora.shifts}
    return {"r": glora.rank, **shapes, "bias": "none"}


GLORA = Format(
    kind="GLORA",
    suffixes=tuple(f"glora_{letter}.{end}" for letter in "ABCDE" for end in ("Xd", "Xu", "X", "zeros")),
    fields=frozenset({"r", "config_A_B", "config_C", "config_D_E"}),
    layers=("Linear",),
    read=_read_glora,
    write=_write_glora,
    config=_config_glora,
)


# --- MiSS: its start says which of three formulas it is ---


def _read_miss(config: Config, module: str, layer: nn.Module, tensors: Named) -> tuple[Method, Named]:
    block = tensors["miss_block"]
    if block.dim() == 3:
        return Bone(block_size=block.shape[-1]), {"B": block}
    rows = block.shape[1] if config.get("init_weights") == "mini" else None
    return MiSS(rank=block.shape[0], shared_rows=rows, dropout=config.get("miss_dropout", 0.0)), {"D": block}


def _config_miss(parts: Parts) -> Config:
    miss: Any = one("MiSS", each(parts, lambda method: method).values())
    mini = {} if miss.shared_rows is None else {"init_weights": "mini", "mini_r": miss.shared_rows}
    return {"r": miss.rank, "init_weights": True, "miss_dropout": miss.dropout, "bias": "none", **mini}


MISS = Format(
    kind="MISS",
    suffixes=("miss_block",),
    fields=frozenset({"r", "mini_r", "miss_dropout"}),
    layers=("Linear",),
    read=_read_miss,
    write=lambda part, values: {"miss_block": values["D"]},
    config=_config_miss,
)
BONE = dataclasses.replace(
    MISS,
    write=lambda part, values: {"miss_block": values["B"]},
    config=lambda parts: {
        "r": one("block_size", each(parts, lambda method: method.block_size).values()),
        "init_weights": "bat",
        "bias": "none",
    },
)
