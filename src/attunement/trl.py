"""TRL's trainers for adapted models: what `at.Trainer` is to the trainer of `transformers`.

TRL's own classes work as they are, with `callbacks=[at.Callback()]`; these write checkpoints without the base, resume,
give every method its rates and penalty, and have a reference model that is no second model.

    trainer = at.trl.SFTTrainer(model, args=SFTConfig(...), train_dataset=rows, processing_class=tokenizer)
    trainer = at.trl.DPOTrainer(model, args=DPOConfig(...), train_dataset=pairs, processing_class=tokenizer)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

import attunement as at
from attunement.compose import Active, checked
from attunement.errors import AttunementError
from attunement.train.trainer import Trainer, trained_adapters

try:
    import trl
except ImportError as error:
    raise ImportError("attunement.trl needs the package trl: pip install trl") from error


class SFTTrainer(Trainer, trl.SFTTrainer):  # type: ignore[misc]
    """`trl.SFTTrainer` for adapted models; takes and gives the same, and does what `at.Trainer` does.

    Raises `AttunementError` for a method that acts around a language-model head rather than on its weight: TRL reads
    the weight and does not call the head.
    """

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any):
        _check_head(model, kwargs)
        super().__init__(model, *args, **kwargs)


class DPOTrainer(Trainer, trl.DPOTrainer):  # type: ignore[misc]
    """`trl.DPOTrainer` for adapted models; takes and gives the same, and does what `at.Trainer` does.

    The reference is the same model with other adapters active, so it takes no memory and nothing is loaded.

    Args:
        model: an adapted model, its policy active.
        reference: what is active in the reference: `None`, the bare base, or for example the adapter of an earlier
            fine-tuning that the policy is stacked on.

    Raises `AttunementError` as `SFTTrainer` does, and for `sync_ref_model`, which would need a second model.
    """

    def __init__(
        self,
        model: nn.Module,
        ref_model: nn.Module | None = None,
        args: Any = None,
        reference: Active = None,
        **kwargs: Any,
    ):
        _check_head(model, kwargs)
        checked(reference, at.adapters(model))
        self.reference, bare = reference, None
        if ref_model is None and not getattr(args, "precompute_ref_log_probs", False):
            if getattr(args, "sync_ref_model", False):
                raise AttunementError(
                    "DPOTrainer: sync_ref_model moves a second model along, and the reference is the same model; pass "
                    "ref_model, or sync_ref_model=False"
                )
            ref_model = bare = Reference(model, reference)
        super().__init__(model, ref_model, args, **kwargs)
        if bare is not None:
            self.ref_model = bare  # type: ignore[assignment] # without what a distributed set-up wraps around a model

    def _precompute_ref_logps(self, *args: Any) -> Any:
        model_hash = self._precompute_model_hash  # names the file in the cache, which knows nothing of the active set
        self._precompute_model_hash = f"{model_hash} {self.reference!r}"
        try:
            return super()._precompute_ref_logps(*args)
        finally:
            self._precompute_model_hash = model_hash

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """What is precomputed of the reference."""
        if self.ref_model is not None:
            return super().compute_ref_log_probs(model, inputs)
        with at.using(self.adapted, self.reference):
            return super().compute_ref_log_probs(model, inputs)


class Reference(nn.Module):
    """An adapted model as it is with another active set: no parameters of its own, and never trained."""

    def __init__(self, model: nn.Module, active: Active = None):
        super().__init__()
        self.config = model.config
        self.__dict__["_policy"] = model  # not a child: the modes and devices of the policy are not its business
        self.active = active

    # not `forward`, which TRL exchanges for its own and finds exchanged in the policy
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        policy: Any = self.__dict__["_policy"]
        with at.using(policy, self.active):
            return policy(*args, **kwargs)


def _check_head(model: nn.Module, options: Mapping[str, Any]) -> None:
    if options.get("peft_config") is not None:
        raise AttunementError("trl: peft_config would have PEFT adapt a model that is adapted here; leave it out")
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for name, adapter in trained_adapters(model).items():
        for part in adapter.parts:
            if head is not None and part.site.module is head and part.form in ("input", "output"):
                raise AttunementError(
                    f"trl: {type(part.method).__name__} of adapter {name!r} acts around {part.site.name!r}, which TRL does "
                    "not call but reads the weight of, so it would not train; expected a method that changes the weight there"
                )
