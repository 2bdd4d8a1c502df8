"""What ``prove_cards.py`` reads of its runs, and the table that it makes of them."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import prove_kills as jobs
import torch
from safetensors.torch import load_file

UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
HEAD = ("case", "status", "differs", "allowed", "s/step", "tokens/s a card", "allocated", "plan", "sent", "plan", "s")


def known(out: Path) -> dict[str, dict[str, Any]]:
    """The rows of ``cards.json`` by case; none if nothing has run there."""
    path = out / "cards.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write(out: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Both files, each whole or as it was."""
    for name, text in (("cards.json", json.dumps(rows, indent=1)), ("cards.txt", table(rows) + "\n")):
        (out / f"{name}.new").write_text(text, encoding="utf-8")
        (out / f"{name}.new").replace(out / name)


def machine(device: str, processes: int) -> dict[str, Any]:
    """What the figures were found on."""
    found = {"processes": processes, "device": device, "torch": torch.__version__}
    if device == "cuda":
        found["cards"] = [torch.cuda.get_device_name(n) for n in range(processes)]
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def column(run: Path, key: str) -> list[float]:
    """What the records of all steps hold under ``key``."""
    return [row[key] for row in jobs.rows(run) if "lr" in row]


def figures(run: Path, processes: int, counted: int) -> dict[str, Any]:
    """Losses, speed, memory and bytes sent of a run whose step ``counted`` was watched; that one tells no speed."""
    steps = [row for row in jobs.rows(run) if "lr" in row]
    late = [row for row in steps[len(steps) // 3 :] if row["step"] != counted]
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    ranks = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((run.parent / "counted").glob("rank-*"))]
    sent: dict[str, float] = {}
    for rank in ranks:
        for kind, size in rank["sent"].items():
            sent[kind] = sent.get(kind, 0.0) + size / len(ranks)
    return {
        "losses": column(run, "loss"),
        "norms": column(run, "grad_norm"),
        "seconds_a_step": statistics.median(row["step_seconds"] for row in late),
        "tokens_per_second_a_card": statistics.median(row["tokens_per_second"] for row in late) / processes,
        "allocated": max(rank["memory_bytes"] for rank in ranks),
        "reserved": max(rank.get("reserved_bytes", 0) for rank in ranks),
        "planned": sum(sum(plan[part].values()) for part in ("resident", "transient")),
        "sent": sum(sent.values()),
        "sent_by_kind": sent,
        "planned_sent": planned_wire(run.with_suffix(".log").read_text(encoding="utf-8", errors="replace")),
    }


def planned_wire(printed: str) -> float:
    """Bytes that the plan of a run says each process sends in a step; 0 in one process, which sends none."""
    found = re.search(r"^wire: +([\d.,]+) (B|[KMG]iB) sent by each", printed, flags=re.M)
    return float(found[1].replace(",", "")) * UNITS[found[2]] if found else 0.0


def refusal(folder: Path) -> str | None:
    """The words with which train.py refused what it was asked for, if it did (exit code 2)."""
    for log in folder.glob("*.log"):
        printed = log.read_text(encoding="utf-8", errors="replace")
        found = re.search(r"^error: (.*(?:\n +.*)*)$", printed, flags=re.M)
        if found and re.search(r"exitcode *: 2\b", printed):
            return " ".join(found[1].split())
    return None


def unlike_the_checkpoint(run: Path) -> list[str]:
    """The tensors of a run's export that are not those of its newest checkpoint, which stores no integers."""
    saved = load_file(max((run / "checkpoints").glob("step-*")) / "model.safetensors")
    exported = load_file(run / "export" / "hf" / "model.safetensors")
    unlike = [n for n, value in exported.items() if n not in saved or not torch.equal(saved[n].to(value.dtype), value)]
    return [f"exported {name}" for name in unlike]


def table(rows: dict[str, dict[str, Any]]) -> str:
    """A line for each case, and the notes below."""
    cases = {name: row for name, row in rows.items() if name != "machine"}
    lines = [HEAD, *(_cells(name, row) for name, row in cases.items())]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    notes = [f"{name}: {'; '.join(words)}" for name, row in cases.items() if (words := _words(row))]
    return "\n".join([*text, "", *notes, json.dumps(rows["machine"])])


def _words(row: dict[str, Any]) -> list[str]:
    """What is said of a case: a note, of a long one the first and the last line, and the faults."""
    note = row.get("note", "").strip().splitlines()
    return [*note[:1], *note[1:][-1:], *row.get("faults", [])]


def _cells(name: str, row: dict[str, Any]) -> tuple[str, ...]:
    apart, allowed = row.get("differs"), row.get("allowed", {})
    sizes = [_size(row.get(key)) for key in ("allocated", "planned", "sent", "planned_sent")]
    return (
        name,
        row["status"],
        f"{max(apart):.1e}" if apart else "",
        f"{allowed['later']:.1e}" if apart else "",
        f"{row['seconds_a_step']:.3f}" if "seconds_a_step" in row else "",
        f"{row['tokens_per_second_a_card']:,.0f}" if "seconds_a_step" in row else "",
        *sizes,
        f"{row.get('seconds', 0):.0f}",
    )


def _size(size: float | None) -> str:
    if size is None:
        return ""
    unit = next(unit for unit in ("GiB", "MiB", "KiB", "B") if size >= UNITS[unit] or unit == "B")
    return f"{size / UNITS[unit]:.2f} {unit}"
