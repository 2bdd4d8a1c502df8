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
    elif "" not in config.data.valid:
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
    """What sources, and keys of their own, do not go with."""
    data = config.data
    if data.valid is not None and "" in data.valid and len(data.valid) > 1:
        return ["data.valid: one of several held-out sets has no name; give it one"]
    if data.task == "classify":
        if len(data.train) > 1:
            return ["data.train: data.task: classify reads one file; put the examples into one, and name that"]
        own = [f"{key}.task" for key, source in data.all_sources.items() if source.task != data.task]
        return [f"{name}: data.task: classify has labels in all files; leave this one out" for name in own]
    if data.task == "instruct":
        return []
    return [
        f"{key}: a source has task: instruct, and data.task is text, by which the exports have no end of an answer; "
        "set data.task: instruct, and task: text for the sources of text"
        for key, source in data.all_sources.items()
        if source.task == "instruct"
    ]
