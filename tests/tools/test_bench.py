"""The benchmark's own arithmetic, and that every method takes its steps."""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import bench


def test_every_method_steps_and_the_parts_add_up(tmp_path, capsys):
    shape = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps({**shape, **heads}))
    names = [name for name in bench.MAKERS if name != "galore-torch"]  # a package that need not be there
    small = ["--batch", "64", "--sequence", "32", "--rank", "8", "--rounds", "2", "--device", "cpu"]
    assert bench.main(["--model", str(tmp_path), "--methods", *names, *small]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:1] == ["method"])
    rows = {line.split()[0]: line.split() for line in lines[start + 1 :]}
    assert set(rows) == set(names)
    for name, row in rows.items():
        step, parts = float(row[1]), [float(cell) for cell in row[6:12]]
        assert step > 0
        assert sum(parts[:3]) > 0, name
        assert (parts[5] > 0) == (name not in ("adamw", "adamw8bit")), "only low-rank methods merge"


def test_the_products_of_a_method():
    config = bench.loading.model_config("llama_60m", tokenizer_size=32000, overrides={})
    tokens, rank = 4096, 128

    def flops(name):
        return sum(2 * m * k * n * count for (m, k, n), count in bench.products(config, name, rank, tokens).items())

    layers = 8 * (4 * 512 * 512 + 3 * 512 * 1376)
    head = 32000 * 512
    assert flops("adamw") == flops("adamw8bit") == 6 * tokens * (layers + head)
    sides = 8 * (4 * (512 + 512) + 3 * (512 + 1376))
    merge = 2 * rank * layers
    assert flops("qgalore") == 4 * tokens * layers + 2 * tokens * rank * sides + merge + 6 * tokens * head
    assert flops("galore") == flops("adamw") + 2 * merge
    assert flops("qgalore+") < flops("qgalore") < flops("adamw") < flops("galore")


def test_classic_galore_takes_the_step_of_its_algorithm():
    """One layer by hand: the top right singular vectors, AdamW's first step (the sign, nearly) and the way back."""
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(6, 9, bias=False)
    before, gradient = layer.weight.detach().clone(), torch.randn(9, 6, generator=generator)
    layer.weight.grad = gradient.clone()
    spare = torch.nn.Parameter(torch.zeros(1))
    spare.grad = torch.ones(1)
    bench.ClassicGaLore([layer], [spare], 2, bench.Clock(torch.device("cpu"))).step()
    right = torch.linalg.svd(gradient, full_matrices=False).Vh[:2]
    small = gradient @ right.T
    wanted = before - bench.SCALE * bench.LR * (small / (small.abs() + 1e-8)) @ right
    torch.testing.assert_close(layer.weight.detach(), wanted, rtol=0, atol=1e-6 * bench.LR + 2.0**-24)
