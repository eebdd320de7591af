"""A few weights with their average and optimizer."""

import torch

from arcflow.runs.ema import Ema, ema_beta


def model(seed=0, width=3):
    torch.manual_seed(seed)
    parameters = {"a.weight": torch.nn.Parameter(torch.randn(2, width)), "b": torch.nn.Parameter(torch.randn(4))}
    groups = [{"params": [parameters["b"]], "peak": 1.0}, {"params": [parameters["a.weight"]], "peak": 0.1}]
    return parameters, Ema(parameters), torch.optim.AdamW(groups, lr=0.1)


def walk(parameters, ema, optimizer, steps):
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        for p in parameters.values():
            p.grad = torch.randn(p.shape, generator=draw)
        optimizer.step()
        ema.update(ema_beta(step, start=2))


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
