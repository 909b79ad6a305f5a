"""What PEFT computes again from seeds or from the base: TinyLoRA, Uni-LoRA, VeRA, PVeRA, AdaMSS; and LoRA with a frozen A."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attunement.errors import AttunementError
from attunement.method import Method
from attunement.methods.low_rank.adamss import AdaMSS, clusters, singular
from attunement.methods.low_rank.lily import Lily
from attunement.methods.low_rank.lora import LoRA
from attunement.methods.low_rank.pvera import PVeRA
from attunement.methods.low_rank.tiny_lora import TinyLoRA
from attunement.methods.low_rank.uni_lora import UniLoRA
from attunement.methods.low_rank.vera import VeRA
from attunement.methods.orthogonal.frod import FRoD, frame
from attunement.peft.format import Config, Format, Named, one, own, plain, transposed
from attunement.peft.lora import LORA

if TYPE_CHECKING:
    from attunement.part import Part


def _fan(parts: Mapping[str, Part]) -> Config:
    return {"fan_in_fan_out": transposed(parts), "bias": "none"}


TINYLORA = dataclasses.replace(
    plain(
        "TINYLORA",
        TinyLoRA,
        {"tinylora_A": "A", "tinylora_B": "B", "tinylora_P": "P"},
        {
            "r": "rank",
            "u": "size",
            "weight_tying": "tying",
            "projection_seed": "seed",
            "tinylora_dropout": "dropout",
        },
        layers=("Linear", "Conv1D"),
        passed_over=("init_v_bound", "save_projection"),
        sizes=lambda config, tensors: {"stored": True},
        also=lambda parts: {"save_projection": True, **_fan(parts)},
        numbered={"base_model.tinylora_v.": "v"},
    ),
    write=lambda part, values: {f"tinylora_{name}": part.tensor(name) for name in "ABP"},
)


def _write_unilora(part: Part, values: Named) -> Named:
    made: dict[str, Tensor] = {}
    for name in "AB":
        index = part.tensor(f"{name}_index").long()
        made |= {f"unilora_indices_{name}": index, f"unilora_scales_{name}": part.tensor("share")[index]}
    return made


UNILORA = dataclasses.replace(
    plain(
        "UNILORA",
        UniLoRA,
        {"unilora_indices_A": "A_index", "unilora_indices_B": "B_index"},
        {
            "r": "rank",
            "theta_d_length": "length",
            "proj_seed": "seed",
            "init_theta_d_bound": "bound",
            "unilora_dropout": "dropout",
        },
        layers=("Linear", "Conv1D"),
        passed_over=("save_indices",),
        sizes=lambda config, tensors: {"stored": "A_index" in tensors},
        also=lambda parts: {"save_indices": True, **_fan(parts)},
        shared={"base_model.unilora_theta_d": "theta"},
        repeated=(".unilora_scales_A", ".unilora_scales_B"),
    ),
    write=_write_unilora,
)


def _projected(kind: str, made: type[Any]) -> Format:
    """VeRA and its kin: two vectors a module, and one pair of matrices for all, which may follow from the seed."""
    prefix = kind.lower()
    fields = {"r": "rank", "d_initial": "start", "projection_prng_key": "seed", f"{prefix}_dropout": "dropout"}
    return plain(
        kind,
        made,
        {f"{prefix}_lambda_b": "b", f"{prefix}_lambda_d": "d"},
        fields,
        layers=("Linear", "Conv1D"),
        passed_over=("save_projection", "generator_seed"),
        sizes=lambda config, tensors: {"stored": bool(config.get("save_projection", True))},
        also=lambda parts: {"save_projection": one("stored", (p.method.stored for p in parts.values())), **_fan(parts)},  # type: ignore[attr-defined]
        shared={f"base_model.{prefix}_{name}": name for name in "AB"},
        stored=lambda config: bool(config.get("save_projection", True)),
    )


VERA = _projected("VERA", VeRA)
PVERA = _projected("PVERA", PVeRA)


# --- AdaMSS: which row is in which cluster is not in the file ---

_MOST = 256
_ALLOCATION = {"use_asa", "asa_target_subspaces", "init_warmup", "final_warmup", "mask_interval"}
_ALLOCATION |= {"asa_importance_beta", "asa_uncertainty_beta", "asa_schedule_exponent", "use_dynamic_rank"}


def _read_adamss(config: Config, module: str, layer: nn.Module, tensors: Named) -> tuple[Method, Named]:
    V, bias, Z = tensors["adamss_newB"], layer._parameters.get("bias"), own(layer, "weight").float()
    rank, inputs = len(V), Z.shape[1]
    Z = Z if bias is None else torch.cat((Z, bias.detach().float()[:, None]), dim=1)
    count, seed = sum(name.startswith("adamss_A.") for name in tensors), config.get("random_seed", 0)
    rows = clusters(singular(Z, rank, seed)[0], count)
    each = [(tensors[f"adamss_A.{k}"], tensors[f"adamss_B.{k}"]) for k in range(count)]
    if [len(B) for _, B in each] != rows.bincount(minlength=count).tolist():
        raise AttunementError(f"peft: the rows of {module} fall into other clusters here than in the file")
    most = max(len(A) for A, _ in each)
    A, B = V.new_zeros(count, most, rank), V.new_zeros(len(Z), most)
    for k, (Ak, Bk) in enumerate(each):
        A[k, : len(Ak)] = Ak
        B[rows == k] = torch.nn.functional.pad(Bk, (0, most - Bk.shape[1]))
    shift = {} if bias is None else {"shift": V[:, inputs]}
    method = AdaMSS(rank=rank, subspaces=count, subspace_rank=most, seed=seed, stored=True)
    return method, {"A": A, "B": B, "V": V[:, :inputs], "rows": rows, **shift}


def _write_adamss(part: Part, values: Named) -> Named:
    V, rows = part.tensor("V"), values["rows"]
    if "shift" in (*part.holder._buffers,):
        V = torch.cat((V, part.tensor("shift")[:, None]), dim=1)
    made = {"adamss_newB": V}
    for k, A in enumerate(values["A"]):
        made |= {f"adamss_A.{k}": A, f"adamss_B.{k}": values["B"][rows == k]}
    return made


def _config_adamss(parts: Mapping[str, Part]) -> Config:
    fields = {"r": "rank", "num_subspaces": "subspaces", "subspace_rank": "subspace_rank", "random_seed": "seed"}
    methods = [part.method for part in parts.values()]
    return {theirs: one(ours, (getattr(method, ours) for method in methods)) for theirs, ours in fields.items()}


ADAMSS = Format(
    kind="ADAMSS",
    suffixes=("adamss_newB", *(f"adamss_{name}.{k}" for name in "AB" for k in range(_MOST))),
    fields=frozenset({"r", "num_subspaces", "subspace_rank", "random_seed", "svd_threshold", *_ALLOCATION}),
    layers=("Linear",),
    read=_read_adamss,
    write=_write_adamss,
    config=_config_adamss,
)


# --- Lily: what its layers share stands at each of them ---


def _tied_lily(part: Part, name: str) -> str | None:
    kind, block = (part.tensor(word).shape[1] for word in ("kind", "block"))
    return {"A": f"A{kind}_{block}", "B": f"B{kind}"}.get(name)


def _read_lily(config: Config, module: str, layer: nn.Module, tensors: Named) -> tuple[Method, Named]:
    A, B, router = (tensors[f"lily_{word}.weight"] for word in ("A", "B", "router"))
    fields = {"stride": config.get("stride_A", 1), "scaling": config.get("scaling", 1.0)}
    method = Lily(rank=len(A), experts=len(router), **fields)
    return method, {"A": A, "B": B.view(len(router), len(A), -1), "router": router}


def _write_lily(part: Part, values: Named) -> Named:
    A, B = (part.tensor(str(_tied_lily(part, name))) for name in "AB")
    return {
        "lily_A.weight": A.clone(),
        "lily_B.weight": B.flatten(0, 1).clone(),
        "lily_router.weight": values["router"],
    }


def _config_lily(parts: Mapping[str, Part]) -> Config:
    words: dict[str, int] = {}
    for name, part in parts.items():
        if words.setdefault(name.rpartition(".")[2], part.tensor("kind").shape[1]) != part.tensor("kind").shape[1]:
            raise AttunementError(
                f"peft: PEFT's Lily shares by the last word of a name; {name} shares with others here"
            )
    fields = {"r": "rank", "stride_A": "stride", "num_B": "experts", "scaling": "scaling"}
    methods = [part.method for part in parts.values()]
    return {theirs: one(ours, (getattr(method, ours) for method in methods)) for theirs, ours in fields.items()}


LILY = Format(
    kind="LILY",
    suffixes=("lily_A.weight", "lily_B.weight", "lily_router.weight"),
    fields=frozenset({"r", "stride_A", "num_B", "scaling"}),
    layers=("Linear",),
    read=_read_lily,
    write=_write_lily,
    config=_config_lily,
    tied=_tied_lily,
)


# --- FRoD: the base comes in through U, which is not in the file ---


def _category(name: str) -> str:
    """What PEFT takes for the role of a module."""
    words = name.split(".")
    if len(words) == 1 or words[-2].isdigit():
        return words[-1]
    if words[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return "_".join(words[-2:])


def _tied_frod(part: Part, name: str) -> str | None:
    return f"{name}{part.tensor('kind').shape[1]}" if name in ("V", "places") else None


def _read_frod(config: Config, module: str, layer: nn.Module, tensors: Named) -> tuple[Method, Named]:
    V, (rows, columns), W = tensors["frod_V"], tensors["frod_s_indices"].long(), own(layer, "weight")
    W = W.mT if type(layer).__name__ == "Conv1D" else W
    _, scales = frame(W, torch.linalg.inv(V.double()))
    method = FRoD(density=config.get("sparse_rate", 0.01), seed=config.get("projection_prng_key", 0))
    values = {"scales": tensors["frod_lambda_l"], "turns": tensors["frod_lambda_s_values"], "scales0": scales}
    return method, {**values, "V": V, "places": rows * V.shape[1] + columns}


def _write_frod(part: Part, values: Named) -> Named:
    word = _category(part.site.name)
    V, places = (part.tensor(str(_tied_frod(part, name))) for name in ("V", "places"))
    n = len(V)
    return {
        "frod_lambda_l": values["scales"],
        "frod_lambda_s_values": values["turns"],
        f"frod_V.{word}": V,
        f"frod_s_indices.{word}": torch.stack((places // n, places % n)),
        f"frod_s_size.{word}": torch.tensor([n, n]),
    }


def _config_frod(parts: Mapping[str, Part]) -> Config:
    kinds: dict[str, int] = {}
    for name, part in parts.items():
        if kinds.setdefault(_category(name), part.tensor("kind").shape[1]) != part.tensor("kind").shape[1]:
            raise AttunementError(
                f"peft: PEFT's FRoD has one basis for all {_category(name)}, and here there are several"
            )
    methods = [part.method for part in parts.values()]
    fields = {"sparse_rate": "density", "projection_prng_key": "seed"}
    said = {theirs: one(ours, (getattr(method, ours) for method in methods)) for theirs, ours in fields.items()}
    return {**said, "save_projection": True, **_fan(parts)}


FROD = Format(
    kind="FROD",
    suffixes=("frod_lambda_l", "frod_lambda_s_values", "frod_V", "frod_s_indices", "frod_s_size"),
    fields=frozenset({"sparse_rate", "projection_prng_key", "save_projection", "regularization_alpha", "progressbar"}),
    layers=("Linear", "Conv1D"),
    read=_read_frod,
    write=_write_frod,
    config=_config_frod,
    tied=_tied_frod,
    category=_category,
)


# --- LoRA with factors that are frozen or shared: a file has both at every module ---


def _write_frozen(part: Part, values: Named) -> Named:
    B, _, A = part.method.factors(torch.empty(0), **part.values("factors"))  # type: ignore[attr-defined]
    return LORA.write(part, {"A": A.detach().clone(), "B": B.detach().clone()})  # a file has each where it is used


def _config_frozen(parts: Mapping[str, Part]) -> Config:
    words = ("rank", "alpha", "rank_stabilised", "dropout")
    plainly: dict[str, Any] = {}
    for name, part in parts.items():
        fields = {word: getattr(part.method, word) for word in words if hasattr(part.method, word)}
        plainly[name] = SimpleNamespace(method=LoRA(**fields), site=part.site)
    return LORA.config(plainly)


FROZEN = dataclasses.replace(LORA, write=_write_frozen, config=_config_frozen)
