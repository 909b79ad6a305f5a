"""Bad input: one sentence, an AttunementError, before anything changes; and nothing on disk is lost."""

import json
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import attunement as at


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))
        self.up_proj, self.down_proj, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8)

    def forward(self, x):
        x = x + self.o_proj(self.q_proj(x) + self.k_proj(x) * self.v_proj(x))
        return x + self.down_proj(self.up_proj(self.norm(x)).relu())


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens, self.layers = nn.Embedding(20, 8), nn.ModuleList(Block() for _ in range(2))
        self.recurrent = nn.LSTM(8, 8, batch_first=True)
        self.listed = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def forward(self, ids):
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.listed(self.recurrent(x)[0])


def make(seed=0):
    torch.manual_seed(seed)
    return Model().eval()


def everything(model):
    """All that a refusal must leave alone."""
    return (
        [(name, type(module), sorted(module.__dict__)) for name, module in model.named_modules()],
        {key: value.clone() for key, value in model.state_dict().items()},
        {name: p.requires_grad for name, p in model.named_parameters()},
        list(at.adapters(model)),
    )


def same(before, after):
    assert before[0] == after[0]
    assert before[1].keys() == after[1].keys()
    assert all(torch.equal(before[1][k], after[1][k]) or before[1][k].isnan().any() for k in before[1])
    assert before[2:] == after[2:]


