"""SAID: the whole model moves in a random subspace of a few dimensions."""

import math

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from attunement.method import Tensors, WeightMethod, register, seeded
from attunement.methods._sharing import own
from attunement.site import Site

BLOCK = 32


@register("spectral/said", source="https://arxiv.org/abs/2012.13255", placement="attention.*|mlp.*")
class SAID(WeightMethod):
    """Structure-aware intrinsic dimension: W' = W + gain P theta, theta (size,) one for all matrices, gain (1,) of each.

    P is a Fastfood transform, P theta = H G Pi H S theta up to a constant: S random signs, H the Walsh-Hadamard transform,
    Pi a random permutation, G normal numbers on a diagonal, all of the next power of two and of each matrix's own.

    Args:
        size: how many numbers theta has; 1000. The gains come on top: the paper's d counts them.
        structured: whether there are gains; without them it is the plain intrinsic dimension ("DID").
        seed: of S, Pi and G.

    Start: theta zero, gains one. The constant is that of the published code, 1 / sqrt(out in sum G^2). The backward pass of
    that code has a gradient smaller by the transform's size. The paper moves biases, norms and embeddings too.
    `attunement.intrinsic_dimension` finds the smallest size that is enough.
    """

    size: PositiveInt = 1000
    structured: bool = True
    seed: NonNegativeInt = 0

    def shared(self, sites: list[Site]) -> Tensors:
        H = torch.ones(1, 1)
        while len(H) < BLOCK:
            H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)))
        return {"theta": torch.zeros(self.size), "H": seeded(H)}  # (size,), (BLOCK, BLOCK)

    def tensors(self, site: Site) -> Tensors:
        entries, generator = site.outputs * site.inputs, own(self.seed, site)
        length = 1 << (max(entries, self.size) - 1).bit_length()
        signs = torch.randint(2, (self.size,), generator=generator) * 2 - 1
        turn = torch.randperm(length, generator=generator)
        G = torch.randn(length, generator=generator)
        return {
            **({"gain": torch.ones(1)} if self.structured else {}),
            "signs": seeded(signs.to(torch.int8)),  # (size,): those of the padding do not matter
            "turn": seeded(turn.int()),  # (length,)
            "G": seeded(G / (math.sqrt(entries) * torch.linalg.vector_norm(G))),  # (length,)
        }

    def delta(
        self, _W: Tensor, theta: Tensor, H: Tensor, signs: Tensor, turn: Tensor, G: Tensor, gain: Tensor | None = None
    ) -> Tensor:
        padded = torch.nn.functional.pad(theta * signs, (0, G.shape[0] - theta.shape[0]))  # (length,)
        D = hadamard(hadamard(padded, H)[turn] * G, H)[: _W.numel()].view(_W.shape)  # (out, in)
        return D if gain is None else gain * D


def hadamard(x: Tensor, H: Tensor) -> Tensor:
    """The Walsh-Hadamard transform, not normalised, of a vector (2^n,), with H (b, b) in blocks of b at a time."""
    done = 1
    while done < x.numel():
        size = min(len(H), x.numel() // done)
        x = (H[:size, :size] @ x.view(-1, size, done)).view(-1)
        done *= size
    return x
