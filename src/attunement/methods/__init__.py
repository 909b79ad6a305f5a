"""The methods, one file each. Importing this package registers them."""

from attunement.methods.bottleneck.bottleneck import Bottleneck
from attunement.methods.low_rank.dora import DoRA
from attunement.methods.low_rank.lora import LoRA
from attunement.methods.low_rank.svfit import SVFit
from attunement.methods.low_rank.vera import VeRA
from attunement.methods.orthogonal.hra import HRA
from attunement.methods.scaling.ia3 import IA3
from attunement.methods.scaling.ssf import SSF
from attunement.methods.selective.train import Train

__all__ = ["HRA", "IA3", "SSF", "Bottleneck", "DoRA", "LoRA", "SVFit", "Train", "VeRA"]