def refused(model, action, *words):
    before = everything(model)
    with pytest.raises(at.AttunementError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 500
    for word in words:
        assert re.search(word, text), f"{word!r} is not said in: {text}"
    same(before, everything(model))


@pytest.mark.parametrize(
    ("recipe", "on", "words"),
    [
        (lambda: at.LoRA(), "attention.qeury", ["attention.query"]),
        (lambda: at.LoRA(), "atention.query", ["attention"]),
        (lambda: at.LoRA(), "layers.0.q_prj", ["q_proj"]),
        (lambda: at.LoRA(), "*.q_prj", ["q_pr"]),
        (lambda: at.LoRA(), "re:(", ["re"]),
        (lambda: at.LoRA(), "type:Conv2d", ["Conv2d"]),
        (lambda: at.LoRA(), "blocks[7].attention.query", ["7|block"]),
        (lambda: at.LoRA(rank=9), "attention.query", ["9", "8"]),
        (lambda: at.HRA(rank=10), "attention.query", ["10", "8"]),
        (lambda: at.LoRA(rank=0), "attention.query", ["rank", "0"]),
        (lambda: at.LoRA(rank=-2), "attention.query", ["rank"]),
        (lambda: at.LoRA(rank="many"), "attention.query", ["rank", "many"]),
        (lambda: at.LoRA(rnk=4), "attention.query", ["rnk", "'rank'"]),
        (lambda: at.LoRA(dropout=1.5), "attention.query", ["dropout"]),
        (lambda: at.method("lara")(), "attention.query", ["lora"]),
        (lambda: "lora", "attention.query", ["method"]),
        (lambda: {"attention.query": 8}, None, ["LoRA"]),
        (dict, None, ["mapping"]),
        (lambda: {"attention.query": at.LoRA()}, "norm", ["on"]),
        (lambda: at.LoRA(rank=2), "recurrent", ["LSTM"]),
        (lambda: at.Train(), "recurrent", ["LSTM"]),
        (lambda: at.Bottleneck(size=4), "listed", ["Sequential"]),
        (lambda: at.LoRA(rank=2), "layers.0.norm", ["norm"]),
    ],
)
def test_recipes(recipe, on, words):
    model = make()
    refused(model, lambda: at.adapt(model, recipe(), on=on), *words)


@pytest.mark.parametrize("name", ["../x", "a.b", "", "a/b", "-a", "a b", "x" * 65, None, 3])
def test_unsafe_names(name):
    model = make()
    refused(model, lambda: at.adapt(model, at.LoRA(rank=2), name=name), "name")


def test_a_name_twice_and_overlaps():
    model = make()
    at.adapt(model, at.LoRA(rank=2), name="a")
    refused(model, lambda: at.adapt(model, at.LoRA(rank=2), name="a"), "'a'")
    twice = {"attention.query": at.LoRA(rank=2), "*.q_proj": at.LoRA(rank=4)}
    refused(model, lambda: at.adapt(model, twice, name="b"), "twice")
    refused(
        model.layers[0], lambda: at.adapt(model.layers[0], at.LoRA(rank=2), on="*.q_proj|q_proj", name="b"), "adapted"
    )


def test_active_sets():
    model = make()
    at.adapt(model, at.LoRA(rank=2), name="banking")
    refused(model, lambda: at.use(model, "bankin"), "'banking'")
    refused(model, lambda: at.use(model, at.Sum("banking", "b")), "'b'")
    refused(model, lambda: at.use(model, 3), "int")
    refused(model, lambda: at.Sum("banking", 3), "3")
    refused(model, lambda: at.Weighted({"banking": "much"}), "much")
    refused(model, lambda: at.Rows([]), "Rows")
    refused(model, lambda: at.use(model, at.Rows(["banking", at.Rows(["banking", None])])), "Rows inside Rows")
    refused(model, lambda: at.use(model, at.Rows(["banking", "nobody"])), "nobody")
    with at.using(model, at.Rows(["banking", None, None])):
        refused(model, lambda: model(torch.zeros(4, 3, dtype=torch.long)), "3 rows", "4")
        refused(model, lambda: model(torch.zeros(6, 3, dtype=torch.long)), "3 rows", "6")
    refused(make(), lambda: at.use(make(), "banking"), "no adapters")
    refused(model, lambda: at.detach(model, "bank"), "'banking'")


def test_merging():
    model = make()
    adapter = at.adapt(model, at.LoRA(rank=2), on="attention.query", name="a")
    refused(model, adapter.unmerge, "not merged")
    next(adapter.parameters()).data[0, 0] = float("nan")
    refused(model, adapter.merge, "not finite", "attention|q_proj")
    next(adapter.parameters()).data[0, 0] = 1.0
    adapter.merge(keep=False)
    refused(model, adapter.merge, "merged already")
    refused(model, adapter.unmerge, "keep=False")
    bottleneck = at.adapt(model, at.Bottleneck(size=2), name="b")
    refused(model, bottleneck.merge, "Bottleneck", "partial=True")
    model = make()
    below, above = (at.adapt(model, at.LoRA(rank=2), on="attention.query", name=name) for name in "ab")
    below.merge()
    refused(model, lambda: above.merge(keep=False), "'a' is merged at the same weights", "unmerge it first")


@pytest.fixture
def saved(tmp_path):
    model = make()
    at.adapt(model, at.LoRA(rank=2), on="attention.{query,value}", name="a").save(tmp_path / "a")
    return tmp_path / "a"


def header(folder):
    from safetensors import safe_open

    with safe_open(folder / "adapter.safetensors", "pt") as opened:
        return opened.metadata()


def rewritten(folder, change=None, describe=None):
    tensors, metadata = load_file(folder / "adapter.safetensors"), header(folder)
    if change is not None:
        tensors = change(tensors)
    if describe is not None:
        said = json.loads(metadata["attunement"])
        describe(said)
        metadata = {"attunement": json.dumps(said)}
    save_file(tensors, folder / "adapter.safetensors", metadata=metadata)


def without_first(tensors):
    return dict(list(tensors.items())[1:])


def with_nan(tensors):
    key = next(iter(tensors))
    return {**tensors, key: torch.full_like(tensors[key], float("nan"))}


def with_other_shape(tensors):
    key = next(k for k in tensors if k.endswith(".A"))
    return {**tensors, key: torch.zeros(3, 3)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_first, ["missing"]),
        (lambda t: {**t, "stranger": torch.zeros(1)}, ["not expected", "stranger"]),
        (with_nan, ["not finite"]),
        (with_other_shape, ["shape", r"\(2, 8\)", r"\(3, 3\)"]),
    ],
)
def test_tensors_of_a_file(saved, change, words):
    rewritten(saved, change)
    model = make()
    refused(model, lambda: at.load(model, saved), *words)


def set_word(key, value):
    def change(said):
        said[key] = value

    return change


def set_method(said):
    said["methods"][0]["method"]["method"] = "low_rank/lara"


def set_module(said):
    said["methods"][0]["sites"][0]["name"] = "layers.0.q_porj"


@pytest.mark.parametrize(
    ("describe", "words"),
    [
        (set_word("format", 99), ["99"]),
        (set_word("name", "../../x"), ["name"]),
        (set_method, ["lara", "lora"]),
        (set_module, ["q_porj", "q_proj"]),
    ],
)
def test_descriptions_of_a_file(saved, describe, words):
    rewritten(saved, describe=describe)
    model = make()
    refused(model, lambda: at.load(model, saved), *words)


