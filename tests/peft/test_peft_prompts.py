"""Prompts, prefixes and LLaMA-Adapter in PEFT's format, against the `peft` package itself."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import attunement as at

peft = pytest.importorskip("peft", reason="the peft package is what this format is proven against")
pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
IDS = torch.randint(3, 64, (2, 5), generator=torch.Generator().manual_seed(0))


def llama():
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **SIZES))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2))


def bert():
    return BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=3, **SIZES))


def t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=16, d_ff=32, num_layers=2, num_heads=4, d_kv=4, decoder_start_token_id=0)
    )


TASKS = {llama: "CAUSAL_LM", gpt2: "CAUSAL_LM", bert: "SEQ_CLS", t5: "SEQ_2_SEQ_LM"}
CONFIGS = {
    "prompt": lambda task: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3),
    "p_tuning": lambda task: peft.PromptEncoderConfig(task_type=task, num_virtual_tokens=3),
    "p_tuning_lstm": lambda task: peft.PromptEncoderConfig(
        task_type=task, num_virtual_tokens=3, encoder_reparameterization_type="LSTM"
    ),
    "prefix": lambda task: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=3),
    "prefix_mlp": lambda task: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=3, prefix_projection=True),
    "cartridge": lambda task: peft.CartridgeConfig(task_type=task, num_virtual_tokens=4, num_frozen_tokens=2),
    "cpt": lambda task: peft.CPTConfig(task_type=task, cpt_token_ids=[5, 6, 7]),
    "multitask": lambda task: peft.MultitaskPromptTuningConfig(task_type=task, num_virtual_tokens=3),
    "adaption": lambda task: peft.AdaptionPromptConfig(task_type=task, adapter_len=3, adapter_layers=1),
}


def logits(model, base, **more):
    """The logits for the text: PEFT's have some for the tokens of a prompt before them."""
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), **more}
    if getattr(getattr(model, "active_peft_config", None), "peft_type", None) == "CPT":
        inputs["labels"] = None  # which it pops
    if base is t5:
        inputs["decoder_input_ids"] = IDS[:, :4]
    out = model.eval()(**inputs).logits.detach()
    return out if out.dim() == 2 else out[:, -(4 if base is t5 else IDS.shape[1]) :]


READ = [
    (base, kind)
    for base in TASKS
    for kind in CONFIGS
    if (kind, base) not in {(kind, b) for kind in ("adaption", "cpt") for b in (bert, t5)} | {("adaption", gpt2)}
    and kind != "multitask"
]
READ = [(base, kind) for base, kind in READ if base is not t5 or not kind.startswith(("prefix", "cartridge"))]


@pytest.mark.parametrize(("base", "kind"), READ, ids=lambda value: getattr(value, "__name__", value))
def test_what_peft_saved_gives_the_same_here(base, kind, tmp_path):
    torch.manual_seed(0)
    ours = base()
    theirs = peft.get_peft_model(copy.deepcopy(ours), CONFIGS[kind](TASKS[base]))
    for name, parameter in theirs.named_parameters():
        if name.endswith("adaption_gate"):
            parameter.data.fill_(0.5)
        if "delta_embedding" in name:
            parameter.data.normal_()
    expected = logits(theirs, base)
    theirs.save_pretrained(tmp_path)
    assert (logits(ours, base) - expected).abs().max() > 1e-4
    at.load(ours, tmp_path)
    assert (logits(ours, base) - expected).abs().max() < 2e-6


WRITTEN = [(base, method) for base in (llama, gpt2, bert) for method in (at.Prompt(3, std=1.0), at.PTuning(3))]
WRITTEN += [(base, at.Prefix(3, std=1.0, offset_positions=True)) for base in (llama, gpt2, bert)]
WRITTEN += [(base, at.Cartridge(3, std=1.0)) for base in (llama, bert)]
WRITTEN += [(t5, at.Prompt(3, std=1.0)), (llama, at.LLaMAAdapter(3, gate="layer", tanh=False))]


