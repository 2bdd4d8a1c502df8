"""The keys of steps, rates, evaluation and saving."""

from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool

from .schema import SIDE, STEPS, Section, key


class TrainSection(Section):
    max_steps: int | None = key(
        None, "The length of training.", unit="optimizer steps", ge=1, le=STEPS, example=1000,
        unset="train.epochs is given instead",
    )  # fmt: skip
    epochs: float | None = key(
        None, "The length of training, as often as all of data.train is seen. A part of a step becomes a whole one. "
        "Of a list of sources an epoch is as many samples as all of them have. "
        "A hub dataset needs data.max_tokens too.", unit="passes over data.train", gt=0, le=SIDE, example=3,
        unset="train.max_steps is given instead",
    )  # fmt: skip
    micro_batch_size: int = key(8, "Rows that go through the model at once.", unit="rows", ge=1, lt=SIDE)
    grad_accumulation: int = key(
        1, "Micro-batches of a step, those of all processes together.", unit="micro-batches", ge=1, lt=SIDE
    )
    lr: float = key(..., "The peak learning rate.", gt=0, le=100, example=0.001)
    weight_decay: float = key(
        0.0, "Decoupled weight decay. A step shrinks weights by lr · weight_decay.", ge=0, le=1000
    )
    warmup_steps: int = key(
        0, "The learning rate rises linearly for this long at the start.", unit="optimizer steps", ge=0, le=STEPS
    )
    warmup_ratio: float | None = key(
        None, "The length of the warm-up as a share of all steps, rounded up to whole ones.", ge=0, le=1, example=0.03,
        unset="train.warmup_steps says it",
    )  # fmt: skip
    lr_schedule: Literal["cosine", "linear", "constant"] = key("cosine", "How the learning rate falls after warm-up.")
    min_lr_ratio: float = key(0.1, "The learning rate of the last step, as a share of train.lr.", ge=0, le=1)
    restart_schedule: bool = key(
        False, "Whether a run that `--resume PATH` begins on another run's checkpoint takes its weights, moments and "
        "bases alone. Steps, data and the learning rate then begin anew, and their keys may be others.",
    )  # fmt: skip
    clip_grad_norm: float = key(
        0.0, "The largest global norm of the gradient. With 0 nothing is clipped.", ge=0, le=1e9
    )
    clip_update_rms: float = key(
        0.0, "The largest root mean square of a matrix's update before the learning rate, for a rule that needs full "
        "gradients. With 0 nothing is clipped.", ge=0, le=1e9,
    )  # fmt: skip
    optimizer: str | None = key(
        None, "The optimizer of the projected gradients: `adamw8bit`, `adamw4bit`, `adamw`, or the dotted path of a "
        "torch.optim.Optimizer class.", min_length=1, example="torch.optim.Adafactor", unset="the method's own",
    )  # fmt: skip
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = key(
        (0.9, 0.999), "Adam's decay rates of the first and the second moment."
    )
    eps: float = key(1e-8, "Adam's ε, added to the root of the second moment.", gt=0, le=1)
    optimizer_options: dict[str, Any] = key(
        {}, "Arguments of an optimizer given by its dotted path.",
        rule="a mapping of argument names to values, such as {momentum: 0.9}", example={"momentum": 0.9},
    )  # fmt: skip
    order: Literal["auto", "layer_major", "batch_major"] = key(
        "auto", "Whether all micro-batches of a step go through one block before the next one begins (`layer_major`), "
        "or one micro-batch after another goes through the whole model (`batch_major`). With `auto` the steps are "
        "layer-major where the model can be walked block by block.",
    )  # fmt: skip
    stepping: Literal["auto", "fused", "deferred"] = key(
        "auto",
        "Whether a tensor steps as soon as its gradient is there (`fused`), or all step at the end (`deferred`). "
        "It is for batch-major steps.",
    )
    full_gradients: Literal["free", "keep"] = key(
        "free",
        "With `keep`, a rule that needs full gradients may step deferred. It then keeps those of all layers at once.",
    )
    activation_checkpointing: StrictBool | Literal["auto", "offload"] | Annotated[int, Field(ge=1, le=SIDE)] = key(
        "auto", "Whether blocks run again in the backward pass, which saves their activations (`true`), and whether "
        "their inputs wait in host memory until then (`offload`). A number says how many of the last blocks keep their "
        "activations; the others run again. With `auto` the plan takes the fastest way that it has room for.",
    )  # fmt: skip
    eval_every: int = key(
        100, "How often the held-out loss is measured. It also is before the first step and after the last.",
        unit="optimizer steps", ge=1, le=STEPS,
    )  # fmt: skip
    eval_batches: int | None = key(
        None, "The held-out loss is measured on this many micro-batches of each held-out set.", unit="micro-batches",
        ge=1, le=STEPS, example=50, unset="on all of the held-out data",
    )  # fmt: skip
    save_every: int | None = key(
        None, "How often a checkpoint is saved.", unit="optimizer steps", ge=1, le=STEPS, example=500,
        unset="after every 30 minutes of work, and at the end",
    )  # fmt: skip
    keep_last: int = key(2, "How many of the newest checkpoints are kept.", unit="checkpoints", ge=1, le=STEPS)
    keep_every: int | None = key(
        None, "Checkpoints of steps that are multiples of this are kept as well.", unit="optimizer steps", ge=1,
        le=STEPS, example=10_000, unset="none of them",
    )  # fmt: skip
    keep_best: bool = key(False, "Whether to save and keep the checkpoint with the lowest held-out loss.")
    early_stopping: int | None = key(
        None, "The run stops after this many evaluations without a lower held-out loss.", unit="evaluations", ge=1,
        le=STEPS, example=5, unset="the run never stops early",
    )  # fmt: skip
    max_skipped_in_a_row: int = key(
        5, "If a loss or gradient is not finite, its step is skipped. More of them in a row than this end the run.",
        unit="optimizer steps", ge=1, le=STEPS,
    )  # fmt: skip
    loss_spike: Literal["off", "warn", "skip", "rollback"] = key(
        "warn",
        "What to do about a loss far above those before it: nothing, a printed line, no step, or back to a checkpoint.",
    )
    spike_threshold: float = key(
        8.0, "How far above the mean of the last 100 losses a spike begins.", unit="standard deviations", gt=0, le=1e6
    )

    @property
    def steps(self) -> int:
        """The optimizer steps of the run. Where ``epochs`` are given, they are only known once the data are, and then
        :func:`duration.with_steps` sets ``max_steps``."""
        assert self.max_steps is not None, "the steps of a run given in epochs are asked for before its data are known"
        return self.max_steps
