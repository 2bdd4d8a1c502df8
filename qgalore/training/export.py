"""What leaves a run: exports, a sample, and the model of a checkpoint."""

from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .. import config as configuration
from ..config import Config
from ..data.chat import answer_ends
from ..data.packing import IGNORED
from ..data.tokenizer import load_tokenizer
from ..errors import ConfigError
from ..files import atomic, checkpoint, export_gguf, export_hf, export_int8, model_card
from ..files import export_folder as folders
from ..lowrank.layers.lora import LoraLinear
from ..models import classify, loading, streaming
from ..models.sample import continue_text, prompt_ids
from ..parallel import shards
from . import card
from .model import adapt_as, convert_as
from .position import Position
from .say import say

EXPORTS = {"hf": export_hf, "int8": export_int8, "gguf": export_gguf}
KEPT = "tokenizer"  # the folder of a run that holds what its exports need beside the weights


def keep_beside(config: Config, model: nn.Module, tokenizer: PreTrainedTokenizerBase, place: Path) -> None:
    """Write into ``place``, a run's folder ``KEPT``, what every export of the run takes along: tokenizer, generation
    config and the processor files of the pretrained folder. Raises ``OSError``."""
    tokenizer.save_pretrained(place)
    if model.can_generate():
        model.generation_config.to_json_file(place / folders.GENERATION)
    if config.model.path is not None and Path(config.model.path).expanduser().is_dir():
        folders.take_along(Path(config.model.path).expanduser(), place)


def mark_ends(config: Config, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Put the tokens that end an answer first among those that end what the model says."""
    if config.data.task != "instruct":
        return
    known = model.generation_config.eos_token_id
    known = [] if known is None else [known] if isinstance(known, int) else list(known)
    ends = list(dict.fromkeys([*answer_ends(tokenizer), *known]))
    model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends or None


def check_formats(model: nn.Module, tokenizer: PreTrainedTokenizerBase, formats: list[str]) -> None:
    """Raise :class:`ConfigError` for a format of ``export.formats`` that a built ``model`` cannot take."""
    try:
        if "int8" in formats:
            export_int8.int8_layers(model)
        if "gguf" in formats:
            export_gguf.check(model, tokenizer)
    except ConfigError as error:
        raise ConfigError(f"export.formats is {formats}: {error}") from error


def export(model: nn.Module, fmt: str, target: Path, run: Path, config: Config, position: Position) -> None:
    """Write ``model``, as it is after ``position``, to ``target`` in one of ``EXPORTS``, whole or not at all, with a
    model card and what the folder ``run`` keeps for it (see :func:`keep_beside`). Raises :class:`ConfigError`."""
    if fmt != "hf" and any(isinstance(module, LoraLinear) for module in model.modules()):
        raise ConfigError(
            f"LoRA's merged weights are not int8, as the format {fmt} needs them; export with --format hf"
        )
    kept = run / KEPT
    tokenizer = load_tokenizer(str(kept))
    if (kept / folders.GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(kept)
    described = card.of(fmt, config, position, run) if fmt in card.FORMATS else None
    if described is not None and model_card.of_another(target):
        mine = f"{target / model_card.CARD} was not written by qgalore, or was changed since"
        say("note", f"{mine}, so it stays; delete it to get a new one with the next export")
        described = None
    remedy = "The checkpoints are intact; free space or choose another folder, then export with tools/export.py"
    with atomic.explained(f"the export {target}", remedy), folders.whole(target) as building:
        EXPORTS[fmt].save(model, tokenizer, building)
        if fmt != "gguf":
            folders.take_along(kept, building)
        if described is not None:
            described.write(building)
    say("export", f"{target}, for {EXPORTS[fmt].READERS}")


def finish(run, best_step: int | None) -> None:
    """What happens after the last step of a ``build.Run``: the exports and a sample, of the weights after
    ``best_step``, the best evaluation's, if ``export.which`` says so."""
    model, position, source = run.model, run.loop.position, None
    if run.config.export.which == "best" and best_step is None:
        say("note", "no evaluation is known to be the best, so the last weights are exported")
    elif run.config.export.which == "best":
        source = run.folder / "checkpoints" / checkpoint.name_for(best_step)
        position = Position.read(checkpoint.read_state(source)["position"])  # raises for a damaged one
        say("export", f"the best held-out loss's weights, {source}")
    if any(shards.is_shared(parameter) for parameter in model.parameters()):  # every process has some rows of it
        source = source or checkpoint.steps_in(run.folder / "checkpoints")[-1]
        say("export", f"out of {source}, tensor by tensor, on the CPU")
        model, _ = restore_model(source, mapped=True)
    elif source is not None:
        checkpoint.load_model(source, model)
    for fmt in run.config.export.formats:
        export(model, fmt, run.folder / "export" / fmt, run.folder, run.config, position)
    section = run.config.sample
    if section.max_new_tokens and run.config.data.task != "classify":
        data = run.config.data
        row = run.valid.batch([0])
        length = 16
        if data.task == "instruct":  # up to the first answer
            length = int((row["labels"][0] != IGNORED).nonzero()[0]) + 1
        ids = row["input_ids"][0, :length].tolist()
        if section.prompt is not None:
            ids = prompt_ids(run.tokenizer, section.prompt, data.sequence_length, data.task)
        say("sample", continue_text(model, run.tokenizer, ids, section.max_new_tokens, run.config.run.seed))


def export_checkpoint(source: Path, fmt: str, target: Path) -> None:
    """Write the model of a checkpoint as its own run would. Raises :class:`ConfigError`."""
    state = checkpoint.read_state(source)
    try:
        position = Position.read(state.get("position", {}))
    except ValueError as error:
        raise ConfigError(f"{source} cannot be used: its state.json says that {error}") from error
    model, _ = restore_model(source, mapped=True)
    config = configuration.parse(state["config"], str(source))
    export(model, fmt, target, source.resolve().parent.parent, config, position)


def restore_model(source: Path, mapped: bool = False) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model and tokenizer of a checkpoint (RUN/checkpoints/step-…), on the CPU, without its data or optimizer. The
    tensors of a ``mapped`` model are read-only views of the checkpoint's file. Raises :class:`ConfigError`."""
    state = checkpoint.read_state(source)
    config = configuration.parse(state.get("config", {}), str(source))
    shape = loading.noted_config(state.get("model_config", {}), f"model_config in {source / checkpoint.STATE}")
    if config.model.dtype == "auto":
        raise ConfigError(
            f"{source} cannot be used: its configuration has model.dtype auto, which a run resolves first"
        )
    auto = {"auto": classify.AUTO} if config.data.task == "classify" else {}
    model = loading.skeleton_with_buffers(shape, dtype=getattr(torch, config.model.dtype), **auto)
    convert_as(config, model)
    adapt_as(config, model)
    if mapped:
        checkpoint.map_model(source, model)
    streaming.allocate(model, torch.device("cpu"))  # of a mapped model only the zero leaves are left
    if not mapped:
        checkpoint.load_model(source, model)
    return model.eval(), load_tokenizer(str(source.resolve().parent.parent / KEPT))
