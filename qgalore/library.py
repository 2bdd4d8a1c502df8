"""Converting, saving and loading for programs that train with :func:`qgalore.optimizer` in a loop of their own."""

import copy
import json
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from .errors import ConfigError
from .files import atomic, checkpoint, export_hf
from .files import export_folder as folders
from .files.safetensors import write_safetensors
from .hugging_face import fused_heads
from .lowrank.layers.guard import Guard
from .lowrank.layers.linear import CODES, LowRankLinear
from .models import convert as conversion
from .replacing import replaced

STORED_AS = "qgalore-checkpoint"  # the model type that a Trainer's checkpoint names
_CHECKPOINT = re.compile(r"checkpoint-\d+")  # what Hugging Face's Trainer calls the folders it resumes from


@register_quantization_config(folders.STORED)
class _Stored(QuantizationConfigMixin):
    """The mark in the config of a converted model, as ``from_pretrained`` meets it. Without it transformers would warn
    of an unknown method and go on with random weights."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **options: Any) -> "_Stored":
        raise ConfigError(
            "this folder holds the own tensors of a model that qgalore.convert changed, not its weights; write one for "
            "from_pretrained with qgalore.save, or load these with qgalore.load into a converted model"
        )


@wraps(conversion.convert)
def convert(model: nn.Module, **options: Any) -> conversion.ConversionReport:
    report = conversion.convert(model, **options)
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            module.code_key = CODES
            if module.guard is None:
                module.set_guard(Guard(name))
        if isinstance(module, PreTrainedModel):
            module.save_pretrained = _Saving(module)
            fused_heads.watch(module)
    for module in [m for m in model.modules() if isinstance(m, PreTrainedModel)]:
        if not folders.marked(module.config):
            _mark(model, module.config)
    return report


def _mark(model: nn.Module, config: PretrainedConfig) -> None:
    """Mark ``config``, as a copy that all modules of ``model`` get: whoever gave it may build other models of it."""
    copies: dict[int, Any] = {}
    twin = copy.deepcopy(config, copies)
    for module in model.modules():
        own = module.__dict__.get("config")
        if isinstance(own, PretrainedConfig) and id(own) in copies:
            module.config = copies[id(own)]
    folders.mark(twin)


class _Saving:
    """``save_pretrained`` of a converted model. It does not keep the model alive, and follows it into copies."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Saving":
        return _Saving(memo.get(id(self._model()), self._model()))

    def __reduce__(self) -> tuple[Any, ...]:
        return _Saving, (self._model(),)

    def __call__(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        distributed_checkpoint: bool = False,
        **options: Any,
    ) -> None:
        """As :func:`save` writes it. A folder called checkpoint-… is Trainer's, to resume from: it gets the model's own
        tensors, under a model type that ``from_pretrained`` does not take. Raises :class:`ConfigError`."""
        model = self._model()
        own = {value.data_ptr() for value in model.state_dict().values()}
        asked = {"push_to_hub": push_to_hub, "variant": variant, "distributed_checkpoint": distributed_checkpoint}
        asked["state_dict"] = state_dict is not None and not {v.data_ptr() for v in state_dict.values()} <= own
        if refused := [key for key, value in asked.items() if value]:
            raise ConfigError(
                f"save_pretrained of a converted model was given {', '.join(refused)}, which it cannot follow; use "
                "qgalore.save(model, folder), or model.push_to_hub(name)"
            )
        if not is_main_process:
            return
        folder = Path(save_directory)
        if _CHECKPOINT.fullmatch(folder.name):
            _save_stored(model, folder)
        else:
            save(model, folder, max_shard_size=max_shard_size)


def _save_stored(model: PreTrainedModel, folder: Path) -> None:
    """The model's own tensors, int8 codes and bases included, with a config that names them as such."""
    with _writing(folder) as building, _codes_called("weight", model):
        write_safetensors(
            building / "model.safetensors", checkpoint._unshared(model.state_dict()), metadata={"format": "pt"}
        )
        fields = json.loads(folders.plain_config(model).to_json_string())
        fields |= {"model_type": STORED_AS, "converted_model_type": fields.get("model_type")}
        (building / "config.json").write_text(json.dumps(fields, indent=2), encoding="utf-8")


@contextmanager
def _writing(folder: Path) -> Iterator[Path]:
    """Where to write ``folder``'s files; they appear together. Raises :class:`ConfigError` if they cannot."""
    with atomic.explained(str(folder), "Free space or give another folder"), folders.whole(folder) as building:
        yield building


@contextmanager
def _codes_called(name: str, model: nn.Module) -> Iterator[None]:
    """Inside, the state dict of ``model`` calls int8 codes ``name``."""
    layers = (module for module in model.modules() if isinstance(module, LowRankLinear))
    with replaced((layer, "code_key", name) for layer in layers):
        yield


def save(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: int | str | None = None,
) -> None:
    """Write a converted ``model`` as an ordinary Hugging Face folder, its floating-point tensors in ``dtype``.

    Tensors are made and written one at a time, and the folder appears whole or not at all. ``max_shard_size``: of a
    file, in bytes or as text such as "5GB"; None for one file. Raises :class:`ConfigError` if the folder cannot be
    written.
    """
    with _writing(Path(folder)) as building:
        export_hf.save(model, tokenizer, building, dtype, max_shard_size)


def load(model: nn.Module, folder: str | Path) -> None:
    """Fill a converted ``model`` with the tensors in ``folder``: a checkpoint of a run, or of Hugging Face's Trainer.

    ``model`` must have been converted with the same options. Build the optimizer afterwards, or load its state too: it
    keeps fp32 copies of norms and biases. Raises :class:`ConfigError` if the tensors are those of another model.
    """
    with _codes_called(_name_of_codes(Path(folder)), model):
        checkpoint.load_model(Path(folder), model)


def _name_of_codes(folder: Path) -> str:
    """What the files of ``folder`` call int8 codes: a state dict that was saved as it is has a name of its own."""
    for path in folder.glob("model*.safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                if any(name.endswith(f".{CODES}") for name in file.keys()):  # noqa: SIM118 - not a mapping
                    return CODES
        except (OSError, SafetensorError):
            break  # load_model says what is wrong with it
    return "weight"
