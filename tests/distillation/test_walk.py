"""Walking along paths: Euler, arcs, and the mixed walk to the states, on teachers with a known flow."""

from typing import get_args

import pytest
import torch

from arcflow.config import Distill, Spread
from arcflow.distillation.walk import Schedule, arcs, euler, guided, schedule, visit, walked
from arcflow.momentum import Mixture
from arcflow.path import Segment, shift_sigma, step_grid

SEGMENT = Segment(1.0, 0.5)
WINDOW = 3 / 128


def mixture(batch=3, tokens=2, modes=4, width=8, pixels=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = (modes, width), (modes, pixels), (modes - 1, pixels)
    return Mixture(*(torch.randn(batch, tokens, *s, generator=draw, dtype=torch.float64) for s in shapes))


def growth(x, sigma, cond):
    return -x


def times(ratio, states=4, batch=3, window=WINDOW, segment=SEGMENT, seed=0, **more):
    draws = torch.Generator().manual_seed(seed)
    return schedule(segment, batch, states=states, window=window, ratio=ratio, generator=draws, **more)


def test_euler_converges_with_order_one():
    x, exact = torch.ones(1, 2, dtype=torch.float64), torch.e
    errors = [
        abs(float(euler(growth, x, {}, torch.linspace(1, 0, n + 1, dtype=torch.float64))[0, 0]) - exact)
        for n in (64, 128, 256)
    ]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.05)


def test_euler_trace_starts_at_the_noise_and_ends_where_euler_ends():
    x, sigmas = torch.randn(2, 3), step_grid(4)
    trace = euler(growth, x, {}, sigmas, trace=True)
    assert trace.shape == (5, 2, 3)
    assert torch.equal(trace[0], x) and torch.equal(trace[-1], euler(growth, x, {}, sigmas))


def test_arcs_of_straight_policies_are_euler_steps():
    x, sigmas = torch.randn(3, 2, 8), step_grid(3)

    def straight(x, sigma, cond):
        return Mixture(-x.unsqueeze(-2), torch.zeros(*x.shape[:-1], 1, 4), torch.zeros(*x.shape[:-1], 0, 4))

    assert torch.allclose(arcs(straight, x, {}, sigmas, trace=True), euler(growth, x, {}, sigmas, trace=True))


def test_guidance_moves_away_from_the_empty_prompt():
    def teacher(x, sigma, cond):
        return x * cond["text"][:, None]

    x = torch.ones(2, 3)
    u = guided(teacher, {"text": torch.tensor([1.0])}, 4.0)(x, torch.ones(2), {"text": torch.tensor([2.0, 3.0])})
    assert torch.equal(u, torch.tensor([[5.0] * 3, [9.0] * 3]))


def test_the_empty_prompt_is_told_the_guidance_of_its_sample():
    def teacher(x, sigma, cond):
        return x * (cond["text"] * cond["guidance"])[:, None]

    cond = {"text": torch.tensor([2.0, 2.0]), "guidance": torch.tensor([1.0, 3.0])}
    empty = {"text": torch.tensor([1.0]), "guidance": torch.tensor([7.0])}
    u = guided(teacher, empty, 4.0)(torch.ones(2, 1), torch.ones(2), cond)
    assert torch.equal(u, torch.tensor([[5.0], [15.0]]))


@pytest.mark.parametrize(("empty", "calls"), [(2, 1), (1, 2)], ids=["one length", "two lengths"])
def test_both_prompts_are_asked_in_one_call_where_their_texts_are_equally_long(empty, calls):
    asked = []

    def teacher(x, sigma, cond):
        asked.append(len(x))
        return x * cond["text"].sum(1, keepdim=True) + sigma[:, None] + cond["img_ids"].sum()

    x, sigma, cond = torch.rand(2, 3), torch.rand(2), {"text": torch.rand(2, 2), "img_ids": torch.rand(5)}
    negative = {"text": torch.rand(1, empty), "img_ids": torch.rand(7)}
    u = guided(teacher, negative, 4.0)(x, sigma, cond)
    assert len(asked) == calls and sum(asked) == 4
    no, yes = (teacher(x, sigma, {**cond, "text": text}) for text in (negative["text"].expand(2, -1), cond["text"]))
    torch.testing.assert_close(u, no + 4.0 * (yes - no))


@pytest.mark.parametrize("spread", get_args(Spread))
@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_the_walk_never_goes_back_and_leaves_the_window_free(ratio, spread):
    drawn = times(ratio, batch=200, spread=spread)
    flat = torch.stack([drawn.tau, drawn.tau_next], 1).flatten(0, 1)
    assert (flat.diff(dim=0) <= 1e-12).all()
    assert (flat <= SEGMENT.tau_src).all() and (flat >= SEGMENT.tau_dst + WINDOW - 1e-12).all()


@pytest.mark.parametrize("spread", get_args(Spread))
@pytest.mark.parametrize("ratio", [0.3, 1.0])
def test_the_teacher_has_its_share_of_the_way(ratio, spread):
    drawn = times(ratio, spread=spread)
    shares = (drawn.tau - drawn.tau_next).sum(0)
    assert torch.allclose(shares, torch.full_like(shares, ratio * (SEGMENT.length - WINDOW)))


def test_a_segment_shorter_than_the_window_is_asked_at_its_start():
    drawn = times(0.5, segment=Segment(0.02, 0.0))
    assert torch.equal(drawn.tau, torch.full_like(drawn.tau, 0.02)) and torch.equal(drawn.tau, drawn.tau_next)


