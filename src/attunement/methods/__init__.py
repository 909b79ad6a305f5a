"""The methods, one file each. Importing this package registers them."""

from attunement.methods.bottleneck.adapter_bias import AdapterBias
from attunement.methods.bottleneck.bottleneck import Bottleneck
from attunement.methods.bottleneck.hyperformer import HyperFormer
from attunement.methods.low_rank.adalora import AdaLoRA
from attunement.methods.low_rank.adamss import AdaMSS
from attunement.methods.low_rank.as_lora import ASLoRA
from attunement.methods.low_rank.autolora import AutoLoRA
from attunement.methods.low_rank.bone import Bone
from attunement.methods.low_rank.colora import CoLoRA
from attunement.methods.low_rank.conv_lora import ConvLoRA
from attunement.methods.low_rank.corda import CorDA
from attunement.methods.low_rank.deft import DEFT
from attunement.methods.low_rank.delora import DeLoRA
from attunement.methods.low_rank.dora import DoRA
from attunement.methods.low_rank.eva import EVA
from attunement.methods.low_rank.flexora import Flexora
from attunement.methods.low_rank.glora import GLoRA
from attunement.methods.low_rank.gralora import GraLoRA
from attunement.methods.low_rank.hira import HiRA
from attunement.methods.low_rank.hydra import Hydra
from attunement.methods.low_rank.increlora import IncreLoRA
from attunement.methods.low_rank.int21 import INT21
from attunement.methods.low_rank.inttune import IntTune
from attunement.methods.low_rank.kasa import KaSA
from attunement.methods.low_rank.lily import Lily
from attunement.methods.low_rank.loha import LoHa
from attunement.methods.low_rank.lokr import LoKr
from attunement.methods.low_rank.lora import LoRA
from attunement.methods.low_rank.lora_fa import LoRAFA
from attunement.methods.low_rank.lora_ga import LoRAGA
from attunement.methods.low_rank.lora_xs import LoRAXS
from attunement.methods.low_rank.lotr import LoTR
from attunement.methods.low_rank.miss import MiSS
from attunement.methods.low_rank.mos import MoS
from attunement.methods.low_rank.mt_lora import MTLoRA
from attunement.methods.low_rank.nlora import NLoRA
from attunement.methods.low_rank.nola import NOLA
from attunement.methods.low_rank.nora import NoRA
from attunement.methods.low_rank.olora import OLoRA
from attunement.methods.low_rank.orthogonal_adaptation import OrthogonalAdaptation
from attunement.methods.low_rank.peanut import PEANuT
from attunement.methods.low_rank.pissa import PiSSA
from attunement.methods.low_rank.poly import Poly
from attunement.methods.low_rank.pvera import PVeRA
from attunement.methods.low_rank.randlora import RandLoRA
from attunement.methods.low_rank.share_lora import ShareLoRA
from attunement.methods.low_rank.slora import SLoRA
from attunement.methods.low_rank.svfit import SVFit
from attunement.methods.low_rank.tiny_lora import TinyLoRA
from attunement.methods.low_rank.triadaptlora import TriAdaptLoRA
from attunement.methods.low_rank.uni_lora import UniLoRA
from attunement.methods.low_rank.vb_lora import VBLoRA
from attunement.methods.low_rank.vera import VeRA
from attunement.methods.low_rank.voicetailor import VoiceTailor
from attunement.methods.orthogonal.boft import BOFT
from attunement.methods.orthogonal.clover import CLOVER
from attunement.methods.orthogonal.frod import FRoD
from attunement.methods.orthogonal.hra import HRA
from attunement.methods.orthogonal.oft import OFT
from attunement.methods.orthogonal.osf import OSF
from attunement.methods.orthogonal.pego import PEGO
from attunement.methods.orthogonal.psoft import PSOFT
from attunement.methods.orthogonal.road import RoAd
from attunement.methods.orthogonal.tarot import TaRot
from attunement.methods.prompts.cartridge import Cartridge
from attunement.methods.prompts.dept import DePT
from attunement.methods.prompts.llama_adapter import LLaMAAdapter
from attunement.methods.prompts.multitask_prompt import MultitaskPrompt
from attunement.methods.prompts.p_tuning import PTuning
from attunement.methods.prompts.prefix import Prefix
from attunement.methods.prompts.prompt import Prompt
from attunement.methods.prompts.vpt import VPT
from attunement.methods.scaling.beft import BEFT
from attunement.methods.scaling.ia3 import IA3
from attunement.methods.scaling.ssf import SSF
from attunement.methods.selective.ist import IST
from attunement.methods.selective.lisa import LISA
from attunement.methods.selective.train import Train
from attunement.methods.side.lst import LST
from attunement.methods.side.unipt import UniPT
from attunement.methods.side.vqt import VQT
from attunement.methods.sparse.diff_pruning import DiffPruning
from attunement.methods.sparse.fish_mask import FishMask
from attunement.methods.sparse.grafting import Grafting
from attunement.methods.sparse.lt_sft import LTSFT
from attunement.methods.sparse.r_amt import RAMT
from attunement.methods.sparse.s2ft import S2FT
from attunement.methods.sparse.sparse import Sparse
from attunement.methods.sparse.spt import SPT
from attunement.methods.sparse.super_tuning import SuperTuning
from attunement.methods.sparse.taps import TAPS
from attunement.methods.spectral.c3a import C3A
from attunement.methods.spectral.fourierft import FourierFT
from attunement.methods.spectral.said import SAID
from attunement.methods.spectral.waveft import WaveFT

__all__ = [
    "BEFT",
    "BOFT",
    "C3A",
    "CLOVER",
    "DEFT",
    "EVA",
    "HRA",
    "IA3",
    "INT21",
    "IST",
    "LISA",
    "LST",
    "LTSFT",
    "NOLA",
    "OFT",
    "OSF",
    "PEGO",
    "PSOFT",
    "RAMT",
    "S2FT",
    "SAID",
    "SPT",
    "SSF",
    "TAPS",
    "VPT",
    "VQT",
    "ASLoRA",
    "AdaLoRA",
    "AdaMSS",
    "AdapterBias",
    "AutoLoRA",
    "Bone",
    "Bottleneck",
    "Cartridge",
    "CoLoRA",
    "ConvLoRA",
    "CorDA",
    "DeLoRA",
    "DePT",
    "DiffPruning",
    "DoRA",
    "FRoD",
    "FishMask",
    "Flexora",
    "FourierFT",
    "GLoRA",
    "GraLoRA",
    "Grafting",
    "HiRA",
    "Hydra",
    "HyperFormer",
    "IncreLoRA",
    "IntTune",
    "KaSA",
    "LLaMAAdapter",
    "Lily",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAFA",
    "LoRAGA",
    "LoRAXS",
    "LoTR",
    "MTLoRA",
    "MiSS",
    "MoS",
    "MultitaskPrompt",
    "NLoRA",
    "NoRA",
    "OLoRA",
    "OrthogonalAdaptation",
    "PEANuT",
    "PTuning",
    "PVeRA",
    "PiSSA",
    "Poly",
    "Prefix",
    "Prompt",
    "RandLoRA",
    "RoAd",
    "SLoRA",
    "SVFit",
    "ShareLoRA",
    "Sparse",
    "SuperTuning",
    "TaRot",
    "TinyLoRA",
    "Train",
    "TriAdaptLoRA",
    "UniLoRA",
    "UniPT",
    "VBLoRA",
    "VeRA",
    "VoiceTailor",
    "WaveFT",
]
