"""PEFT's format of prompts, prefixes and LLaMA-Adapter, both ways: what has no place at a single matrix.

PEFT keeps what the prompt encoder made and not the encoder, so a checkpoint of P-tuning or CPT is a `Prompt` here. A
prefix in PEFT is a cache, which moves the text by its length: `Prefix(offset_positions=True)`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attunement.anatomy import Anatomy, Place, anatomy
from attunement.attention import AttentionSite, attention_site
from attunement.errors import AttunementError, nearest
from attunement.method import Method
from attunement.methods.prompts.cartridge import Cartridge
from attunement.methods.prompts.llama_adapter import LLaMAAdapter
from attunement.methods.prompts.multitask_prompt import MultitaskPrompt
from attunement.methods.prompts.p_tuning import PTuning
from attunement.methods.prompts.prefix import Prefix
from attunement.methods.prompts.prompt import Prompt, first_backbones
from attunement.methods.selective.train import Train

if TYPE_CHECKING:
    from attunement.adapter import Adapter
    from attunement.part import Part

MULTITASK = "MULTITASK_PROMPT_TUNING"
PROMPTS = ("PROMPT_TUNING", "P_TUNING", "CPT", MULTITASK, "PREFIX_TUNING", "CARTRIDGE", "ADAPTION_PROMPT")
Read = tuple[dict[Any, Method | None], dict[str, Tensor]]


def read(config: Mapping[str, Any], contents: Mapping[str, Tensor], model: nn.Module) -> Read:
    """A recipe for `adapt`, and tensors by the names that `Adapter.load_state` takes."""
    structure = anatomy(model)
    kind = config["peft_type"]
    if kind == "ADAPTION_PROMPT":
        recipe, tensors = _read_adaption(contents, structure)
    elif kind in ("PREFIX_TUNING", "CARTRIDGE"):
        recipe, tensors = _read_prefix(config, contents["prompt_embeddings"], structure)
    else:
        recipe, tensors = _read_prompt(config, contents, structure)
    heads: dict[str, None] = {}
    for key, value in contents.items():
        module, _, parameter = key.removeprefix("base_model.").rpartition(".")
        if not key.startswith("base_model.") or parameter in ("adaption_prompt", "adaption_gate"):
            continue
        module = module if module in structure.modules else module.removeprefix("model.")
        if module not in structure.modules:
            raise AttunementError(
                f"peft: this model has no module {module!r}, which the file trains{nearest(module, structure.modules)}"
            )
        heads[module] = None
        tensors[f"{module}.{parameter}.copy"] = value
    recipe |= {name: Train() for name in heads}
    if not heads and structure.task_heads:
        recipe["head"] = None
    return recipe, tensors


def _read_prompt(config: Mapping[str, Any], contents: Mapping[str, Tensor], structure: Anatomy) -> Read:
    place = _backbone(structure)
    if config.get("task_type") == "SEQ_CLS" and not _pools_inside(structure, place):
        raise AttunementError(
            f"peft: {type(structure.model).__name__} reads its first token outside of the backbone; with a prompt PEFT "
            "gives it a token of the prompt there, which stands in no output here"
        )
    count = int(config["num_virtual_tokens"])  # an encoder-decoder's file has as many again, which PEFT never reads
    key = f"{place.name}.tokens" if place.name else "tokens"
    tensors = {f"{key}.P": contents["prompt_embeddings"][:count]}
    if config["peft_type"] != MULTITASK:
        return {first_backbones: Prompt(count=count)}, tensors
    _one_stack(structure, "multitask prompt")
    U, V = contents["prefix_task_cols"], contents["prefix_task_rows"]  # (tasks, count, rank), (tasks, rank, width)
    method = MultitaskPrompt(count=count, tasks=U.shape[0], rank=U.shape[2])
    return {first_backbones: method}, {**tensors, f"{key}.U": U[:, :count], f"{key}.V": V}


def _backbone(structure: Anatomy) -> Place:
    found = next((place for place in structure.places if first_backbones(place)), None)
    if found is None:
        raise AttunementError(f"peft: {type(structure.model).__name__} has no backbone that takes a prompt")
    return found


def _pools_inside(structure: Anatomy, place: Place) -> bool:
    """Whether the token that stands for the text is chosen in the backbone, or is the last one."""
    return getattr(place.module, "pooler", None) is not None or not hasattr(structure.model, "classifier")


def _attentions(structure: Anatomy, role: str = "attention") -> list[AttentionSite]:
    places = [place for place in structure.places if place.role == role]
    made = [attention_site(structure, Prefix(), place) for place in places]
    return [site for site in made if isinstance(site, AttentionSite)]


def _one_stack(structure: Anatomy, what: str) -> None:
    if len(structure.stacks) > 1:
        raise AttunementError(
            f"peft: a {what} of an encoder-decoder stands in its decoder too in PEFT, which has no counterpart here"
        )


def _read_prefix(config: Mapping[str, Any], flat: Tensor, structure: Anatomy) -> Read:
    _one_stack(structure, "prefix")
    sites = _attentions(structure)
    count, tensors = flat.shape[0], dict[str, Tensor]()
    layers = int(config["num_layers"])
    if len(sites) != layers:
        raise AttunementError(f"peft: the prefix is for {layers} attentions, this model has {len(sites)}")
    each = flat.view(count, layers, 2, sites[0].key_heads, sites[0].width).permute(1, 2, 3, 0, 4)  # layer, k or v, head
    method = Prefix(count=count, offset_positions=True)
    if config["peft_type"] == "CARTRIDGE":
        method = Cartridge(count=count, frozen=config.get("num_frozen_tokens", 1))
    frozen = getattr(method, "frozen", 0)
    for site, pair in zip(sites, each, strict=True):
        for name, value in zip("KV", pair, strict=True):
            tensors[f"{site.key}.{name}"] = value[:, frozen:].contiguous()
            if isinstance(method, Cartridge):
                tensors[f"{site.key}.{name}0"] = value[:, :frozen].contiguous()
    return {"self_attention": method}, tensors


def _read_adaption(contents: Mapping[str, Tensor], structure: Anatomy) -> Read:
    sites = {site.name: site for site in _attentions(structure)}
    tensors, blocks, count = dict[str, Tensor](), list[int](), 1
    for key, value in contents.items():
        found = re.fullmatch(r"base_model\.model\.(.+)\.(adaption_prompt|adaption_gate)", key)
        if found is None:
            continue
        site = sites.get(found[1])
        if site is None or "c_attn" in site.made["query"].name:
            raise AttunementError(f"peft: {found[1]} is no attention that LLaMAAdapter can take as PEFT does")
        if found[2] == "adaption_prompt":
            tensors[f"{site.key}.P"], count = value[0], value.shape[1]
            blocks.append(site.layer)
        else:
            tensors[f"{site.key}.g"] = value.flatten()
    chosen = f"blocks[{','.join(map(str, blocks))}].self_attention"
    return {chosen: LLaMAAdapter(count=count, gate="layer", tanh=False)}, tensors


# --- writing ---


def write(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Configuration and tensors in PEFT's format, or None where the adapter has no method of this kind.

    Raises:
        AttunementError: for what PEFT cannot express: other methods beside it, a prefix that keeps positions, gates for
            each head.
    """
    kinds = (Prompt, PTuning, MultitaskPrompt, Prefix, LLaMAAdapter)
    parts = [part for part in adapter.parts if isinstance(part.method, kinds)]
    if not parts:
        return None
    others = [p for p in adapter.parts if p not in parts and p.method.acts_on != "parameter"]
    if partly := next((p for p in adapter.parts if isinstance(p.method, Train) and p.method.rows is not None), None):
        raise AttunementError(f"peft: {partly.site.key} is trained in some rows, which PEFT has beside LoRA or alone")
    if others or len({part.method for part in parts}) > 1:
        other = type((others or parts[1:])[0].method).__name__
        raise AttunementError(f"peft: {type(parts[0].method).__name__} stands alone in PEFT's format; got {other} too")
    method: Any = parts[0].method
    config: dict[str, Any] = {"task_type": _task(adapter.model), "inference_mode": True}
    if isinstance(method, LLaMAAdapter):
        made = _write_adaption(parts, config)
    elif isinstance(method, Prefix):
        made = _write_prefix(parts, config)
    else:
        if isinstance(method, MultitaskPrompt):
            _one_stack(anatomy(adapter.model), "multitask prompt")
            encoder, words = MULTITASK, {"prompt_embeddings": "P", "prefix_task_cols": "U", "prefix_task_rows": "V"}
            made = {theirs: parts[0].tensor(ours) for theirs, ours in words.items()}
            config |= {"num_tasks": method.tasks, "num_ranks": method.rank}
        else:
            encoder = "P_TUNING" if isinstance(method, PTuning) else "PROMPT_TUNING"
            made = {"prompt_embeddings": parts[0].made().detach()}  # type: ignore[attr-defined]
        config |= {"peft_type": encoder, "num_virtual_tokens": method.count, "token_dim": parts[0].site.inputs}
        config |= {"num_transformer_submodules": 1, "num_layers": None, "num_attention_heads": None}
    prefix = "base_model.model" if isinstance(method, LLaMAAdapter) else "base_model"
    for part in adapter.parts:
        if part.method.acts_on == "parameter":
            made[f"{prefix}.{part.site.name}.{part.site.parameter}"] = part.tensor("copy")
    return config, made


