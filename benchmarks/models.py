"""The models of the benchmarks, and one method on both sides with the same weights."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaForSequenceClassification

import attunement as at

LINEAR = "attention.{query,key,value,output}|mlp.{gate,up,down}"
LINEAR_NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCABULARY = 4096


def llama(layers: int = 8, width: int = 256) -> LlamaForCausalLM:
    """A Llama with random weights from one seed, in eval mode: 7 linear layers a block, 8 heads, MLP of 2.75 widths."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def roberta() -> RobertaForSequenceClassification:
    """RoBERTa-base's shape with random weights and a small vocabulary, for 77 classes."""
    torch.manual_seed(0)
    return RobertaForSequenceClassification(RobertaConfig(vocab_size=VOCABULARY, num_labels=77))


def tokens(batch: int, length: int) -> Tensor:
    """Random token ids from one seed, (batch, length)."""
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0))


def both(
    base: nn.Module, method: at.Method, names: Sequence[str] = ("default",), on: str = LINEAR, noise: float = 0.02
) -> tuple[nn.Module, nn.Module]:
    """The base adapted here and by PEFT: each name an adapter with random, equal weights on both sides, trainable.

    PEFT reads what this library saves in PEFT's format, so the configurations are equal; the outputs are compared.
    """
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT on VeRA's random pair, which both sides draw alike
        for name in names:
            adapter = at.adapt(ours, method, on=on, name=name)
            with torch.no_grad():
                for parameter in adapter.parameters():
                    parameter += noise * torch.randn(parameter.shape, generator=generator)
            saved = Path(folder, name)
            adapter.save(saved, format="peft")
            if name == names[0]:
                theirs = PeftModel.from_pretrained(theirs, saved, adapter_name=name, is_trainable=True)
            else:
                theirs.load_adapter(saved, adapter_name=name, is_trainable=True)
    at.use(ours, names[0])
    theirs.set_adapter(names[0])
    theirs.eval()
    ids = tokens(2, 16)
    with torch.no_grad():
        left, right, bare = ours(ids).logits, theirs(ids).logits, base(ids).logits
    torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)
    assert (left - bare).abs().max() > 1e-3, "the adapter changes nothing, so agreement says nothing"
    return ours, theirs
