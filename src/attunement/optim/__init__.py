"""Optimisers that keep what they know of a matrix in a low rank, around any optimiser of PyTorch."""

from attunement.optim.galore import GaLore
from attunement.optim.grad_norm_lorp import GradNormLoRP

__all__ = ["GaLore", "GradNormLoRP"]
