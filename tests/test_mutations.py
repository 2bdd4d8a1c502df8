"""Mistakes in the arithmetic that no crash would show, each made on purpose, and the tests that must notice.

Each entry replaces one line in a copy of the package and runs the tests that are named there: they must fail, and pass
without it. ``python tests/test_mutations.py`` prints the whole list with what came out.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).resolve().parent.parent
METHOD = "tests/lowrank/test_method.py::test_default_galore_is_the_page"
PARTS = "tests/lowrank/test_method.py::test_parts_are_the_page_too"
OUTPUT = "output.txt"
LIBRARIES = ["torch", "transformers.models.llama.modeling_llama", "bitsandbytes.optim", "scipy.stats", "hypothesis"]
PROCESSES = "tests/parallel/test_walk_in_processes.py::test_where_sums_are_exact_the_number_of_processes_does_not_show"


@dataclass(frozen=True)
class Mutation:
    """``line``, found once in the package wherever it may lie, becomes ``wrong``; ``tests`` must fail then."""

    line: str
    wrong: str
    tests: tuple[str, ...]


MUTATIONS = {
    "the same rounding bits in every step": Mutation(
        "derive_key(self.seed, self.step_count, tensor.index)", "derive_key(self.seed, 0, tensor.index)", (METHOD,)
    ),
    "the same rounding bits in every layer": Mutation(
        "derive_key(self.seed, self.step_count, tensor.index)", "derive_key(self.seed, self.step_count, 0)", (METHOD,)
    ),
    "the same rounding bits in each tile, int8": Mutation(
        "start = (first_row + c) * width",
        "start = first_row * width",
        ("tests/quant/test_int8.py::test_tiles_do_not_show",),
    ),
    "the same rounding bits in each tile, bf16": Mutation(
        "random_bits(key, (first_row + a) * width,",
        "random_bits(key, first_row * width,",
        ("tests/quant/test_dense.py::test_bf16_tiles_do_not_show",),
    ),
    "the same rounding bits in each part": Mutation(
        "            first_row=first,\n            rounding", "            first_row=0,\n            rounding", (PARTS,)
    ),
    "the gradient of a refresh step in the basis before it is rounded": Mutation(
        "            self.adopt(found, stored, first)\n",
        "            self.adopt(found, stored, first)\n            self.module.columns = lambda: found.columns\n",
        (METHOD,),
    ),
    "moments turned from an old basis whose signs a QR has changed": Mutation(
        "self.adopt(found, stored, first)", "self.adopt(found, old, first)", (METHOD,)
    ),
    "decay times scale": Mutation(
        'group["lr"] * group["weight_decay"]', 'group["lr"] * group["weight_decay"] * group["scale"]', (METHOD,)
    ),
    "the second moment turned as the first": Mutation(
        "(SECOND_MOMENTS, (_squared(left), _squared(right)))):\n        for name in names:",
        "(SECOND_MOMENTS, (left, right))):\n        for name in names:",
        (METHOD,),
    ),
    "the documents of the first row in every row": Mutation(
        "rows = zip(values.unbind(), documents.lengths, strict=True)",
        "rows = ((row, documents.lengths[0]) for row in values.unbind())",
        ("tests/models/test_attention.py::test_losses_and_gradients_are_those_of_a_mask",),
    ),
    "the loss as a mean of the micro-batches' means": Mutation(
        "return self.loss(self.model, batch) / max(tokens(), 1)",
        "return self.loss(self.model, batch) / max(self.data.targets(batch) * self.stepping.grad_accumulation, 1)",
        ("tests/test_means.py::test_a_step_weighs_targets_and_not_micro_batches",),
    ),
    "an evaluation as a mean of the batches' means": Mutation(
        "tokens += count\n                yield partial(loss_of, batch)",
        "tokens += 1\n                yield lambda batch=batch, count=count: loss_of(batch) / count",
        ("tests/test_means.py::test_an_evaluation_weighs_targets_and_not_batches",),
    ),
    "parts that end inside an 8-bit block": Mutation(
        "unit = BLOCK // math.gcd(BLOCK, size // rows)", "unit = 1", (PARTS,)
    ),
    "a rederived scale rounded to the nearest": Mutation(
        "    if key is None:\n        new = exact",
        "    if True:\n        new = exact",
        ("tests/quant/test_int8.py::test_a_rederived_scale_follows_small_updates_of_the_largest_weight",),
    ),
    "the largest weight rounded like the others": Mutation(
        "if ends is not None and draw[0] is not None:",
        "if False:",
        ("tests/quant/test_int8.py::test_rederived_scales_are_idempotent",),
    ),
    "signs after a QR": Mutation(
        "search.first_vector_cosine(kept, after)",
        "search.first_vector_cosine(before, after)",
        ("tests/lowrank/test_policies.py::test_the_signed_cosine_has_the_sign_of_the_vectors_as_found",),
    ),
    "frozen layers step on": Mutation(
        "return not any(leaf.requires_grad for leaf in self.leaves())",
        "return False",
        ("tests/lowrank/test_freezing.py",),
    ),
    "gradients that are not summed over processes": Mutation(
        "team.begin([one for tensor in asked for one in tensor.to_sum()])",
        "team.begin([])",
        (f"{PROCESSES}[replicate]",),
    ),
    "gradients that are summed twice over processes": Mutation(
        "team.begin([one for tensor in asked for one in tensor.to_sum()])",
        "team.begin(sums := [one for tensor in asked for one in tensor.to_sum()]).wait() or team.begin(sums)",
        (f"{PROCESSES}[replicate]",),
    ),
    "the mean over processes in the place of their sum": Mutation(
        "self.optimizer.prepare_summed(tensor)",
        "self.optimizer.prepare_summed(tensor) or tensor.gradient().div_(self.optimizer.team.size)",
        (f"{PROCESSES}[replicate]", f"{PROCESSES}[shard]"),
    ),
    "an owner who gets one process's gradient": Mutation(
        "partial(dist.reduce, dst=to)", "partial(dist.broadcast, src=to)", (f"{PROCESSES}[shard]",)
    ),
    "rows that stay with their owner": Mutation("self.hand_out(tensors)\n", "None\n", (f"{PROCESSES}[shard]",)),
    "new bases that stay with their owner": Mutation(
        "tensor.handed(owner, tensor.name in due, weights)",
        "tensor.handed(owner, False, weights)",
        (f"{PROCESSES}[shard]",),
    ),
    "held-out batches that each fetch all blocks": Mutation(
        "most = _room(start, len(layout), micro_batches)",
        "most = 1",
        ("tests/steps/test_stream_walk.py::test_held_out_batches_share_the_fetches_of_a_block",),
    ),
    "blocks that go back before a clipped step has moved them": Mutation(
        "self._leave(block, stepped, moved=not self.waits)",
        "self._leave(block, stepped, moved=True)",
        ("tests/test_stream_plan.py::test_planned_bytes_are_those_of_a_clipped_step",),
    ),
    "streamed blocks that leave before they have stepped": Mutation(
        "self.at_once = at_once or optimizer.team.size == 1",
        "self.at_once = optimizer.team.size == 1",
        ("tests/parallel/test_streamed_in_processes.py::test_a_block_that_does_not_stay_has_stepped_when_it_leaves",),
    ),
    "an optimizer that was dropped and still counts": Mutation(
        "if self._holder is None or self._holder() is None:",
        "if self._holder is None:",
        ("tests/lowrank/test_guard.py::test_an_optimizer_made_late_counts_and_one_that_was_dropped_does_not",),
    ),
    "a copy of a model that belongs to the optimizer of the first": Mutation(
        "return Guard(self.name)",
        "return self",
        ("tests/lowrank/test_guard.py::test_a_copy_belongs_to_no_optimizer_yet[deepcopy]",),
    ),
    "the loss of a step in one process": Mutation(
        'self.optimizer.team.total_and_any("the loss of a step", loss, held)',
        "loss, held",
        (f"{PROCESSES}[replicate]",),
    ),
}


def place_of(line: str) -> Path:
    """The one file of the package that holds ``line``, once; an error says that the list must follow the code."""
    found = {path: path.read_text().count(line) for path in sorted((ROOT / "qgalore").rglob("*.py"))}
    held = {path: count for path, count in found.items() if count}
    assert list(held.values()) == [1], f"{line!r} is in {[str(path) for path in held] or 'no file'}; mend MUTATIONS"
    return next(iter(held))


def run(mutation: Mutation, folder: Path, mutated: bool) -> tuple[int, str]:
    """The exit code and the output of the tests of ``mutation`` on a copy of the repository in ``folder``. A server
    that has imported the libraries, and nothing of ours, forks each process for them."""
    source = place_of(mutation.line)
    for name in ("qgalore", "tests", "configs", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    for name in ("pyproject.toml", "train.py"):
        shutil.copy(ROOT / name, folder / name)
    if mutated:
        copy = folder / source.relative_to(ROOT)
        copy.write_text(source.read_text().replace(mutation.line, mutation.wrong))
    server = started()
    server.stdin.write(json.dumps([str(folder), mutation.tests]) + "\n")
    server.stdin.flush()
    return int(server.stdout.readline()), (folder / OUTPUT).read_text()


@cache
def started() -> subprocess.Popen:
    """The server, which ends when this process closes its input."""
    command = [sys.executable, "-B", __file__, "serve"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def serve() -> None:
    """Fork a process for each line of standard input, and print the exit code of its tests."""
    for name in LIBRARIES:
        import_module(name)
    sys.path.remove(str(ROOT / "tests"))
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            live(*json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def live(folder: str, tests: list[str]) -> NoReturn:
    """Run ``tests`` in ``folder`` and leave with their exit code."""
    signal.alarm(600)
    os.chdir(folder)
    output = os.open(OUTPUT, os.O_WRONLY | os.O_CREAT)
    for number in (1, 2):
        os.dup2(output, number)
    sys.path.insert(0, folder)
    os.environ["PYTHONPATH"] = folder
    code = pytest.main(["-x", "-n", "0", "-p", "no:cacheprovider", *tests])
    sys.stdout.flush()
    os._exit(code)


def test_every_mutation_has_its_place():
    """Fast, so that a change of one of these lines is seen at once; the mutations themselves are tried with -m slow."""
    for mutation in MUTATIONS.values():
        place_of(mutation.line)


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_the_named_tests_notice(name, tmp_path):
    code, out = run(MUTATIONS[name], tmp_path, mutated=True)
    assert code == 1, out[-3000:]
    assert "AssertionError" in out or "assert " in out  # it was the value that was noticed


@pytest.mark.slow
def test_the_named_tests_pass_without(tmp_path):
    names = tuple(dict.fromkeys(test for mutation in MUTATIONS.values() for test in mutation.tests))
    code, out = run(Mutation(next(iter(MUTATIONS.values())).line, "", names), tmp_path, mutated=False)
    assert code == 0, out[-3000:]


def main() -> None:
    for name, mutation in MUTATIONS.items():
        with tempfile.TemporaryDirectory() as folder:
            code, _ = run(mutation, Path(folder), mutated=True)
        print(f"{'noticed' if code == 1 else 'NOT NOTICED':<12}{name}", flush=True)


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["serve"] else main()
