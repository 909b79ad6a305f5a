"""PEFT's format, both ways: `adapter_config.json` and `adapter_model.safetensors`, as the `peft` package has them.

A `Format` maps one PEFT type to a method here: configuration to hyper-parameters, tensor names and shapes, and back.
The tensors of a file, not the patterns in its configuration, say which modules are adapted. Modules that PEFT saves
whole (`modules_to_save`, tuned norms), biases and rows of embeddings are `Train`. What one side cannot express is
refused with a sentence.

A transposed `Conv1D` needs no conversion: both sides keep B (out, r) and A (r, in) for it.
"""

from attunement.peft.folder import load, read, save, written
from attunement.peft.formats import FORMATS

__all__ = ["FORMATS", "load", "read", "save", "written"]