def test_files_that_are_none(saved, tmp_path):
    model = make()
    refused(model, lambda: at.load(model, tmp_path / "nowhere"), "nowhere")
    file = saved / "adapter.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    refused(model, lambda: at.load(model, saved), "truncated")
    file.write_bytes(b"\x80\x04\x95 a pickle, say")
    refused(model, lambda: at.load(model, saved), "safetensors")
    file.unlink()
    refused(model, lambda: at.load(model, saved), "adapter.safetensors")
    save_file({"x": torch.zeros(1)}, file)
    refused(model, lambda: at.load(model, saved), "description")
    adapter = at.adapt(model, at.LoRA(rank=2), name="a")
    refused(model, lambda: adapter.save(file), "file")
    refused(model, lambda: adapter.save(tmp_path / "b", format="onnx"), "onnx", "peft")


def test_another_base(saved):
    other = make(seed=1)
    refused(other, lambda: at.load(other, saved), "base differs", "strict=False")
    assert at.load(other, saved, strict=False).name == "a"
    rounded = make().to(torch.bfloat16)
    assert at.load(rounded, saved).name == "a"  # another rounding of the same base is the same base


def test_a_model_that_peft_has_adapted():
    peft = pytest.importorskip("peft")
    model = make()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    refused(wrapped, lambda: at.adapt(wrapped, at.LoRA(rank=2)), "PEFT")
    refused(model, lambda: at.adapt(model, at.LoRA(rank=2)), "PEFT")


def test_what_no_module_is():
    with pytest.raises(at.AttunementError, match=r"torch\.nn\.Module"):
        at.adapt("bert", at.LoRA())  # type: ignore[arg-type]


SAVER = """
import sys, torch, attunement as at
from torch import nn
model = nn.Sequential(nn.Linear(256, 256))
adapter = at.adapt(model, at.LoRA(rank=64), on="*", name="a")
print("ready", flush=True)
number = 0
while True:
    number += 1
    for parameter in adapter.parameters():
        parameter.data.fill_(number)
    adapter.metrics = {"number": number}
    adapter.save(sys.argv[1])
"""


def test_a_save_that_is_killed_leaves_a_whole_adapter(tmp_path):
    torch.manual_seed(0)
    random.seed(0)
    seen = set()
    for attempt in range(3):
        process = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path / "a")], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        while not (tmp_path / "a").exists():
            time.sleep(0.01)
        time.sleep(random.uniform(0.05, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait()
        adapter = at.load(nn.Sequential(nn.Linear(256, 256)), tmp_path / "a", strict=False)
        values = {float(v) for p in adapter.parameters() for v in p.unique()}
        assert values == {adapter.metrics["number"]}, f"a torn save in attempt {attempt}"
        seen |= values
    assert len(seen) > 1


FULL = """
import resource, signal, sys, torch, attunement as at
from torch import nn
model = nn.Sequential(nn.Linear(256, 256))
adapter = at.adapt(model, at.LoRA(rank=64), on="*", name="a")
adapter.save(sys.argv[1])
for parameter in adapter.parameters():
    parameter.data.fill_(7)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    adapter.save(sys.argv[1])
except at.AttunementError as error:
    print("refused:", error)
"""


def test_a_full_disk_leaves_the_adapter_before(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path / "a")], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("refused: save:"), done.stdout + done.stderr
    adapter = at.load(nn.Sequential(nn.Linear(256, 256)), tmp_path / "a", strict=False)
    assert all((p != 7).all() for p in adapter.parameters())
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_mixer_that_reads_the_weights_of_its_parts():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=1, vocab_size=30)
    model = MambaForCausalLM(config).eval()
    refused(model, lambda: at.adapt(model, at.Bottleneck(size=2), on="*.out_proj"), "MambaMixer", "reads")
    ids = torch.arange(6)[None]
    before = model(ids).logits
    adapter = at.adapt(model, at.IA3(), on="*.out_proj|*.dt_proj", name="a")  # acts on the weight, which all paths read
    for parameter in adapter.parameters():
        parameter.data.add_(1.0)
    mixer = model.backbone.layers[0].mixer
    assert torch.allclose(mixer.out_proj.weight, 2 * mixer.out_proj._parameters["weight"])
    after = model(ids).logits
    assert not torch.allclose(after, before)
    adapter.merge()
    assert torch.allclose(model(ids).logits, after, atol=1e-5)
