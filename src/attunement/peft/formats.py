"""Which PEFT type each method is."""

from __future__ import annotations

from attunement.method import Method
from attunement.methods.low_rank.adalora import AdaLoRA
from attunement.methods.low_rank.adamss import AdaMSS
from attunement.methods.low_rank.as_lora import ASLoRA
from attunement.methods.low_rank.bone import Bone
from attunement.methods.low_rank.corda import CorDA
from attunement.methods.low_rank.deft import DEFT
from attunement.methods.low_rank.delora import DeLoRA
from attunement.methods.low_rank.dora import DoRA
from attunement.methods.low_rank.eva import EVA
from attunement.methods.low_rank.glora import GLoRA
from attunement.methods.low_rank.gralora import GraLoRA
from attunement.methods.low_rank.hira import HiRA
from attunement.methods.low_rank.kasa import KaSA
from attunement.methods.low_rank.lily import Lily
from attunement.methods.low_rank.loha import LoHa
from attunement.methods.low_rank.lokr import LoKr
from attunement.methods.low_rank.lora import LoRA
from attunement.methods.low_rank.lora_fa import LoRAFA
from attunement.methods.low_rank.lora_ga import LoRAGA
from attunement.methods.low_rank.miss import MiSS
from attunement.methods.low_rank.olora import OLoRA
from attunement.methods.low_rank.orthogonal_adaptation import OrthogonalAdaptation
from attunement.methods.low_rank.peanut import PEANuT
from attunement.methods.low_rank.pissa import PiSSA
from attunement.methods.low_rank.poly import Poly
from attunement.methods.low_rank.pvera import PVeRA
from attunement.methods.low_rank.randlora import RandLoRA
from attunement.methods.low_rank.share_lora import ShareLoRA
from attunement.methods.low_rank.tiny_lora import TinyLoRA
from attunement.methods.low_rank.uni_lora import UniLoRA
from attunement.methods.low_rank.vb_lora import VBLoRA
from attunement.methods.low_rank.vera import VeRA
from attunement.methods.orthogonal.boft import BOFT
from attunement.methods.orthogonal.frod import FRoD
from attunement.methods.orthogonal.hra import HRA
from attunement.methods.orthogonal.oft import OFT
from attunement.methods.orthogonal.osf import OSF
from attunement.methods.orthogonal.psoft import PSOFT
from attunement.methods.orthogonal.road import RoAd
from attunement.methods.scaling.beft import BEFT
from attunement.methods.scaling.ia3 import IA3
from attunement.methods.selective.ist import IST
from attunement.methods.sparse.sparse import Sparse
from attunement.methods.sparse.super_tuning import SuperTuning
from attunement.methods.spectral.c3a import C3A
from attunement.methods.spectral.fourierft import FourierFT
from attunement.methods.spectral.waveft import WaveFT
from attunement.peft.format import Format
from attunement.peft.lora import ADALORA, KASA, LORA, STARTED
from attunement.peft.orthogonal import BOFT_, HRA_, OFT_, OSF_, PSOFT_
from attunement.peft.products import (
    BONE,
    C3A_,
    DEFT_,
    DELORA,
    FOURIERFT,
    GLORA,
    GRALORA,
    HIRA,
    LOHA,
    LOKR,
    MISS,
    PEANUT,
    POLY,
    RANDLORA,
    ROAD,
    VBLORA,
    WAVEFT,
)
from attunement.peft.seeded import ADAMSS, FROD, FROZEN, LILY, PVERA, TINYLORA, UNILORA, VERA
from attunement.peft.tokens import TRAINABLE_TOKENS
from attunement.peft.vectors import BEFT_, IA3_, SHIRA, SUPERTUNING

LN_TUNING = "LN_TUNING"
FORMATS: dict[type[Method], Format] = {
    LoRA: LORA,
    DoRA: LORA,
    VeRA: VERA,
    IA3: IA3_,
    BEFT: BEFT_,
    HRA: HRA_,
    OFT: OFT_,
    BOFT: BOFT_,
    OSF: OSF_,
    Sparse: SHIRA,
    SuperTuning: SUPERTUNING,
    IST: LORA,
    EVA: LORA,
    CorDA: STARTED,
    PiSSA: STARTED,
    OLoRA: STARTED,
    LoRAGA: STARTED,
    KaSA: KASA,
    PSOFT: PSOFT_,
    GLoRA: GLORA,
    PEANuT: PEANUT,
    Poly: POLY,
    AdaLoRA: ADALORA,
    LoHa: LOHA,
    LoKr: LOKR,
    HiRA: HIRA,
    MiSS: MISS,
    Bone: BONE,
    DEFT: DEFT_,
    DeLoRA: DELORA,
    VBLoRA: VBLORA,
    RandLoRA: RANDLORA,
    FourierFT: FOURIERFT,
    WaveFT: WAVEFT,
    GraLoRA: GRALORA,
    C3A: C3A_,
    RoAd: ROAD,
    TinyLoRA: TINYLORA,
    UniLoRA: UNILORA,
    PVeRA: PVERA,
    AdaMSS: ADAMSS,
    Lily: LILY,
    FRoD: FROD,
    LoRAFA: FROZEN,
    ShareLoRA: FROZEN,
    ASLoRA: FROZEN,
    OrthogonalAdaptation: FROZEN,
}
LAYERS = {layer for format in FORMATS.values() for layer in format.layers}
"""The classes of which it is known for every format whether PEFT has it there."""
KINDS: dict[str, Format | None] = {
    **{format.kind: format for format in FORMATS.values()},
    **dict.fromkeys((LN_TUNING, TRAINABLE_TOKENS)),
}
