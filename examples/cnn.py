"""Convolution kernels: their gradients, tensors of four dimensions, projected on both channel dimensions.

A small network learns to solve the heat equation: from a map of conductivities and the temperatures at the start to the
temperatures a while later, as an implicit finite-difference scheme (scipy) gives them.

python examples/cnn.py
"""

import numpy as np
import torch
from scipy import ndimage, sparse
from scipy.sparse.linalg import spsolve
from torch import nn

import qgalore

SIZE, WIDTH, STEPS, BATCH = 12, 32, 250, 16
RANK = 8


def heat(conductivity: np.ndarray, start: np.ndarray, time: float = 2.0, steps: int = 4) -> np.ndarray:
    """u at ``time`` of ∂u/∂t = ∇·(k ∇u) on a grid of spacing 1 with insulated edges: implicit Euler. The conductivity
    between two cells is the mean of theirs."""
    cells = np.arange(start.size).reshape(start.shape)
    pairs = [(cells[:, :-1], cells[:, 1:]), (cells[:-1], cells[1:])]
    a, b = (np.concatenate([pair[side].ravel() for pair in pairs]) for side in (0, 1))
    flow = (conductivity.ravel()[a] + conductivity.ravel()[b]) / 2
    rows, columns = np.concatenate((a, b, a, b)), np.concatenate((b, a, a, b))
    exchange = sparse.csc_matrix((np.concatenate((flow, flow, -flow, -flow)), (rows, columns)))
    system = (sparse.eye(start.size) - time / steps * exchange).tocsc()
    u = start.ravel()
    for _ in range(steps):
        u = spsolve(system, u)
    return u.reshape(start.shape)


def fields(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs (count, 2, SIZE, SIZE), smooth random conductivities and starts, and solutions (count, 1, SIZE, SIZE)."""
    noise = np.random.default_rng(seed).standard_normal((count, 2, SIZE, SIZE))
    smooth = ndimage.gaussian_filter(noise, (0, 0, 1.5, 1.5), mode="nearest") * 5
    smooth[:, 0] = np.exp(smooth[:, 0] / 2)
    solved = np.stack([heat(k, u) for k, u in smooth])[:, None]
    return torch.tensor(smooth, dtype=torch.float32), torch.tensor(solved, dtype=torch.float32)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(2, WIDTH, 3, padding=1)]
    for _ in range(4):
        layers += [nn.GELU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)]
    return nn.Sequential(*layers, nn.GELU(), nn.Conv2d(WIDTH, 1, 3, padding=1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> float:
    """Train on 256 fields; returns the relative error on 64 others."""
    inputs, targets = fields(256, seed=1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(2)
    for _ in range(steps):
        chosen = torch.randint(0, len(inputs), (BATCH,), generator=order)
        nn.functional.mse_loss(model(inputs[chosen]), targets[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    held_in, held_out = fields(64, seed=3)
    with torch.no_grad():
        return float((model(held_in) - held_out).norm() / held_out.norm())


def main(steps: int = STEPS, lr: float = 2.4e-2, adamw_lr: float = 6e-3) -> tuple[float, float]:
    """(relative error with projected gradients, with AdamW) on fields that neither has seen."""
    model = network()
    weights = sum(p.numel() for p in model.parameters())
    print(qgalore.convert(model, rank=RANK, convolutions="tucker"))
    optimizer = qgalore.optimizer(model, lr=lr, scale=1.0, inner="adamw", update_proj_gap=25)
    moments = 2 * sum(tensor.shape.numel() for tensor in optimizer.tensors)
    projected = train(model, optimizer, steps)
    model = network()
    plain = train(model, torch.optim.AdamW(model.parameters(), lr=adamw_lr, weight_decay=0.0), steps)
    print(f"projected: relative error {projected:.4f}, {moments:,} moments")
    print(f"AdamW:     relative error {plain:.4f}, {2 * weights:,} moments")
    return projected, plain


if __name__ == "__main__":
    main()