def test_stratified_times_leave_no_long_step():
    room = SEGMENT.length - WINDOW
    alone = (SEGMENT.tau_src - times(0.0, batch=200, spread="stratified").tau) / room
    assert torch.equal((alone * 4).floor(), torch.arange(4.0, dtype=torch.float64)[:, None].expand(4, 200))
    led = times(1.0, batch=200, spread="stratified")
    assert ((led.tau - led.tau_next) < room / 2).all()
    assert ((times(1.0, batch=200).tau - times(1.0, batch=200).tau_next) > room / 2).any()


def test_systematic_times_leave_equal_steps():
    step = (SEGMENT.length - WINDOW) / 4
    alone = times(0.0, batch=200, spread="systematic").tau.diff(dim=0)
    assert torch.allclose(alone, torch.full_like(alone, -step))
    led = times(1.0, batch=200, spread="systematic")
    first, *between, last = led.tau - led.tau_next
    assert torch.allclose(torch.stack(between), torch.full((2, 200), step, dtype=torch.float64))
    assert torch.allclose(first + last, torch.full_like(first, 2 * step)) and first.std() > step / 10


def test_the_first_state_of_a_teacher_only_walk_is_the_start():
    assert torch.equal(times(1.0).tau[0], torch.ones(3, dtype=torch.float64))


def test_states_of_the_student_alone_take_two_calls_and_lie_on_its_arc():
    calls, roll, x, drawn = [], mixture(), torch.randn(3, 2, 8, dtype=torch.float64), times(0.0)

    def teacher(x, sigma, cond):
        calls.append((x, sigma, cond))
        return x

    cond = {"text": torch.arange(3), "img_ids": torch.zeros(7, 3)}
    states, _, end = visit(roll, teacher, x, cond, drawn, 3.2)
    for (asked, sigma, seen), half in zip(calls, (slice(0, 2), slice(2, 4)), strict=True):
        assert torch.equal(seen["text"], torch.arange(3).repeat(2)) and torch.equal(seen["img_ids"], cond["img_ids"])
        assert torch.allclose(sigma.view(2, 3), shift_sigma(drawn.tau[half], 3.2))
        assert torch.equal(asked, states[half].flatten(0, 1))
    for i in range(4):
        assert torch.allclose(states[i], x - roll.displacement(0.0, 1 - shift_sigma(drawn.tau[i], 3.2)))
    assert torch.allclose(end, x - roll.displacement(0.0, 1 - shift_sigma(0.5, 3.2)))


def test_batched_and_sequential_walks_agree_without_teacher_share():
    roll, x, drawn = mixture(), torch.randn(3, 2, 8, dtype=torch.float64), times(0.0)

    def teacher(x, sigma, cond):
        return x.sin() + sigma[:, None, None] * cond["text"][:, None, None]

    cond = {"text": torch.arange(3.0, dtype=torch.float64)}
    # a teacher share of 1e-15 is no share, but it takes the sequential road
    nearly = Schedule(drawn.segment, drawn.tau, drawn.tau_next - 1e-15)
    batched, sequential = visit(roll, teacher, x, cond, drawn, 3.2), visit(roll, teacher, x, cond, nearly, 3.2)
    for one, other in zip(batched, sequential, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_a_teacher_only_walk_is_euler_on_its_own_times():
    roll, x, drawn = mixture(), torch.randn(3, 2, 8, dtype=torch.float64), times(1.0)
    _, u, end = visit(roll, growth, x, {}, drawn, 3.2)
    sample = 1
    grid = shift_sigma(torch.cat([drawn.tau[:, sample], drawn.tau_next[-1:, sample]]), 3.2)
    points = euler(growth, x[sample : sample + 1], {}, grid, trace=True)
    assert torch.allclose(u[:, sample], -points[:-1, 0])
    rest = roll.displacement(*(1 - shift_sigma(tau, 3.2) for tau in (drawn.tau_next[-1], torch.full((3,), 0.5))))
    assert torch.allclose(end[sample], points[-1, 0] - rest[sample])


@pytest.mark.parametrize("spread", ["uniform", "stratified", "systematic"])
def test_a_walk_of_more_states_arrives_nearer_to_where_many_steps_do(spread):
    """What a training's walks miss by themselves, in two segments: logged when it begins."""
    x = torch.ones(64, 2, 8, dtype=torch.float64)
    exact = euler(growth, x, {}, step_grid(4000, 3.2))

    def missed(**settings) -> float:
        end = walked(growth, x, {}, Distill(spread=spread, **settings), torch.Generator().manual_seed(0))
        return float((end - exact).abs().mean())

    assert missed(states=32) < 0.35 * missed(states=8)
    assert missed(states=8, solver="adams") < 0.5 * missed(states=8)


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("adams", 2)])
def test_the_teachers_walk_has_the_order_of_its_solver(solver, order):
    """Error against many Euler steps where half the step length divides it by 2 or by 4."""
    x, errors = torch.ones(1, 2, 8, dtype=torch.float64), []
    exact = euler(growth, x, {}, shift_sigma(torch.linspace(1, 0.5, 20001, dtype=torch.float64), 3.2))
    for states in (16, 32):
        tau = torch.linspace(1, 0.5, states + 1, dtype=torch.float64)[:, None]
        *_, end = visit(mixture(1), growth, x, {}, Schedule(SEGMENT, tau[:-1], tau[1:]), 3.2, solver)
        errors.append(float((end - exact).abs().max()))
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.2)


def test_the_walk_has_no_gradient():
    roll = mixture()
    roll.v.requires_grad_(True)
    _, u, end = visit(roll, growth, torch.zeros(3, 2, 8, dtype=torch.float64), {}, times(0.5), 3.2)
    assert not u.requires_grad and not end.requires_grad
