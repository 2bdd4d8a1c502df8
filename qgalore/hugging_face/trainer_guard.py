"""What Hugging Face's ``Trainer`` would do to a converted model without a word, refused."""

from typing import Any

from transformers import TrainerCallback

from ..errors import ConfigError, counted
from ..lowrank.optimizer import LowRankOptimizer
from . import fused_heads


def _plain(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


class TrainerGuard(TrainerCallback):
    """Pass one to ``Trainer(callbacks=[...])``. It raises :class:`ConfigError` at the start of training where the two
    do not go together. With and without it ``Trainer.save_model`` writes what ``qgalore.save`` does, and Trainer's
    checkpoints hold the model's own tensors, for ``Trainer`` to resume from and ``qgalore.load`` to read.
    """

    def __init__(self) -> None:
        self._looked = False

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        optimizer = _plain(optimizer)
        problems = []
        if not isinstance(optimizer, LowRankOptimizer):
            problems.append("it has made an optimizer of its own: pass optimizers=(qgalore.optimizer(model, …), None)")
        elif optimizer.stepping == "fused":
            if args.gradient_accumulation_steps > 1:
                problems.append(
                    f"gradient_accumulation_steps={args.gradient_accumulation_steps} needs stepping='deferred'"
                )
            if args.max_grad_norm and args.max_grad_norm > 0:
                problems.append(
                    f"max_grad_norm={args.max_grad_norm} finds no gradients under fused stepping: set max_grad_norm=0 "
                    "or stepping='deferred'"
                )
        if getattr(args, "use_liger_kernel", False) and fused_heads.converted_head(model):
            problems.append(
                f"use_liger_kernel=True reads the weight of the converted head itself: {fused_heads.REMEDY}"
            )
        if getattr(args, "sync_ref_model", False):
            problems.append("sync_ref_model=True mixes stored int8 codes as if they were weights: set it to False")
        if args.fp16:
            problems.append("fp16=True scales the loss, and a basis would be sought in scaled gradients: set bf16=True")
        if args.world_size > 1 or args.n_gpu > 1:
            problems.append(
                f"{args.world_size} processes, {args.n_gpu} devices: use one of each (CUDA_VISIBLE_DEVICES=0)"
            )
        if problems:
            raise ConfigError("Trainer cannot train this model as it is set up: " + "; ".join(problems))

    def on_step_end(self, args, state, control, optimizer=None, **kwargs) -> None:
        """Say which tensors the first step did not reach."""
        names = getattr(_plain(optimizer), "untouched", [])
        if names and not self._looked:
            many = counted(len(names), "tensor")
            print(f"warning: {many} got no gradient in the first step, for example {names[0]}", flush=True)
        self._looked = True
