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
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import attunement as at
from attunement import peft as format

peft = pytest.importorskip("peft", reason="the peft package is what this format is proven against")
pytestmark = pytest.mark.filterwarnings("ignore")
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


def llama() -> nn.Module:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, intermediate_size=32, **heads)
    )


def gpt2() -> nn.Module:
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32, **tokens))


BASES = {"bert": bert, "llama": llama, "gpt2": gpt2, "conv": Convolutional}


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
    "norms": ("bert", {"norm": at.Train()}),
}


@pytest.mark.parametrize("case", TO_PEFT)
def test_peft_reads_what_is_written_here(case: str, tmp_path: Path) -> None:
    name, recipe = TO_PEFT[case]
    base = made(name)
    ours = copy.deepcopy(base)
    adapter = at.adapt(ours, recipe)
    disturb(adapter.parameters())
    expected = output(ours, name)
    adapter.save(tmp_path / "out", format="peft")

    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out").eval()

    torch.testing.assert_close(output(theirs, name), expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert (expected - output(base, name)).abs().max() > 1e-3
    again = at.load(base, tmp_path / "out")
    torch.testing.assert_close(output(base, name), expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert again.count() == adapter.count()


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
        ("llama", {"attention.query": at.LoRA(rank=2), "embedding": at.Train(rows=(-1,))}, "some rows"),
        ("bert", {"attention.query": at.LoRA(rank=2), "norm": at.Train(only="bias")}, "without its weight"),
        ("bert", {"attention.query": at.HRA(rank=2), "attention.value": at.HRA(rank=4)}, "one rank"),
        ("llama", {"mlp.down": at.Train()}, "only beside a method"),
        ("conv", {"second|linear": at.DoRA(rank=2)}, "trained whole and adapted by DoRA"),
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
        ({"peft_type": "LOHA"}, "holds 'LOHA'; this library reads LORA, VERA"),
        ({"init_lora_weights": "pissa"}, "changed the base weights"),
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
