"""PEFT's format against the `peft` package itself: what one side writes, the other reads with the same outputs."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import attunement as at
from attunement import peft as format

peft = pytest.importorskip("peft", reason="the peft package is what this format is proven against")
pytestmark = pytest.mark.filterwarnings("ignore")
KasaConfig = peft.tuners.lora.config.KasaConfig
TOLERANCE = 2e-6


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, stride=2)
        self.linear = nn.Linear(8, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(self.second(self.norm(self.first(images)).relu()).relu().mean((2, 3)))


def bert() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(vocab_size=64, max_position_embeddings=32, num_labels=3, **sizes))


def masked() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForMaskedLM(BertConfig(vocab_size=64, **sizes))


def llama(tied: bool = False) -> nn.Module:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=tied, **sizes, **heads))


def gpt2() -> nn.Module:
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32, **tokens))


def vit() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes))


BASES = {
    "bert": bert,
    "masked": masked,
    "llama": llama,
    "tied": lambda: llama(tied=True),
    "gpt2": gpt2,
    "conv": Convolutional,
    "vit": vit,
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = BASES[name]()
    with torch.no_grad():  # biases and norms that are not all zero and one
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def output(model: nn.Module, name: str) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        if name == "conv":
            return model(torch.randn(2, 3, 8, 8))
        if name == "vit":
            return model(pixel_values=torch.randn(2, 3, 8, 8)).logits
        return model(input_ids=torch.randint(3, 64, (2, 7)), attention_mask=torch.ones(2, 7, dtype=torch.long)).logits


def disturb(parameters: object) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in parameters:  # type: ignore[attr-defined]
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


# --- what PEFT writes, read here ---

FROM_PEFT = {
    "lora": ("bert", lambda: peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])),
    "lora-patterns": (
        "bert",
        lambda: peft.LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=["query", "output.dense"],
            rank_pattern={"layer.0.attention.self.query": 2},
            alpha_pattern={"query": 3},
        ),
    ),
    "lora-rank-stabilised": ("llama", lambda: peft.LoraConfig(r=4, use_rslora=True, target_modules="all-linear")),
    "lora-conv1d-embedding": (
        "gpt2",
        lambda: peft.LoraConfig(r=4, target_modules=["c_attn", "mlp.c_proj", "wte"], fan_in_fan_out=True),
    ),
    "lora-larger-than-the-matrix": (
        "llama",
        lambda: peft.LoraConfig(r=12, lora_alpha=5, target_modules=["k_proj", "v_proj"], use_rslora=True),
    ),
    "dora-larger-than-the-matrix": ("conv", lambda: peft.LoraConfig(r=6, use_dora=True, target_modules=["linear"])),
    "lora-convolution": (
        "conv",
        lambda: peft.LoraConfig(r=3, target_modules=["second"], modules_to_save=["linear"]),
    ),
    "lora-saved-embeddings": ("llama", lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])),
    "lora-biases": ("bert", lambda: peft.LoraConfig(r=4, target_modules=["query"], bias="lora_only")),
    "lora-all-biases": ("bert", lambda: peft.LoraConfig(r=4, target_modules=["query"], bias="all")),
    "lora-all-biases-and-a-head": (
        "bert",
        lambda: peft.LoraConfig(r=4, target_modules=["query"], bias="all", task_type="SEQ_CLS"),
    ),
    "lora-tied-embedding": (
        "tied",
        lambda: peft.LoraConfig(
            r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
        ),
    ),
    "lora-tied-head": (
        "gpt2",
        lambda: peft.LoraConfig(
            r=4, target_modules=["c_attn"], modules_to_save=["lm_head"], ensure_weight_tying=True, fan_in_fan_out=True
        ),
    ),
    "lora-on-what-is-tied": (
        "tied",
        lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
    ),
    "lora-head": (
        "llama",
        lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]),
    ),
    "dora": ("llama", lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "down_proj"])),
    "dora-conv1d-embedding": (
        "gpt2",
        lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=["c_attn", "wte"], fan_in_fan_out=True),
    ),
    "dora-convolution": ("conv", lambda: peft.LoraConfig(r=3, use_dora=True, target_modules=["second", "linear"])),
    "vera": ("llama", lambda: peft.VeraConfig(r=5, target_modules=["q_proj", "v_proj", "down_proj"])),
    "vera-regenerated": (
        "gpt2",
        lambda: peft.VeraConfig(
            r=5, target_modules=["c_attn"], save_projection=False, projection_prng_key=7, fan_in_fan_out=True
        ),
    ),
    "ia3": (
        "bert",
        lambda: peft.IA3Config(
            task_type="SEQ_CLS", target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]
        ),
    ),
    "ia3-conv1d": (
        "gpt2",
        lambda: peft.IA3Config(
            target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True
        ),
    ),
    "ia3-convolution": ("conv", lambda: peft.IA3Config(target_modules=["second"], feedforward_modules=[])),
    "hra": ("llama", lambda: peft.HRAConfig(r=4, target_modules=["q_proj", "v_proj"])),
    "hra-orthogonal": ("bert", lambda: peft.HRAConfig(r=4, apply_GS=True, target_modules=["query"])),
    "hra-convolution": ("conv", lambda: peft.HRAConfig(r=4, target_modules=["second"])),
    "oft": ("llama", lambda: peft.OFTConfig(oft_block_size=4, target_modules=["q_proj", "down_proj"])),
    "oft-exact": (
        "bert",
        lambda: peft.OFTConfig(
            task_type="SEQ_CLS",
            oft_block_size=0,
            r=2,
            use_cayley_neumann=False,
            target_modules=["query", "output.dense"],
        ),
    ),
    "oft-three-terms": (
        "llama",
        lambda: peft.OFTConfig(oft_block_size=5, num_cayley_neumann_terms=3, target_modules=["q_proj", "up_proj"]),
    ),
    "oft-constrained": (
        "llama",
        lambda: peft.OFTConfig(oft_block_size=4, coft=True, eps=0.5, block_share=True, target_modules=["v_proj"]),
    ),
    "boft": ("llama", lambda: peft.BOFTConfig(target_modules=["q_proj", "down_proj"])),
    "boft-blocks": (
        "bert",
        lambda: peft.BOFTConfig(boft_block_size=0, boft_block_num=2, boft_dropout=0.1, target_modules=["query"]),
    ),
    "boft-convolution": ("conv", lambda: peft.BOFTConfig(boft_block_size=6, target_modules=["second"])),
    "osf": ("llama", lambda: peft.OSFConfig(target_modules=["q_proj", "k_proj", "down_proj"])),
    "osf-ranks": (
        "bert",
        lambda: peft.OSFConfig(
            effective_rank=0.3, rank_pattern={"layer.1.*query": 12}, target_modules=["query", "output.dense"]
        ),
    ),
    "shira": ("llama", lambda: peft.ShiraConfig(r=2, target_modules=["q_proj", "k_proj"])),
    "shira-seed": ("bert", lambda: peft.ShiraConfig(r=3, random_seed=5, target_modules=["value", "output.dense"])),
    "loha": ("llama", lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=["q_proj", "down_proj"])),
    "loha-patterns": (
        "bert",
        lambda: peft.LoHaConfig(
            r=4,
            target_modules=["query", "value"],
            rank_pattern={"layer.0.attention.self.query": 2},
            alpha_pattern={"query": 3},
            module_dropout=0.1,
        ),
    ),
    "loha-convolution": ("conv", lambda: peft.LoHaConfig(r=3, target_modules=["second"])),
    "lokr": ("llama", lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=["q_proj", "k_proj", "down_proj"])),
    "lokr-both": (
        "llama",
        lambda: peft.LoKrConfig(r=1, decompose_both=True, decompose_factor=8, target_modules=["q_proj", "up_proj"]),
    ),
    "lokr-full": ("bert", lambda: peft.LoKrConfig(r=8, decompose_factor=3, target_modules=["value"])),
    "hira": ("llama", lambda: peft.HiraConfig(r=3, target_modules=["q_proj", "v_proj"])),
    "hira-conv1d": ("gpt2", lambda: peft.HiraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True)),
    "miss": ("llama", lambda: peft.MissConfig(r=5, target_modules=["q_proj", "down_proj"])),
    "miss-mini": ("llama", lambda: peft.MissConfig(r=4, mini_r=8, init_weights="mini", target_modules=["q_proj"])),
    "miss-bat": ("llama", lambda: peft.MissConfig(r=4, init_weights="bat", target_modules=["q_proj", "down_proj"])),
    "delora": (
        "llama",
        lambda: peft.DeloraConfig(
            r=3, delora_lambda=4, target_modules=["q_proj", "v_proj"], lambda_pattern={"v_proj": 7}
        ),
    ),
    "vb-lora": (
        "llama",
        lambda: peft.VBLoRAConfig(r=3, num_vectors=9, vector_length=4, topk=3, target_modules=["q_proj", "down_proj"]),
    ),
    "vb-lora-conv1d": (
        "gpt2",
        lambda: peft.VBLoRAConfig(r=2, num_vectors=5, vector_length=8, target_modules=["c_attn"], fan_in_fan_out=True),
    ),
    "randlora": (
        "llama",
        lambda: peft.RandLoraConfig(r=3, randlora_alpha=5, target_modules=["q_proj", "k_proj", "down_proj", "up_proj"]),
    ),
    "randlora-sparse": (
        "gpt2",
        lambda: peft.RandLoraConfig(r=4, randlora_alpha=8, sparse=True, target_modules=["c_attn"], fan_in_fan_out=True),
    ),
    "fourierft": (
        "llama",
        lambda: peft.FourierFTConfig(
            n_frequency=40, target_modules=["q_proj", "down_proj"], n_frequency_pattern={"q_proj": 30}
        ),
    ),
    "fourierft-conv1d": (
        "gpt2",
        lambda: peft.FourierFTConfig(
            n_frequency=40, scaling=300.0, random_loc_seed=3, target_modules=["c_attn"], fan_in_fan_out=True
        ),
    ),
    "c3a": (
        "llama",
        lambda: peft.C3AConfig(
            block_size=8, target_modules=["q_proj", "down_proj"], block_size_pattern={"down_proj": 4}
        ),
    ),
    "waveft": (
        "llama",
        lambda: peft.WaveFTConfig(n_frequency=60, scaling=9.0, target_modules=["q_proj", "down_proj"]),
    ),
    "waveft-proportional": (
        "bert",
        lambda: peft.WaveFTConfig(
            n_frequency=60,
            proportional_parameters=True,
            random_loc_seed=5,
            target_modules=["query", "intermediate.dense"],
        ),
    ),
    "gralora": ("llama", lambda: peft.GraloraConfig(r=4, alpha=6, target_modules=["q_proj", "down_proj"])),
    "gralora-hybrid": (
        "gpt2",
        lambda: peft.GraloraConfig(
            r=8, alpha=8, gralora_k=4, hybrid_r=2, target_modules=["c_attn"], fan_in_fan_out=True
        ),
    ),
    "road-1": ("bert", lambda: peft.RoadConfig(group_size=8, target_modules=["query", "intermediate.dense"])),
    "road-2": ("bert", lambda: peft.RoadConfig(group_size=4, variant="road_2", target_modules=["query"])),
    "road-4": ("llama", lambda: peft.RoadConfig(group_size=8, variant="road_4", target_modules=["down_proj"])),
    "tinylora": (
        "llama",
        lambda: peft.TinyLoraConfig(r=2, u=5, weight_tying=0.4, target_modules=["q_proj", "v_proj", "down_proj"]),
    ),
    "tinylora-seed": (
        "gpt2",
        lambda: peft.TinyLoraConfig(
            r=3, u=4, projection_seed=1, save_projection=False, target_modules=["c_attn"], fan_in_fan_out=True
        ),
    ),
    "unilora": (
        "llama",
        lambda: peft.UniLoraConfig(r=2, theta_d_length=50, target_modules=["v_proj", "q_proj", "down_proj"]),
    ),
    "unilora-stored": (
        "gpt2",
        lambda: peft.UniLoraConfig(
            r=3, theta_d_length=33, save_indices=True, proj_seed=3, target_modules=["c_attn"], fan_in_fan_out=True
        ),
    ),
    "pvera": ("llama", lambda: peft.PveraConfig(r=5, target_modules=["q_proj", "v_proj", "down_proj"])),
    "pvera-regenerated": (
        "bert",
        lambda: peft.PveraConfig(r=5, target_modules=["query"], save_projection=False, projection_prng_key=7),
    ),
    "adamss": ("bert", lambda: peft.AdamssConfig(r=6, target_modules=["query", "intermediate.dense"])),
    "adamss-ranks": (
        "llama",
        lambda: peft.AdamssConfig(
            r=100, num_subspaces=3, subspace_rank=3, random_seed=2, target_modules=["q_proj", "v_proj"]
        ),
    ),
    "pissa": (
        "llama",
        lambda: peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights="pissa", target_modules=["q_proj", "down_proj"]),
    ),
    "pissa-conv1d": (
        "gpt2",
        lambda: peft.LoraConfig(r=3, init_lora_weights="pissa", target_modules=["c_attn"], fan_in_fan_out=True),
    ),
    "olora": (
        "bert",
        lambda: peft.LoraConfig(r=3, init_lora_weights="olora", use_rslora=True, target_modules=["query", "dense"]),
    ),
    "kasa": (
        "llama",
        lambda: peft.LoraConfig(r=3, kasa_config=KasaConfig(beta=0.5), target_modules=["q_proj", "k_proj", "up_proj"]),
    ),
    "psoft": ("llama", lambda: peft.PsoftConfig(r=4, target_modules=["q_proj", "k_proj", "down_proj"])),
    "psoft-series": (
        "bert",
        lambda: peft.PsoftConfig(
            r=5,
            use_cayley_neumann=True,
            num_cayley_neumann_terms=3,
            psoft_mag_a=False,
            psoft_mag_b=False,
            target_modules=["query"],
        ),
    ),
    "glora": ("bert", lambda: peft.GloraConfig(r=3, target_modules=["query", "output.dense"])),
    "glora-vectors": (
        "bert",
        lambda: peft.GloraConfig(
            config_A_B="vector", config_C="vector", config_D_E="vector", target_modules=["query", "output.dense"]
        ),
    ),
    "glora-without-biases": (
        "llama",
        lambda: peft.GloraConfig(config_A_B="constant", target_modules=["q_proj", "down_proj"]),
    ),
    "peanut": ("llama", lambda: peft.PeanutConfig(r=3, target_modules=["q_proj", "down_proj"])),
    "peanut-deep": (
        "bert",
        lambda: peft.PeanutConfig(r=4, depth=2, act_fn="gelu", scaling=0.5, target_modules=["query", "value"]),
    ),
    "lily": (
        "llama",
        lambda: peft.LilyConfig(r=4, stride_A=2, num_B=3, scaling=0.7, target_modules=["q_proj", "v_proj"]),
    ),
    "frod": ("llama", lambda: peft.FrodConfig(sparse_rate=0.05, target_modules=["q_proj", "v_proj", "down_proj"])),
    "frod-conv1d": ("gpt2", lambda: peft.FrodConfig(target_modules=["c_attn"], fan_in_fan_out=True)),
    "beft": ("llama", lambda: peft.BeftConfig(target_modules=["v_proj"])),
    "beft-biases": ("bert", lambda: peft.BeftConfig(target_modules=["query", "value"])),
    "deft": ("llama", lambda: peft.DeftConfig(r=3, target_modules=["q_proj", "k_proj", "down_proj"])),
    "deft-qr": (
        "bert",
        lambda: peft.DeftConfig(r=3, decomposition_method="qr", alpha=5, target_modules=["query", "output.dense"]),
    ),
    "deft-random": (
        "llama",
        lambda: peft.DeftConfig(r=3, init_weights=False, init_scale=2.0, target_modules=["q_proj"]),
    ),
    "deft-para": ("llama", lambda: peft.DeftConfig(r=3, para=True, target_modules=["q_proj", "up_proj"])),
    "deft-para-qr-conv1d": (
        "gpt2",
        lambda: peft.DeftConfig(
            r=3, para=True, decomposition_method="qr", target_modules=["c_attn"], fan_in_fan_out=True
        ),
    ),
    "super": ("llama", lambda: peft.SupertuningConfig(sparsity=0.9, target_modules=["q_proj", "k_proj"])),
    "super-smallest": (
        "bert",
        lambda: peft.SupertuningConfig(
            sparsity=0.93, select_top=False, save_precomputed_indices=False, target_modules=["query", "output.dense"]
        ),
    ),
    "supra": ("llama", lambda: peft.SupertuningConfig(sparsity=0.95, r=3, lora_alpha=5, target_modules=["q_proj"])),
    "tokens": ("llama", lambda: peft.TrainableTokensConfig(token_indices=[43, 3, 18])),
    "tokens-tied": ("gpt2", lambda: peft.TrainableTokensConfig(token_indices=[43, 3, 18], target_modules=["wte"])),
    "tokens-beside-lora": (
        "llama",
        lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [43, 5, 18]}),
    ),
    "tokens-beside-lora-tied": (
        "gpt2",
        lambda: peft.LoraConfig(r=2, target_modules=["c_attn"], trainable_token_indices=[43, 18], fan_in_fan_out=True),
    ),
    "norms": ("bert", lambda: peft.LNTuningConfig(task_type="SEQ_CLS", target_modules=["LayerNorm"])),
    "norms-llama": ("llama", lambda: peft.LNTuningConfig(target_modules="all-linear|.*norm")),
}


@pytest.mark.parametrize("case", FROM_PEFT)
def test_reads_what_peft_writes(case: str, tmp_path: Path) -> None:
    name, config = FROM_PEFT[case]
    base = made(name)
    theirs = peft.get_peft_model(copy.deepcopy(base), config()).eval()
    disturb(parameter for parameter in theirs.parameters() if parameter.requires_grad)
    theirs.save_pretrained(tmp_path)
    before, expected = output(base, name), output(theirs, name)
    keys = set(base.state_dict())

    adapter = at.load(base, tmp_path, "theirs")

    torch.testing.assert_close(output(base, name), expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert (expected - before).abs().max() > 1e-3
    assert not adapter.trainable
    adapter.detach()
    assert set(base.state_dict()) == keys
    assert torch.equal(output(base, name), before)


# --- what is written here, read by PEFT ---

TO_PEFT = {
    "lora": ("bert", {"attention.{query,value}": at.LoRA(rank=4, alpha=6)}),
    "lora-ranks": (
        "llama",
        {
            "blocks[0].attention.{query,value}": at.LoRA(rank=4, alpha=6),
            "blocks[1].attention.{query,value}": at.LoRA(rank=2, rank_stabilised=True),
            "mlp.down": at.LoRA(rank=2, alpha=5.5),
        },
    ),
    "lora-conv1d-embedding": (
        "gpt2",
        {"attention.qkv": at.LoRA(rank=4), "mlp.down": at.LoRA(rank=4), "embedding": at.LoRA(rank=4)},
    ),
    "lora-convolution": ("conv", {"second": at.LoRA(rank=3), "head": at.Train(), "norm": at.Train()}),
    "dora": ("llama", {"attention.query|mlp.down": at.DoRA(rank=4, alpha=8)}),
    "dora-conv1d-embedding": ("gpt2", {"attention.qkv|embedding": at.DoRA(rank=4)}),
    "dora-convolution": ("conv", {"second": at.DoRA(rank=3), "head": at.DoRA(rank=3)}),
    "vera": ("llama", {"attention.{query,value}": at.VeRA(rank=5, seed=3)}),
    "vera-stored": ("bert", {"attention.{query,value}|mlp.up": at.VeRA(rank=5, stored=True)}),
    "ia3": ("bert", {"attention.{key,value}|mlp.down": at.IA3()}),
    "ia3-conv1d": ("gpt2", {"attention.qkv|mlp.down": at.IA3()}),
    "ia3-convolution": ("conv", {"second": at.IA3()}),
    "hra": ("llama", {"attention.{query,value}": at.HRA(rank=4)}),
    "hra-convolution": ("conv", {"second": at.HRA(rank=4)}),
    "oft": ("llama", {"attention.{query,value}|mlp.down": at.OFT(block_size=8, terms=6)}),
    "oft-exact": ("bert", {"attention.query": at.OFT(block_size=4)}),
    "oft-constrained": ("bert", {"mlp": at.OFT(block_size=4, constraint=0.3, shared_block=True)}),
    "boft": ("bert", {"attention|mlp": at.BOFT(block_size=4, levels=1)}),
    "boft-convolution": ("conv", {"second": at.BOFT(block_size=8, levels=1)}),
    "osf": ("llama", {"attention|mlp": at.OSF()}),
    "osf-ranks": ("llama", {"attention.query": at.OSF(frozen=3), "attention.value|mlp.up": at.OSF(frozen=0.4)}),
    "shira": ("llama", {"attention.{query,value}": at.Sparse(lora_rank=2)}),
    "shira-magnitude": ("bert", {"mlp": at.Sparse(lora_rank=4, choice="magnitude")}),
    "loha": ("llama", {"attention.query": at.LoHa(rank=3, alpha=5), "mlp": at.LoHa(rank=2)}),
    "loha-convolution": ("conv", {"second": at.LoHa(rank=3)}),
    "lokr": ("llama", {"attention.{query,key}": at.LoKr(rank=2), "mlp": at.LoKr(rank=3, alpha=4)}),
    "lokr-both": ("bert", {"mlp": at.LoKr(rank=1, factor=8, both=True)}),
    "hira": ("bert", {"attention.query|mlp": at.HiRA(rank=3)}),
    "hira-conv1d": ("gpt2", {"attention.qkv": at.HiRA(rank=3)}),
    "miss": ("llama", {"attention.{query,output}|mlp": at.MiSS(rank=6)}),
    "miss-mini": ("llama", {"mlp": at.MiSS(rank=6, shared_rows=4)}),
    "bone": ("llama", {"attention|mlp": at.Bone(block_size=8)}),
    "delora": ("llama", {"attention.query": at.DeLoRA(rank=3), "mlp": at.DeLoRA(rank=2, strength=3)}),
    "vb-lora": ("bert", {"attention.{query,value}": at.VBLoRA(rank=3, vectors=12, vector_length=4, topk=4)}),
    "randlora": ("llama", {"attention.{query,value}|mlp": at.RandLoRA(rank=3, scale=2.0)}),
    "fourierft": ("bert", {"attention.query": at.FourierFT(frequencies=30), "mlp": at.FourierFT(frequencies=50)}),
    "fourierft-conv1d": ("gpt2", {"attention.qkv": at.FourierFT(frequencies=60, scale=200, seed=1)}),
    "c3a": ("llama", {"attention.query": at.C3A(block_size=8), "mlp": at.C3A(block_size=4)}),
    "waveft": ("llama", {"attention.query": at.WaveFT(frequencies=30), "mlp": at.WaveFT(frequencies=50)}),
    "gralora": ("bert", {"attention.query|mlp": at.GraLoRA(rank=4, tiles=4, hybrid_rank=3, alpha=5)}),
    "road": ("bert", {"attention.{query,value}|mlp": at.RoAd(group_size=8, variant=4)}),
    "tinylora": ("llama", {"attention.{query,value}|mlp": at.TinyLoRA(size=6, tying=0.5)}),
    "unilora": ("llama", {"attention.{query,value}|mlp": at.UniLoRA(length=70, rank=3, seed=5)}),
    "pvera": ("bert", {"attention.{query,value}|mlp": at.PVeRA(rank=6, seed=3, stored=True)}),
    "pvera-regenerated": ("gpt2", {"attention.qkv": at.PVeRA(rank=6)}),
    "adamss": ("bert", {"attention.query|mlp": at.AdaMSS(rank=7, subspaces=4)}),
    "kasa": ("llama", {"attention.query": at.KaSA(rank=3), "attention.value|mlp": at.KaSA(rank=2, alpha=3)}),
    "psoft": ("llama", {"attention.{query,key}|mlp": at.PSOFT(rank=4, exact=True)}),
    "psoft-series": ("bert", {"attention.query": at.PSOFT(rank=3, terms=6, magnitudes=False, exact=True)}),
    "glora": ("bert", {"attention.{query,value}|mlp": at.GLoRA(rank=3)}),
    "glora-vectors": ("bert", {"mlp": at.GLoRA(weights="vector", coupling="none", shifts="vector")}),
    "glora-bias-alone": ("bert", {"mlp": at.GLoRA(weights="none", coupling="vector", shifts="none")}),
    "peanut": ("llama", {"attention.{query,key}|mlp": at.PEANuT(rank=3, scale=0.5)}),
    "peanut-deep": ("bert", {"attention.query": at.PEANuT(rank=3, depth=2, activation="silu")}),
    "lily": ("bert", {"attention.{query,value}": at.Lily(rank=5, experts=3, scaling=2.0)}),
    "beft": ("llama", {"attention.value": at.BEFT()}),
    "deft": ("llama", {"attention.{query,key}|mlp": at.DEFT(rank=3, alpha=5)}),
    "deft-qr": ("gpt2", {"attention.qkv": at.DEFT(rank=3, decomposition="qr")}),
    "deft-para": ("bert", {"attention.query": at.DEFT(rank=3, decomposition="qr", para=True)}),
    "super": ("llama", {"attention.{query,key}|mlp": at.SuperTuning(density=0.1)}),
    "supra": ("bert", {"attention.query": at.SuperTuning(density=0.07, largest=False, rank=2)}),
    "tokens": ("llama", {"embedding": at.Train(rows=(43, 3, -2))}),
    "tokens-tied": ("gpt2", {"transformer.wte": at.Train(rows=(43, 3, -2))}),
    "tokens-beside-lora": ("llama", {**at.recipes.new_tokens(4), "attention.query": at.LoRA(rank=2)}),
    "tokens-beside-lora-tied": ("gpt2", {"transformer.wte": at.Train(rows=(43, 18)), "attention.qkv": at.LoRA(rank=2)}),
    "norms": ("bert", {"norm": at.Train()}),
    "lora-tied-embedding": ("tied", {"attention.query": at.LoRA(rank=2), "embedding": at.Train()}),
    "lora-tied-head": ("gpt2", {"attention.qkv": at.LoRA(rank=2), "lm_head": at.Train()}),
    "hra-tied-embedding": ("tied", {"attention.query": at.HRA(rank=2), "embedding": at.Train()}),
    "norms-tied-head": ("tied", {"norm": at.Train(), "lm_head": at.Train()}),
    "lora-a-module-with-others-inside": ("vit", {"attention.query": at.LoRA(rank=2), "vit.embeddings": at.Train()}),
}


def written(name: str, recipe: dict[str, at.Method], path: Path) -> tuple[at.Adapter, torch.Tensor, nn.Module]:
    """An adapter moved away from its start and saved for PEFT, its output, and PEFT's model with that file."""
    base = made(name)
    ours = copy.deepcopy(base)
    adapter = at.adapt(ours, recipe)
    disturb(adapter.parameters())
    expected = output(ours, name)
    assert (expected - output(base, name)).abs().max() > 1e-3
    adapter.save(path, format="peft")
    return adapter, expected, peft.PeftModel.from_pretrained(base, path).eval()


