"""What Hugging Face's ``Trainer`` would do to a converted model without a word, refused."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from .errors import ConfigError
from .lowrank.optimizer import LowRankOptimizer

STORED_AS = "qgalore-checkpoint"


def _plain(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


class TrainerGuard(TrainerCallback):
    """Pass one to ``Trainer(callbacks=[...])``. It raises :class:`ConfigError` at the start of training where the two
    do not go together, and marks Trainer's checkpoints: their weights are int8 codes, which ``from_pretrained`` would
    read as if they were weights. ``Trainer`` resumes from them, ``qgalore.load`` reads them, ``qgalore.save`` writes a
    folder for ``from_pretrained``.
    """

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
        """Look at what Trainer is about to do."""
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
        if args.fp16:
            problems.append("fp16=True scales the loss, and a basis would be sought in scaled gradients: set bf16=True")
        if args.world_size > 1 or args.n_gpu > 1:
            problems.append(
                f"{args.world_size} processes, {args.n_gpu} devices: use one of each (CUDA_VISIBLE_DEVICES=0)"
            )
        if problems:
            raise ConfigError("Trainer cannot train this model as it is set up: " + "; ".join(problems))

    def on_save(self, args, state, control, **kwargs) -> None:
        """Name the checkpoint's model type so that no ``AutoModel`` takes its int8 codes for weights."""
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "config.json"
        if path.is_file():
            fields = json.loads(path.read_text(encoding="utf-8"))
            if fields.get("model_type") != STORED_AS:
                fields |= {"model_type": STORED_AS, "converted_model_type": fields.get("model_type")}
                path.write_text(json.dumps(fields, indent=2), encoding="utf-8")
