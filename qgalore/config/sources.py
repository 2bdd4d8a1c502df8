"""What the sources of data, and labels in them, do not go with: a part of the table in ``incompatible``."""

from .data_section import DataSection
from .sections import Config


def classified(config: Config) -> list[str]:
    """Rules for ``data.task: classify``, and keys that mean nothing without it."""
    if config.data.task != "classify":
        own = {name: DataSection.model_fields[name].default for name in ("label_key", "label_type", "header", "metric")}
        given = sorted(name for name, default in own.items() if getattr(config.data, name) != default)
        return [f"data.{name}: goes with data.task: classify only" for name in given]
    found = []
    if config.data.valid is None:
        found.append("data.valid: data.task: classify needs held-out data")
    if isinstance(config.data.valid, dict):
        found.append("data.valid: data.task: classify has one held-out set; give its file alone, not a mapping")
    if config.model.path is None and config.data.tokenizer is None:
        found.append("data.tokenizer: data.task: classify needs one, or a model.path that has one")
    if set(config.export.formats) - {"hf"}:
        found.append("export.formats: a classifier is exported as hf only")
    suits = {"pearson", "spearman"} if config.data.label_type == "number" else {"accuracy", "f1", "matthews"}
    if wrong := sorted(set(config.data.metric) - suits):
        found.append(
            f"data.metric: {wrong[0]} does not suit data.label_type: {config.data.label_type}; "
            f"use {', '.join(sorted(suits))}"
        )
    return found


def mixed(config: Config) -> list[str]:
    """What a list of sources does not go with."""
    data = config.data
    if isinstance(data.train, str):
        return []
    if data.task == "classify":
        return ["data.train: data.task: classify reads one file; put the examples into one, and name it as data.train"]
    found = []
    if data.task == "text" and any(source.task == "instruct" for source in data.train):
        found.append(
            "data.train: a source has task: instruct, and data.task is text, by which the exports have no end of an "
            "answer; set data.task: instruct, and task: text for the sources of text"
        )
    return found
