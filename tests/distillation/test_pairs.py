"""Kept pairs: noise, image and prompt belong together, and the teacher is asked now and then only."""

import pytest
import torch

from arcflow.distillation import pairs
from arcflow.distillation.pairs import CALLS, REUSE, Pairs, as_target
from arcflow.path import column
from arcflow.runs.ema import Ema


def prompted(x, sigma, cond):
    """Straight lines from every noise to half of it plus the number that the prompt tells."""
    sigma, place = column(sigma, x), column(cond["text"], x)
    eps = (x - (1 - sigma) * place) / (0.5 * (1 - sigma) + sigma)
    return eps - (place + 0.5 * eps)


def drawn(count, batch=4, draws=None):
    """The batches of so many iterations, and how many samples the teacher was asked for."""
    kept, generator, asked = Pairs(3.2), torch.Generator().manual_seed(0), []

    def teacher(x, sigma, cond):
        asked.append(len(x))
        return prompted(x, sigma, cond)

    for i in range(count):
        eps = torch.randn(batch, 1, 4, generator=generator, dtype=torch.float64)
        cond = {"text": 100.0 * i + torch.arange(batch, dtype=torch.float64), "img_ids": torch.full((9, 3), float(i))}
        yield i, kept.draw(teacher, eps, cond, draws(i, batch) if draws else generator), sum(asked)


@pytest.mark.parametrize("draws", [None, lambda i, n: [torch.Generator().manual_seed(n * i + j) for j in range(n)]])
def test_an_image_keeps_its_noise_and_its_prompt(draws):
    for i, (eps, x0, cond), _ in drawn(20, draws=draws):
        torch.testing.assert_close(x0, column(cond["text"], x0) + 0.5 * eps, rtol=1e-6, atol=1e-6)
        assert cond["text"].shape == (4,) and torch.equal(cond["img_ids"], torch.full((9, 3), float(i)))


def test_one_iteration_in_so_many_asks_the_teacher():
    cost = [asked for *_, asked in drawn(2 * REUSE + 1)]
    assert cost == [4 * CALLS] * REUSE + [2 * 4 * CALLS] * REUSE + [3 * 4 * CALLS]


def test_the_newest_pairs_are_kept_and_every_one_of_them_is_drawn(monkeypatch):
    monkeypatch.setattr(pairs, "KEPT", 8)
    last = [(cond["text"] // 100).tolist() for i, (*_, cond), _ in drawn(4 * REUSE) if i >= 3 * REUSE]
    assert {made for batch in last for made in batch} == {2 * REUSE, 3 * REUSE}


def test_a_target_has_its_weights_no_dropout_and_no_gradient_for_a_while():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5))
    now = {name: p.detach().clone() for name, p in net.named_parameters()}
    weights = Ema(dict(net.named_parameters()))
    for w in weights.weights.values():
        w.fill_(3.0)
    with pytest.raises(KeyError), as_target(net, weights):
        y = net(torch.ones(1, 2))
        assert torch.equal(y, torch.full((1, 2), 9.0)) and not y.requires_grad
        raise KeyError
    assert net.training and all(torch.equal(p, now[name]) for name, p in net.named_parameters())
    assert all((w == 3).all() for w in weights.weights.values())


def test_behind_a_target_every_module_learns_or_rests_as_before():
    """A student learns in a network that rests: its dropout must not stay off."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5)).eval()
    net[1].train()
    with as_target(net, Ema(dict(net.named_parameters()))):
        assert not net[1].training
    assert net[1].training and not net.training and not net[0].training
