"""Point 9: experts stand in 3-D parameters whose layout differs from model to model."""

import pytest
import torch
from hostile import HIDDEN, base_state, close, gradients, ids, in_double, logits, mixture, perturb, same_bits

import attunement as at

KINDS = ["mixtral", "qwen3_moe", "gpt_oss"]
PARAMETER = {"gate": "gate_up_proj", "up": "gate_up_proj", "gate_up": "gate_up_proj", "down": "down_proj"}


def rows(kind, role, tensor):
    """The part of the stored parameter that plays a role, as a boolean mask."""
    mask = torch.zeros_like(tensor, dtype=torch.bool)
    if role in ("down", "gate_up"):
        mask[:] = True
    elif kind == "gpt_oss":
        mask[..., slice(0, None, 2) if role == "gate" else slice(1, None, 2)] = True
    else:
        mask[:, slice(0, HIDDEN) if role == "gate" else slice(HIDDEN, None)] = True
    return mask


@pytest.mark.parametrize("method", [at.LoRA(rank=2), at.DoRA(rank=2), at.HRA(rank=2)], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("role", ["gate", "up", "down"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_role_acts_where_it_stands(kind, role, method):
    model = in_double(mixture(kind))
    bare, state = logits(model, ids()), base_state(model)
    adapter = perturb(at.adapt(model, {f"experts.{role}": method}), scale=0.3)
    out = logits(model, ids())
    assert not close(out, bare, 1e-4)
    with at.using(model, None):
        assert torch.equal(logits(model, ids()), bare)

    adapter.merge()
    assert close(logits(model, ids()), out, 1e-10)
    merged = base_state(model)
    for key, before in state.items():
        changed = merged[key] != before
        if key.endswith(f"experts.{PARAMETER[role]}"):
            assert not changed[~rows(kind, role, before)].any(), f"{key}: merge touched rows of another role"
            assert changed[rows(kind, role, before)].float().mean() > 0.9
        else:
            assert not changed.any(), f"merge changed {key}"
    adapter.unmerge()
    assert same_bits(base_state(model), state)
    assert torch.equal(logits(model, ids()), out)
    adapter.detach()
    assert torch.equal(logits(model, ids()), bare)


@pytest.mark.parametrize("kind", KINDS)
def test_all_roles_together_train_and_save(kind, tmp_path):
    model, other = mixture(kind), mixture(kind)
    adapter = perturb(at.adapt(model, {"experts.{gate,up,down}": at.LoRA(rank=2)}), scale=0.3)
    assert len(list(adapter.parameters())) == 2 * 3 * 2
    model(ids()).logits.pow(3).sum().backward()
    found = gradients(adapter)
    assert all(g.abs().sum() > 0 for g in found.values())
    adapter.save(tmp_path / "moe")
    at.load(other, tmp_path / "moe")
    assert torch.equal(logits(other, ids()), logits(model, ids()))


@pytest.mark.parametrize("kind", KINDS)
def test_every_implementation_of_the_experts_gives_the_same(kind):
    model = mixture(kind)
    bare = logits(model, ids())
    perturb(at.adapt(model, {"experts.{gate,up,down}": at.LoRA(rank=2)}), scale=0.3)
    outs = {}
    for how in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(how)
        outs[how] = logits(model, ids())
        assert not close(outs[how], bare, 1e-3)
    assert close(outs["eager"], outs["batched_mm"])
    assert close(outs["eager"], outs["grouped_mm"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_hand_merged_copy_gives_the_same(kind):
    """B A added by hand in the layout on disk: each expert has its own pair."""
    model, plain = in_double(mixture(kind)), in_double(mixture(kind))
    adapter = perturb(at.adapt(model, {"experts.down": at.LoRA(rank=2, alpha=2)}), scale=0.3)
    state = adapter.state()
    for layer, block in enumerate(plain.model.layers):
        part = {key.rpartition(".")[2]: t.double() for key, t in state.items() if f"layers.{layer}." in key}
        change = part["B"] @ part["A"]  # (E, H, I)
        assert change.shape[0] == 4
        with torch.no_grad():
            block.mlp.experts.down_proj += change.mT if kind == "gpt_oss" else change
    assert close(logits(model, ids()), logits(plain, ids()), 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_the_router_trains(kind):
    model = mixture(kind)
    bare = logits(model, ids())
    adapter = perturb(at.adapt(model, {"router": at.Train()}), scale=0.5)
    assert not close(logits(model, ids()), bare, 1e-4)
    model(ids()).logits.pow(3).sum().backward()
    gradients(adapter)
    at.detach(model)
    assert torch.equal(logits(model, ids()), bare)


@pytest.mark.parametrize("kind", KINDS)
def test_the_fingerprint_covers_touched_sites_only(kind, tmp_path):
    model, other = mixture(kind), mixture(kind)
    perturb(at.adapt(model, {"experts.down": at.LoRA(rank=2)})).save(tmp_path / "moe")
    with torch.no_grad():
        other.lm_head.weight.add_(1)
    at.load(other, tmp_path / "moe")
    third = mixture(kind)
    with torch.no_grad():
        third.model.layers[0].mlp.experts.down_proj.add_(1)
    with pytest.raises(at.AttunementError, match=r"base|fingerprint"):
        at.load(third, tmp_path / "moe")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_over_routed_tokens(kind):
    """Routed tokens lose their row: the result still has to be each row's own."""
    model = mixture(kind)
    given = ids()
    outs = [logits(model, given)]
    for i, name in enumerate("ab"):
        perturb(at.adapt(model, {"experts.{gate,up,down}": at.LoRA(rank=2)}, name=name), seed=i, scale=0.3)
        outs.append(logits(model, given))
    with at.using(model, at.Rows(["b", None, "a"])):
        out = logits(model, given)
    assert close(out, torch.stack([outs[2][0], outs[0][1], outs[1][2]]))