@pytest.mark.parametrize("case", TO_PEFT)
def test_peft_reads_what_is_written_here(case: str, tmp_path: Path) -> None:
    name, recipe = TO_PEFT[case]
    adapter, expected, theirs = written(name, recipe, tmp_path / "out")
    torch.testing.assert_close(output(theirs, name), expected, atol=TOLERANCE, rtol=TOLERANCE)
    base = made(name)
    again = at.load(base, tmp_path / "out")
    torch.testing.assert_close(output(base, name), expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert again.count() == adapter.count()


PAIR = "attention.{query,value}"
AS_LORA = [  # and the largest difference, where a product is taken off that was put on
    ("llama", {"attention.{query,key}": at.PiSSA(rank=3), "mlp": at.PiSSA(rank=2, alpha=3)}, 1e-5),
    ("gpt2", {"attention.qkv": at.PiSSA(rank=4, rank_stabilised=True)}, 1e-5),
    ("llama", {"attention.query|mlp": at.OLoRA(rank=3, alpha=6)}, 1e-5),
    ("llama", {PAIR: at.LoRAFA(rank=3, alpha=6, rank_stabilised=True)}, TOLERANCE),
    ("llama", {PAIR: at.ShareLoRA(rank=3, share="both")}, TOLERANCE),
    ("llama", {PAIR: at.ASLoRA(rank=3, alpha=5)}, TOLERANCE),
    ("llama", {PAIR: at.OrthogonalAdaptation(rank=3, number=1)}, TOLERANCE),
]


@pytest.mark.parametrize(("name", "recipe", "bound"), AS_LORA, ids=repr)
def test_what_is_a_lora_in_the_end_is_one_to_peft(
    name: str, recipe: dict[str, at.Method], bound: float, tmp_path: Path
) -> None:
    adapter, expected, theirs = written(name, recipe, tmp_path / "out")
    torch.testing.assert_close(output(theirs, name), expected, atol=bound, rtol=bound)
    base = made(name)
    again = at.load(base, tmp_path / "out")
    assert {type(part.method) for part in again.parts} == {at.LoRA}
    torch.testing.assert_close(output(base, name), expected, atol=bound, rtol=bound)
    if bound > TOLERANCE:  # what started from the weight is one of twice the rank
        assert again.count() == 2 * adapter.count()


@pytest.mark.parametrize("ensured", [True, False], ids=["lora", "ia3"])
def test_what_is_tied_here_is_tied_for_peft_where_it_can(ensured: bool, tmp_path: Path) -> None:
    recipe = {"attention.query": at.LoRA(rank=2) if ensured else at.IA3(), "embedding": at.Train()}
    _, _, theirs = written("tied", recipe, tmp_path / "out")
    embedding, head = theirs.get_input_embeddings(), theirs.get_output_embeddings()
    assert (embedding.weight is head.weight) == ensured
    assert torch.equal(embedding.weight, head.weight)


APART = {
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "head": {"modules_to_save": ["lm_head"]},
    "each": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "rows": {"trainable_token_indices": {"lm_head": [7, 8]}},
    "other-rows": {"trainable_token_indices": {"embed_tokens": [7, 8], "lm_head": [3, 4]}},
}


@pytest.mark.parametrize("case", APART)
def test_what_peft_trains_apart_of_a_tied_pair_needs_an_untied_base(case: str, tmp_path: Path) -> None:
    base = made("tied")
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["q_proj"], **APART[case]))
    disturb(parameter for parameter in theirs.parameters() if parameter.requires_grad)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(at.AttunementError, match=r"apart from .* to which this model ties it; untie them first"):
        at.load(base, tmp_path)
    assert at.adapters(base) == {}
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone())
    at.load(base, tmp_path)
    torch.testing.assert_close(output(base, "tied"), output(theirs.eval(), "tied"), atol=TOLERANCE, rtol=TOLERANCE)


