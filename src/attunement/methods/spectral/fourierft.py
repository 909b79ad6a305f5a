"""FourierFT: a few entries of the spectrum of a weight's change, trained."""

import torch
from pydantic import NonNegativeInt, PositiveFloat
from torch import Tensor

from attunement.method import Tensors, WeightMethod, register
from attunement.methods._entries import Frequencies, spectrum
from attunement.site import Site


@register("spectral/fourierft", source="https://arxiv.org/abs/2405.03003", placement="attention.{query,value}")
class FourierFT(WeightMethod):
    """Discrete Fourier change: W' = W + scale Re(ifft2(S)), S (out, in) zero but for `spectrum` at fixed random entries.

    Args:
        frequencies: how many entries of the spectrum train in each matrix; 1000.
        scale: 150, as in PEFT; the inverse transform divides by out * in.
        seed: of the entries, one for all matrices: matrices of one size have the same. 777, whose entries are PEFT's.

    Start: spectrum zero. The paper and PEFT draw it from normal(0, 1), which changes the model before training. Where the
    entries are follows from the seed and is not stored. The paper's choice of a frequency band is left out.
    """

    frequencies: Frequencies = 1000
    scale: PositiveFloat = 150.0
    seed: NonNegativeInt = 777

    def tensors(self, site: Site) -> Tensors:
        return spectrum(site, self.frequencies, self.seed)  # (frequencies,) each

    def delta(self, _W: Tensor, spectrum: Tensor, index: Tensor) -> Tensor:
        S = spectrum.new_zeros(_W.numel()).scatter(0, index, spectrum).view(_W.shape)  # (out, in)
        return self.scale * torch.fft.ifft2(S).real