def _task(model: nn.Module) -> str | None:
    name = type(model).__name__
    ends = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS"}
    ends |= {"ForConditionalGeneration": "SEQ_2_SEQ_LM", "ForTokenClassification": "TOKEN_CLS"}
    return next((task for end, task in ends.items() if name.endswith(end)), None)


def _write_prefix(parts: list[Part], config: dict[str, Any]) -> dict[str, Tensor]:
    method: Any = parts[0].method
    site: Any = parts[0].site
    if not method.offset_positions:
        raise AttunementError(
            "peft: a prefix in PEFT moves the text by its length, and this one does not; make it with "
            f"{type(method).__name__}(offset_positions=True)"
        )
    if len(parts) != site.layers:
        raise AttunementError(f"peft: a prefix in PEFT is in all of {site.layers} layers, this one in {len(parts)}")
    config |= {"num_virtual_tokens": method.count, "num_layers": len(parts), "num_transformer_submodules": 1}
    config |= {"token_dim": site.key_heads * site.width, "num_attention_heads": site.key_heads}
    if isinstance(method, Cartridge):
        config |= {"peft_type": "CARTRIDGE", "num_frozen_tokens": method.frozen}
        pairs = [[torch.cat((part.tensor(f"{name}0"), part.tensor(name)), dim=1) for name in "KV"] for part in parts]
    else:
        config |= {"peft_type": "PREFIX_TUNING", "prefix_projection": False, "encoder_hidden_size": None}
        pairs = [[part.tensor(name) for name in "KV"] for part in parts]
    each = torch.stack([torch.stack(pair) for pair in pairs])
    return {"prompt_embeddings": each.permute(3, 0, 1, 2, 4).reshape(method.count, -1)}  # (count, layers 2 heads width)


def _write_adaption(parts: list[Part], config: dict[str, Any]) -> dict[str, Tensor]:
    method: Any = parts[0].method
    if method.gate != "layer" or method.tanh:
        raise AttunementError(
            "peft: PEFT has one plain gate a layer; make it with LLaMAAdapter(gate='layer', tanh=False)"
        )
    sites: list[Any] = [part.site for part in parts]
    if [site.layer for site in sites] != list(range(sites[0].layers - len(sites), sites[0].layers)):
        raise AttunementError("peft: PEFT adapts the last layers, without a gap")
    config |= {"peft_type": "ADAPTION_PROMPT", "adapter_len": method.count, "adapter_layers": len(parts)}
    config |= {"target_modules": sites[0].name.rpartition(".")[2]}
    made = {}
    for part in parts:
        made[f"base_model.model.{part.site.name}.adaption_prompt"] = part.tensor("P")[None]
        made[f"base_model.model.{part.site.name}.adaption_gate"] = part.tensor("g")
    return made
