"""Tasks of EleutherAI's lm-evaluation-harness on a loaded model, if that package is installed."""

import difflib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError
from .figures import Figure

_INSTALL = "pip install 'lm-eval>=0.4.9' 'accelerate>=1.1'"
_NO_METRICS = ("name", "alias", "sample_len", "sample_count")  # what results hold beside metrics


@dataclass(frozen=True)
class Metric:
    """One metric of one task: ``filter`` is what was done to the answers first (``none``); ``shots``: examples shown;
    ``version``: of the task; ``higher_is_better`` is None where the task does not say."""

    task: str
    metric: str
    filter: str
    shots: int | None
    version: Any
    higher_is_better: bool | None
    figure: Figure

    def row(self) -> dict[str, Any]:
        """For evaluation.json."""
        own = {name: value for name, value in vars(self).items() if name != "figure"}
        figure = {"value": self.figure.value, "error": self.figure.error, "samples": self.figure.items}
        return {"kind": "task", **own, **figure}


def find(names: Sequence[str], include: Path | None) -> Any:
    """lm-eval's manager of tasks, which knows all of ``names``. ``include``: a folder with task files of one's own.
    Raises :class:`ConfigError`."""
    missing = [name for name in ("lm_eval", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"--tasks needs lm-eval, and the package {missing[0]} is not installed. Run: {_INSTALL}")
    if include is not None and not include.is_dir():
        raise ConfigError(f"--include-path {include} is no folder; name the one that holds the task files")
    from lm_eval.tasks import TaskManager

    if include is not None:  # reading all of lm-eval's own task files takes seconds
        manager = TaskManager(include_path=str(include), include_defaults=False)
        if set(names) <= set(manager.all_subtasks):
            return manager
    manager = TaskManager(include_path=None if include is None else str(include))
    for name in names:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"Did you mean {' or '.join(near)}? " if near else ""
            raise ConfigError(
                f"--tasks: lm-eval knows no task {name}. {hint}`lm-eval ls tasks` lists them; give --include-path for "
                "a folder of your own"
            )
    return manager


def run(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    manager: Any,
    *,
    batch_size: int,
    limit: int | None = None,
    shots: int | None = None,
) -> list[Metric]:
    """Every metric of the tasks ``names`` under ``model`` (causal, on any device), as lm-eval's ``simple_evaluate``
    finds them. ``limit``: documents of a task, at most; ``shots``: examples shown, None for the task's own number.
    Raises :class:`ConfigError`."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)  # pyright: ignore[reportArgumentType]
        found = simple_evaluate(
            model=wrapped, tasks=list(names), task_manager=manager, limit=limit, num_fewshot=shots, log_samples=True
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # lm-eval, datasets and each task raise their own kinds
        said = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"--tasks {','.join(names)}: lm-eval stopped with {type(error).__name__}: {said}. If a data set is "
            "missing, fetch it where there is a network, or name a task over local files with --include-path"
        ) from error
    assert found is not None  # as on every process but the first of several
    return [metric for task in found["results"] for metric in _metrics(found, task)]


def _metrics(found: Any, task: str) -> list[Metric]:
    results = found["results"][task]
    items = found["n-samples"].get(task, {}).get("effective", 0)
    metrics = []
    for key, value in results.items():
        metric, _, kind = key.partition(",")
        if key in _NO_METRICS or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = results.get(f"{metric}_stderr,{kind}")
        figure = Figure(
            f"{task} {metric}" + ("" if kind in ("", "none") else f" ({kind})"),
            float(value),
            items,
            float(error) if isinstance(error, int | float) else None,
            _values(found, task, metric, kind),
        )
        better = found["higher_is_better"].get(task, {}).get(metric)
        shots, version = found["n-shot"].get(task), found["versions"].get(task)
        metrics.append(Metric(task, metric, kind, shots, version, better, figure))
    return metrics


def _values(found: Any, task: str, metric: str, kind: str) -> tuple[float, ...] | None:
    """The metric of each sample, in the order of their documents; None where it is not a number for each."""
    samples = [one for one in found.get("samples", {}).get(task, []) if one.get("filter", "none") == (kind or "none")]
    values = [one.get(metric) for one in sorted(samples, key=lambda one: one["doc_id"])]
    if not values or not all(isinstance(value, int | float) for value in values):
        return None
    return tuple(map(float, values))
