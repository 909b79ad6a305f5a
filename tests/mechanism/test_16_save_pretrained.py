"""Point 16: `save_pretrained` writes the base and says so; the state dict still shows the adapter."""

import warnings

import pytest
import torch
from hostile import adapter_keys, base_state, bert, close, gpt2, ids, llama, logits, perturb, same_bits
from safetensors.torch import load_file

import attunement as at

RECIPE = {
    "lora": {"attention.*": at.LoRA(rank=2)},
    "mixed": {"attention.*": at.DoRA(rank=2), "mlp": at.Bottleneck(size=3), "norm": at.Train()},
    "vera": {"mlp.{up,down}": at.VeRA(rank=4)},
    "embedding": {"embedding": at.Train()},
}
MAKE = {"bert": bert, "llama": llama, "tied": lambda: llama(tie_word_embeddings=True), "gpt2": gpt2,
        "classifier": lambda: bert("BertForSequenceClassification")}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPE)
@pytest.mark.parametrize("make", MAKE)
def test_the_folder_is_the_base(make, recipe, tmp_path):
    model = MAKE[make]()
    MAKE[make]().save_pretrained(tmp_path / "plain")
    bare = logits(model, ids())
    perturb(at.adapt(model, RECIPE[recipe], name="mine"))
    out, keys = logits(model, ids()), list(model.state_dict())
    assert adapter_keys(model, "mine")
    with pytest.warns(UserWarning, match=r"save\("):
        model.save_pretrained(tmp_path / "adapted")
    plain, found = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "adapted"))
    assert same_bits(found, plain)
    assert list(model.state_dict()) == keys, "the adapter's keys have to come back after saving"
    assert torch.equal(logits(model, ids()), out)
    assert (tmp_path / "plain" / "config.json").read_text() == (tmp_path / "adapted" / "config.json").read_text()

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        back, info = type(MAKE[make]()).from_pretrained(tmp_path / "adapted", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(back.eval(), ids()), bare)
    assert at.adapters(back) == {}


def test_saved_folder_and_saved_adapter_make_the_adapted_model(tmp_path):
    model = llama()
    adapter = perturb(at.adapt(model, RECIPE["mixed"], name="mine"))
    with pytest.warns(UserWarning, match=r"save\("):
        model.save_pretrained(tmp_path / "base")
    adapter.save(tmp_path / "adapter")
    back = type(llama()).from_pretrained(tmp_path / "base").eval()
    at.load(back, tmp_path / "adapter")
    assert torch.equal(logits(back, ids()), logits(model, ids()))


def test_a_state_dict_given_by_the_caller_loses_the_adapter_too(tmp_path):
    """Trainers gather the state dict themselves and hand it over."""
    model = llama()
    perturb(at.adapt(model, RECIPE["lora"]))
    with pytest.warns(UserWarning, match=r"save\("):
        model.save_pretrained(tmp_path, state_dict=model.state_dict())
    assert not [key for key in load_file(tmp_path / "model.safetensors") if "attuned" in key]


def test_merged_weights_are_written(tmp_path):
    model = llama()
    adapter = perturb(at.adapt(model, RECIPE["lora"]))
    out = logits(model, ids())
    adapter.merge()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
    back = type(llama()).from_pretrained(tmp_path).eval()
    assert close(logits(back, ids()), out)
    assert not [key for key in load_file(tmp_path / "model.safetensors") if "attuned" in key]


def test_an_adapted_submodule_of_a_saved_model(tmp_path):
    model = bert("BertForSequenceClassification")
    bare = logits(model, ids())
    perturb(at.adapt(model.bert, RECIPE["lora"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
    back = type(bert("BertForSequenceClassification")).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(back, ids()), bare)


def test_a_model_without_adapters_warns_of_nothing(tmp_path):
    model = llama()
    perturb(at.adapt(model, RECIPE["lora"])).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path)


def test_the_state_dict_restores_the_adapter():
    """What FSDP and a resumed run rely on."""
    model, other = llama(), llama()
    perturb(at.adapt(model, RECIPE["mixed"]))
    at.adapt(other, RECIPE["mixed"])
    assert base_state(other).keys() == base_state(model).keys()
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(other, ids()), logits(model, ids()))
