"""Changes of a weight that are products, spectra and turns: their formulas spelt out entry by entry, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import attunement as at

OUT, INPUTS = 12, 8


def loha(W: Tensor, t: dict[str, Tensor]) -> Tensor:
    return W + 5 / 3 * (t["B1"] @ t["A1"]) * (t["B2"] @ t["A2"])


def lokr(W: Tensor, t: dict[str, Tensor]) -> Tensor:
    return W + 3 / 2 * torch.kron(t["C"], t["D"])


def lokr_both(W: Tensor, t: dict[str, Tensor]) -> Tensor:
    return W + torch.kron(t["CB"] @ t["CA"], t["DB"] @ t["DA"])


def hira(W: Tensor, t: dict[str, Tensor]) -> Tensor:
    return W * (1 + t["B"] @ t["A"])


def miss(W: Tensor, t: dict[str, Tensor]) -> Tensor:
    r, rows = t["D"].shape
    return W + torch.tensor([[t["D"][i % r, o % rows] for i in range(INPUTS)] for o in range(OUT)]).double()


def bone(W: Tensor, t: dict[str, Tensor]) -> Tensor:
    new = W.clone()
    for o in range(0, OUT, 4):
        for i in range(0, INPUTS, 4):
            tile = W[o : o + 4, i : i + 4]
            new[o : o + 4, i : i + 4] = tile + tile @ t["B"][o // 4] + t["B"][o // 4]
    return new


def delora(W: Tensor, t: dict[str, Tensor]) -> Tensor:
    each = [torch.outer(b / b.norm(), a / a.norm()) for b, a in zip(t["B"].T, t["A"], strict=True)]
    return W + t["strength"] / len(each) * sum(each) * W.norm(dim=0)


def fourierft(W: Tensor, t: dict[str, Tensor]) -> Tensor:
    D = torch.zeros_like(W)
    j, k = torch.arange(OUT).double()[:, None], torch.arange(INPUTS).double()
    for value, where in zip(t["spectrum"], t["index"].tolist(), strict=True):
        u, v = divmod(where, INPUTS)
        D += value * torch.cos(2 * math.pi * (u * j / OUT + v * k / INPUTS))
    return W + 7 * D / (OUT * INPUTS)


def c3a(W: Tensor, t: dict[str, Tensor]) -> Tensor:
    kernel = t["kernel"]
    entry = [[kernel[o // 4, i // 4, (i - o) % 4] for i in range(INPUTS)] for o in range(OUT)]
    return W + torch.tensor(entry).double() / INPUTS


def road(W: Tensor, t: dict[str, Tensor]) -> Tensor:
    R = torch.zeros(OUT, OUT, dtype=W.dtype)
    for plane, (angle, size) in enumerate(zip(t["theta"], t["alpha"], strict=True)):
        j = plane // 2 * 4 + plane % 2  # the first channel of the plane, in groups of four
        R[j, j] = R[j + 2, j + 2] = size * angle.cos()
        R[j, j + 2], R[j + 2, j] = -size * angle.sin(), size * angle.sin()
    return R @ W


def vb_lora(W: Tensor, t: dict[str, Tensor]) -> Tensor:
    def piece(logits: Tensor) -> Tensor:
        chosen = logits.argsort(descending=True)[:2]
        return logits[chosen].softmax(0) @ t["bank"][chosen]

    A = torch.stack([torch.cat([piece(one) for one in row]) for row in t["A_logits"]])  # (rank, in)
    B = torch.stack([torch.cat([piece(one[k]) for one in t["B_logits"]]) for k in range(3)], dim=1)  # (out, rank)
    return W + B @ A


def gralora(W: Tensor, t: dict[str, Tensor]) -> Tensor:
    new = W + 6 / 5 * t["B_hybrid"] @ t["A_hybrid"]
    for j in range(2):  # of the outputs
        for n in range(2):  # of the inputs
            change = t["A"][n][:, 2 * j : 2 * j + 2] @ t["B"][j][2 * n : 2 * n + 2]
            new[6 * j : 6 * j + 6, 4 * n : 4 * n + 4] += 6 / 5 * change.T
    return new


def waveft(W: Tensor, t: dict[str, Tensor]) -> Tensor:
    D = torch.zeros_like(W)
    for value, where in zip(t["spectrum"], t["index"].tolist(), strict=True):
        (down, i), (across, j) = divmod(where // INPUTS, OUT // 2), divmod(where % INPUTS, INPUTS // 2)
        # the right half differs along the rows of a two by two square, the lower half along its columns
        for p in range(2):
            for q in range(2):
                D[2 * i + p, 2 * j + q] += value / 2 * (-1) ** (across * p + down * q)
    return W + 3 * D


CASES: dict[str, tuple[at.Method, Callable[[Tensor, dict[str, Tensor]], Tensor]]] = {
    "loha": (at.LoHa(rank=3, alpha=5), loha),
    "lokr": (at.LoKr(rank=2, alpha=3), lokr),
    "lokr-both": (at.LoKr(rank=1, factor=4, both=True), lokr_both),
    "hira": (at.HiRA(rank=3), hira),
    "miss": (at.MiSS(rank=3), miss),
    "miss-shared-rows": (at.MiSS(rank=3, shared_rows=6), miss),
    "bone": (at.Bone(block_size=4), bone),
    "delora": (at.DeLoRA(rank=3), delora),
    "fourierft": (at.FourierFT(frequencies=20, scale=7), fourierft),
    "waveft": (at.WaveFT(frequencies=40, scale=3), waveft),
    "gralora": (at.GraLoRA(rank=4, tiles=2, hybrid_rank=1, alpha=6), gralora),
    "c3a": (at.C3A(block_size=4), c3a),
    "road": (at.RoAd(group_size=4), road),
    "vb_lora": (at.VBLoRA(rank=3, vectors=6, vector_length=4), vb_lora),
}


@pytest.mark.parametrize("case", CASES)
def test_the_weight_is_the_formula(case: str) -> None:
    method, formula = CASES[case]
    net = nn.Sequential(nn.Linear(INPUTS, OUT)).double()
    W = net[0].weight.detach().clone()
    adapter = at.adapt(net, method, on="0")
    for parameter in adapter.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    (part,) = adapter.parts
    names = [name for h in (part.holder, *part.common) for name in (*h._parameters, *h._buffers)]
    expected = formula(W, {name: part.tensor(name) for name in names})
    adapter.merge()
    torch.testing.assert_close(net[0].weight.detach(), expected)
    assert (expected - W).abs().max() > 1e-3


def test_randlora_reaches_full_rank_with_few_numbers() -> None:
    net = nn.Sequential(nn.Linear(16, 24)).double()
    W = net[0].weight.detach().clone()
    adapter = at.adapt(net, at.RandLoRA(rank=4), on="0")
    assert adapter.count() == 4 * (4 + 16)
    for parameter in adapter.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    adapter.merge()
    assert torch.linalg.matrix_rank(net[0].weight.detach() - W) == 16


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (at.LoHa(rank=9), "the largest is 8"),
        (at.MiSS(rank=2, shared_rows=5), "shared_rows 5 does not divide its 12 rows; the nearest that does is 4"),
        (at.Bone(block_size=8), "block_size 8 does not divide 12 x 8; the nearest that does is 4"),
        (at.C3A(block_size=3), "block_size 3 does not divide 12 x 8; the nearest that does is 2"),
        (at.FourierFT(frequencies=97), "frequencies 97 is larger than its 96 entries; the most is 96"),
        (at.GraLoRA(rank=4, tiles=3), "tiles 3 does not divide 12 x 8; the nearest that does is 2"),
        (at.GraLoRA(rank=3, tiles=2), "tiles 2 does not divide the rank 3; the nearest rank is 2"),
        (at.VBLoRA(vector_length=8), "vector_length 8 does not divide 12 x 8; the nearest that does is 4"),
        (at.VBLoRA(vectors=2, vector_length=4, topk=3), "3 of 2 vectors cannot be chosen; the most is 2"),
        (at.RoAd(group_size=8), "group_size 8 does not divide its 12 outputs; the nearest that does is 6"),
    ],
)
def test_what_does_not_fit_is_refused(method: at.Method, words: str) -> None:
    net = nn.Sequential(nn.Linear(INPUTS, OUT))
    with pytest.raises(at.AttunementError, match=words):
        at.adapt(net, method, on="0")
    assert at.adapters(net) == {}


def test_a_group_has_an_even_size() -> None:
    with pytest.raises(at.AttunementError, match="group_size must be"):
        at.RoAd(group_size=5)