@pytest.mark.parametrize(("base", "method"), WRITTEN, ids=lambda v: getattr(v, "__name__", type(v).__name__))
def test_what_is_saved_here_gives_the_same_in_peft(base, method, tmp_path):
    torch.manual_seed(0)
    theirs = base()
    ours = copy.deepcopy(theirs)
    adapter = at.adapt(ours, method)
    for name, parameter in adapter.named_parameters():
        if name.endswith(".g"):
            parameter.data.fill_(0.5)
    expected = logits(ours, base)
    adapter.save(tmp_path, format="peft")
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path)
    assert (logits(loaded, base) - expected).abs().max() < 2e-6


@pytest.mark.parametrize(
    ("place", "method"),
    [("backbone", at.Prompt(3)), ("self_attention", at.LLaMAAdapter(3, gate="layer", tanh=False))],
)
@pytest.mark.parametrize("beside", ["norm", "embedding"])
def test_what_is_trained_beside_a_prompt_comes_along(place, method, beside, tmp_path):
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=True, **SIZES))
    ours, back = copy.deepcopy(base), copy.deepcopy(base)
    adapter = at.adapt(ours, {place: method, beside: at.Train()})
    for parameter in adapter.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    expected = logits(ours, llama)
    adapter.save(tmp_path, format="peft")
    at.load(back, tmp_path)
    assert (logits(back, llama) - expected).abs().max() < 2e-6
    assert (logits(peft.PeftModel.from_pretrained(base, tmp_path), llama) - expected).abs().max() < 2e-6


@pytest.mark.parametrize("base", [llama, bert])
def test_a_multitask_prompt_has_its_tasks_both_ways(base, tmp_path):
    torch.manual_seed(0)
    ours, tasks = base(), torch.tensor([2, 0])
    config = peft.MultitaskPromptTuningConfig(
        task_type=TASKS[base], num_virtual_tokens=3, num_tasks=3, num_ranks=2, num_transformer_submodules=1
    )
    theirs = peft.get_peft_model(copy.deepcopy(ours), config)
    for parameter in theirs.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter)
    expected = logits(theirs, base, task_ids=tasks)
    theirs.save_pretrained(tmp_path / "theirs")
    bare = copy.deepcopy(ours)
    adapter = at.load(ours, tmp_path / "theirs")
    adapter.give(task=tasks)
    assert (logits(ours, base) - expected).abs().max() < 2e-6
    assert (logits(bare, base) - expected).abs().max() > 1e-3
    adapter.save(tmp_path / "ours", format="peft")
    again = peft.PeftModel.from_pretrained(bare, tmp_path / "ours")
    assert (logits(again, base, task_ids=tasks) - expected).abs().max() < 2e-6


@pytest.mark.parametrize(
    ("base", "kind", "because"),
    [
        (t5, "prefix", "a prefix of an encoder-decoder"),
        (t5, "multitask", "a multitask prompt of an encoder-decoder"),
        (gpt2, "adaption", "no attention that LLaMAAdapter"),
        (RobertaForSequenceClassification, "prompt", "outside of the backbone"),
    ],
)
def test_what_has_no_counterpart_is_refused(base, kind, because, tmp_path):
    made = base() if base is not RobertaForSequenceClassification else base(RobertaConfig(vocab_size=64, **SIZES))
    config = CONFIGS[kind](TASKS.get(base, "SEQ_CLS"))
    peft.get_peft_model(copy.deepcopy(made), config).save_pretrained(tmp_path)
    with pytest.raises(at.AttunementError, match=because):
        at.load(made, tmp_path)
    assert not at.adapters(made)


@pytest.mark.parametrize(
    ("recipe", "because"),
    [
        (at.Prefix(3), "moves the text"),
        ({"self_attention": at.Prefix(3), "embedding": at.Train(rows=(0,))}, "in some rows"),
        (at.LLaMAAdapter(3), "one plain gate"),
        ({"backbone": at.Prompt(3), "attention.query": at.LoRA(2)}, "stands alone"),
        ({"blocks[0].self_attention": at.Prefix(3, offset_positions=True)}, "all of 2 layers"),
        ({"blocks[0].self_attention": at.LLaMAAdapter(3, gate="layer", tanh=False)}, "the last layers"),
    ],
)
def test_what_peft_does_not_have_is_refused(recipe, because, tmp_path):
    adapter = at.adapt(llama(), recipe)
    with pytest.raises(at.AttunementError, match=because):
        adapter.save(tmp_path / "peft", format="peft")
    assert not (tmp_path / "peft").exists()