TASKS = torch.tensor([2, 0])


def output_of_tasks(model: nn.Module, **given: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return model(input_ids=torch.randint(3, 64, (2, 7)), **given).logits


def test_poly_both_ways_with_a_task_for_each_row(tmp_path: Path) -> None:
    base = made("llama")
    config = peft.PolyConfig(r=3, n_tasks=3, n_skills=4, n_splits=2, target_modules=["q_proj", "k_proj", "down_proj"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    disturb(parameter for parameter in theirs.parameters() if parameter.requires_grad)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = output_of_tasks(theirs.base_model, task_ids=TASKS)
    assert (expected - output_of_tasks(theirs.base_model, task_ids=TASKS.flip(0))).abs().max() > 1e-3
    adapter = at.load(base, tmp_path / "theirs")
    adapter.give(task=TASKS)
    torch.testing.assert_close(output_of_tasks(base), expected, atol=TOLERANCE, rtol=TOLERANCE)

    ours = made("bert")
    adapter = at.adapt(ours, {"attention.query|mlp": at.Poly(tasks=3, rank=2, skills=3, splits=4, alpha=5.0)})
    disturb(adapter.parameters())
    adapter.give(task=TASKS)
    expected = output_of_tasks(ours.eval())
    adapter.save(tmp_path / "ours", format="peft")
    again = peft.PeftModel.from_pretrained(made("bert"), tmp_path / "ours").eval()
    torch.testing.assert_close(
        output_of_tasks(again.base_model, task_ids=TASKS), expected, atol=TOLERANCE, rtol=TOLERANCE
    )


def test_peft_reads_frod_where_it_has_u_for_the_v_of_the_file(tmp_path: Path) -> None:
    # it finds U from the base and a V that it finds again, in which a last bit can turn directions
    _, expected, theirs = written("bert", {"attention.{query,value}|mlp": at.FRoD(density=0.1)}, tmp_path / "out")
    for layer in (module for module in theirs.modules() if getattr(module, "frod_V", None) is not None):
        if hasattr(layer, "frod_U"):
            V, W = layer.frod_V["default"], layer.get_base_layer().weight
            layer.frod_U["default"] = layer._calculate_frod_u_and_lambda(V, W)[0]
    torch.testing.assert_close(output(theirs, "bert"), expected, atol=TOLERANCE, rtol=TOLERANCE)


class BlockDiagonal:
    """Stands in for the compiled extension without which PEFT takes every BOFT for one of a single level."""

    @staticmethod
    def forward(blocks: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.stack([torch.block_diag(*level) for level in blocks]),)


@pytest.mark.parametrize(("size", "levels"), [(4, 2), (2, 3)])
def test_levels_of_boft_both_ways(size: int, levels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", BlockDiagonal)
    base = made("llama")
    config = peft.BOFTConfig(boft_block_size=size, boft_n_butterfly_factor=levels, target_modules=["q_proj", "k_proj"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    disturb(parameter for parameter in theirs.parameters() if parameter.requires_grad)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = output(theirs, "llama")
    adapter = at.load(base, tmp_path / "theirs")
    assert {part.method for part in adapter.parts} == {at.BOFT(block_size=size, levels=levels)}
    torch.testing.assert_close(output(base, "llama"), expected, atol=TOLERANCE, rtol=TOLERANCE)
    adapter.save(tmp_path / "ours", format="peft")
    again = peft.PeftModel.from_pretrained(made("llama"), tmp_path / "ours").eval()
    torch.testing.assert_close(output(again, "llama"), expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_targets_are_the_short_list_that_servers_expect(tmp_path: Path) -> None:
    model = made("llama")
    at.adapt(model, at.LoRA(rank=2), on="attention.{query,value}").save(tmp_path / "out", format="peft")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == 2


# --- what one side cannot express ---


@pytest.mark.parametrize(
    ("name", "recipe", "words"),
    [
        ("bert", {"attention.query": at.LoRA(rank=2), "attention.value": at.IA3()}, "one method per adapter"),
        ("bert", {"attention.query": at.SVFit()}, "PEFT has no SVFit"),
        ("bert", {"mlp": at.Bottleneck(size=4)}, "PEFT has no Bottleneck"),
        ("gpt2", {"attention.query": at.LoRA(rank=2)}, "PEFT adapts whole layers"),
        ("gpt2", {"attention.qkv": at.HRA(rank=2)}, "PEFT has no HRA for Conv1D"),
        ("llama", {"attention.query": at.HRA(rank=2), "embedding": at.Train(rows=(-1,))}, "beside LoRA and not HRA"),
        ("llama", {"embedding": at.Train(rows=(-1,)), "re:model.embed_tokens": at.LoRA(rank=2)}, "trained in rows and"),
        ("llama", {"embedding": at.Train(rows=(-1,)), "norm": at.Train()}, "rows beside a LoRA or alone"),
        ("llama", {"lm_head": at.Train(rows=(-1,))}, "PEFT has that for embeddings"),
        ("llama", {"attention.query": at.DEFT(rank=2), "mlp": at.DEFT(rank=4)}, "one DEFT for"),
        ("bert", {"attention.query": at.LoRA(rank=2), "norm": at.Train(only="bias")}, "without its weight"),
        ("bert", {"attention.query": at.HRA(rank=2), "attention.value": at.HRA(rank=4)}, "one rank"),
        ("llama", {"mlp.down": at.Train()}, "only beside a method"),
        ("bert", {"attention.query": at.OFT(block_size=4), "mlp": at.OFT(block_size=8)}, "one OFT for"),
        ("gpt2", {"mlp.down": at.OSF()}, "PEFT has no OSF for Conv1D"),
        ("conv", {"second": at.OFT(block_size=8)}, "PEFT has no OFT for Conv2d"),
        ("bert", {"attention.query": at.Sparse()}, "counts them as a rank"),
        ("conv", {"second|linear": at.DoRA(rank=2)}, "trained whole and adapted by DoRA"),
        ("bert", {"attention.output|mlp.down": at.Lily(rank=4)}, "shares by the last word"),
        ("tied", {"attention.query|lm_head": at.LoRA(rank=2), "embedding": at.Train()}, "lm_head is trained whole and"),
        (
            "masked",
            {"attention.query": at.LoRA(rank=2), "cls.predictions.decoder": at.Train()},
            "transform.dense inside",
        ),
    ],
)
def test_refuses_to_write(name: str, recipe: dict[str, at.Method], words: str, tmp_path: Path) -> None:
    adapter = at.adapt(made(name), recipe)
    with pytest.raises(at.AttunementError, match=words):
        adapter.save(tmp_path / "out", format="peft")
    assert not (tmp_path / "out").exists()


def lora_checkpoint(path: Path, **changes: object) -> nn.Module:
    base = made("bert")
    peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["query"])).save_pretrained(path)
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return base


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "XLORA"}, "holds 'XLORA'; this library reads LORA, VERA"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base weights"),
        ({"use_qalora": True}, "uses use_qalora=True"),
        ({"a_later_option": 3}, "uses a_later_option=3"),
    ],
)
def test_refuses_to_read(changes: dict[str, object], words: str, tmp_path: Path) -> None:
    base = lora_checkpoint(tmp_path, **changes)
    with pytest.raises(at.AttunementError, match=words):
        format.load(base, tmp_path)
    assert at.adapters(base) == {}


@pytest.mark.parametrize(
    ("leave_out", "words"),
    [("query.lora_B.weight", "has lora_A.weight but no 'B'"), ("adapter_model", "no adapter_model.safetensors")],
)
def test_refuses_an_incomplete_checkpoint(leave_out: str, words: str, tmp_path: Path) -> None:
    base = lora_checkpoint(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    if leave_out in file.name:
        file.rename(tmp_path / "elsewhere")
    else:
        save_file({key: value for key, value in load_file(file).items() if not key.endswith(leave_out)}, file)
    with pytest.raises(at.AttunementError, match=words):
        format.load(base, tmp_path)
    assert at.adapters(base) == {}


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("gpt2", {"oft_block_size": 4, "target_modules": ["wte"]}, "is a Embedding, on which OFT"),
        ("conv", {"oft_block_size": 8, "target_modules": ["second"]}, "is a Conv2d, on which OFT"),
        ("llama", {"num_cayley_neumann_terms": 2, "target_modules": ["q_proj"]}, "series of 2 terms"),
    ],
)
def test_refuses_what_peft_rotates_otherwise(name: str, config: dict, words: str, tmp_path: Path) -> None:
    base = made(name)
    peft.get_peft_model(copy.deepcopy(base), peft.OFTConfig(**config)).save_pretrained(tmp_path)
    with pytest.raises(at.AttunementError, match=words):
        format.load(base, tmp_path)
    assert at.adapters(base) == {}


def test_refuses_a_checkpoint_without_its_magnitudes(tmp_path: Path) -> None:
    with pytest.raises(at.AttunementError, match=r"has nothing for 'bert\..*\.magnitude'"):
        format.load(lora_checkpoint(tmp_path, use_dora=True), tmp_path)


def test_refuses_a_checkpoint_without_its_projections(tmp_path: Path) -> None:
    base = made("llama")
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.VeraConfig(r=2, target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "vera_A" not in key}, file)
    with pytest.raises(at.AttunementError, match=r"has no base_model\.vera_A"):
        format.load(base, tmp_path)


def test_refuses_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    lora_checkpoint(tmp_path)
    model = made("llama")
    with pytest.raises(at.AttunementError, match=r"no module 'bert\.encoder"):
        format.load(model, tmp_path)
    assert at.adapters(model) == {}


def test_refuses_tensors_of_another_size(tmp_path: Path) -> None:
    lora_checkpoint(tmp_path)
    other = BertForSequenceClassification(
        BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    )
    with pytest.raises(at.AttunementError, match="shape"):
        format.load(other, tmp_path)
    assert at.adapters(other) == {}


def test_trains_on(tmp_path: Path) -> None:
    base = lora_checkpoint(tmp_path)
    adapter = format.load(base, tmp_path, trainable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        base(input_ids=torch.arange(3, 10)[None]).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
