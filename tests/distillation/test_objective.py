"""The distillation objective on analytic teachers: value and gradient against first principles."""

import dataclasses
import itertools

import pytest
import torch

from arcflow.config import ALWAYS, Distill
from arcflow.distillation.objective import distill, matched, matching_end, rehearse, teacher_ratio, velocity_error
from arcflow.distillation.walk import Schedule, arcs, euler, schedule
from arcflow.momentum import Mixture
from arcflow.path import Segment, shift_sigma, step_grid
from tests.support.pipelines import draws

PLAIN = Distill(mode_dropout=0.0)
BATCH, TOKENS, MODES, WIDTH, PIXELS = 3, 2, 4, 8, 4


def weights(seed=0, dtype=torch.float64):
    shapes = (MODES, WIDTH), (MODES, PIXELS), (MODES - 1, PIXELS)
    generator = draws(seed)
    drawn = [torch.randn(BATCH, TOKENS, *shape, generator=generator, dtype=dtype) for shape in shapes]
    return [w.requires_grad_(True) for w in drawn]


def noise(dtype=torch.float64):
    return torch.randn(BATCH, TOKENS, WIDTH, generator=draws(9), dtype=dtype)


def teacher(x, sigma, cond):
    return 0.7 * x.sin() + sigma[:, None, None] * x


def by_hand(arc, x, segment, ratio, generator, config=PLAIN, points=2000):
    """Loss of one segment by midpoint quadrature of the velocity; nothing of the package but the draws."""
    v, logits, log_gamma = arc
    gains = torch.cat([torch.zeros_like(log_gamma[..., :1, :]), log_gamma], -2)
    pi = logits.softmax(-2)
    spread = [w.repeat(*[1] * (w.ndim - 1), WIDTH // PIXELS) for w in (pi, gains)]

    def sigma(tau):
        return 3.2 * tau / (1 + 2.2 * tau)

    def velocity(s):
        return (spread[0] * v * torch.exp(spread[1] * s[:, None, None, None])).sum(-2)

    def integral(tau_a, tau_b):
        s = [sigma(torch.tensor(segment.tau_src, dtype=v.dtype)) - sigma(t) for t in (tau_a, tau_b)]
        h = (s[1] - s[0]) / points
        return sum(velocity(s[0] + (i + 0.5) * h) for i in range(points)) * h[:, None, None], (s[1] - s[0])

    window, room = config.window / 128, segment.length - config.window / 128
    student_at = torch.rand(BATCH, config.states, generator=generator).double().sort(-1).values * (1 - ratio) * room
    teacher_at = torch.rand(BATCH, config.states - 1, generator=generator).double().sort(-1).values * ratio * room
    walked = torch.zeros(BATCH, dtype=v.dtype)
    tau, loss = torch.full((BATCH,), segment.tau_src, dtype=v.dtype), 0.0
    for i in range(config.states):
        tau_a = tau - (student_at[:, i] - walked)
        walked = student_at[:, i]
        before = teacher_at[:, i - 1] if i else torch.zeros(BATCH)
        after = teacher_at[:, i] if i < config.states - 1 else torch.full((BATCH,), ratio * room)
        tau_b = tau_a - (after - before)
        x = x - integral(tau, tau_a)[0].detach()
        u = teacher(x, sigma(tau_a), {})
        whole, span = integral(tau_a, tau_b - window)
        loss = loss + 15 * (whole / span[:, None, None] - u).square().mean() / config.states
        x = x + u * (sigma(tau_b) - sigma(tau_a))[:, None, None]
        tau = tau_b
    return segment.length * loss


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.0, 0.4, 1.0])
def test_loss_and_gradient_agree_with_quadrature(ratio):
    config = Distill(steps=1, mode_dropout=0.0)
    mine, theirs = weights(), weights()
    (part,) = distill(lambda *_: Mixture(*mine), teacher, noise(), {}, config=config, ratio=ratio, generator=draws())
    part.loss.backward()
    expected = by_hand(theirs, noise(), Segment(1.0, 0.0), ratio, draws())
    expected.backward()
    assert part.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for one, other in zip(mine, theirs, strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_gradient_is_the_slope_of_the_loss_with_fixed_states():
    arc = weights()
    times = schedule(Segment(0.5, 0.0), BATCH, states=2, window=3 / 128, ratio=0.5, generator=draws())
    targets = torch.randn(2, BATCH, TOKENS, WIDTH, generator=draws(3), dtype=torch.float64)

    def loss(*arc):
        return velocity_error([Mixture(*arc)] * len(targets), targets, *matched(times, window=3 / 128, shift=3.2))

    assert torch.autograd.gradcheck(loss, arc)


def test_each_segment_has_a_gradient_of_its_own():
    def gradients(keep):
        arcs = [weights(1), weights(2)]
        student = (Mixture(*arc) for arc in arcs)
        walk = distill(lambda *_: next(student), teacher, noise(), {}, config=PLAIN, ratio=0.5, generator=draws())
        for i, part in enumerate(walk):
            if i in keep:
                part.loss.backward()
        return [w.grad for arc in arcs for w in arc]

    both, first, second = gradients({0, 1}), gradients({0}), gradients({1})
    assert all(g is None for g in [*first[3:], *second[:3]])
    assert all(torch.equal(a, b) for a, b in zip(both, [*first[:3], *second[3:]], strict=True))


def test_the_sum_of_the_parts_has_the_same_gradient_as_part_by_part():
    def gradients(at_once):
        arc = weights()
        parts = distill(lambda *_: Mixture(*arc), teacher, noise(), {}, config=PLAIN, ratio=0.0, generator=draws())
        if at_once:
            sum(part.loss for part in parts).backward()
        else:
            [part.loss.backward() for part in parts]
        return [w.grad for w in arc]

    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(gradients(True), gradients(False), strict=True))


def test_with_images_every_segment_starts_from_them_noised():
    seen, clean = [], torch.randn(BATCH, TOKENS, WIDTH, generator=draws(4), dtype=torch.float64)

    def student(x, sigma, cond):
        seen.append((x, float(sigma[0])))
        return Mixture(*weights())

    list(distill(student, teacher, noise(), {}, config=PLAIN, ratio=1.0, generator=draws(), clean=clean))
    assert [sigma for _, sigma in seen] == pytest.approx([1.0, 3.2 / 4.2])
    for x, sigma in seen:
        torch.testing.assert_close(x, (1 - sigma) * clean + sigma * noise())


@pytest.mark.parametrize("config", [PLAIN, dataclasses.replace(PLAIN, handover="student", mode_dropout=0.5)])
@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_the_second_segment_starts_where_the_first_walk_ends_or_the_arc(config, ratio):
    seen, arc = [], Mixture(*weights())

    def student(x, sigma, cond):
        seen.append((x, sigma))
        return arc

    list(distill(student, teacher, noise(), {}, config=config, ratio=ratio, generator=draws()))
    assert torch.equal(seen[0][0], noise())
    arcs_end = noise() - arc.detach().displacement(0.0, 1 - shift_sigma(0.5))
    assert torch.allclose(seen[1][0], arcs_end) == (ratio == 0.0 or config.handover == "student")
    assert not seen[1][0].requires_grad
    assert [float(sigma[0]) for _, sigma in seen] == pytest.approx(step_grid(2)[:-1].tolist())


STATE_BY_STATE, HALVES = [3] * 4, [6, 6]


@pytest.mark.parametrize(
    ("ratio", "led", "calls"),
    [
        (0.0, 0, HALVES + HALVES),
        (0.5, 0, STATE_BY_STATE + STATE_BY_STATE),
        (1.0, 0, STATE_BY_STATE + STATE_BY_STATE),
        (0.0, 1, STATE_BY_STATE + HALVES),
    ],
)
def test_the_teacher_is_asked_for_half_the_states_at_a_time_where_the_student_leads(ratio, led, calls):
    sizes = []

    def counting(x, sigma, cond):
        sizes.append(len(x))
        return teacher(x, sigma, cond)

    arc = Mixture(*weights())
    config = dataclasses.replace(PLAIN, led=led)
    list(distill(lambda *_: arc, counting, noise(), {}, config=config, ratio=ratio, generator=draws()))
    assert sizes == calls


@pytest.mark.slow
def test_an_iteration_takes_six_tenths_of_the_memory_of_one_backward_pass_for_all_segments():
    """On the shipped teacher, against the teacher asked state by state, as the paper's authors do it."""
    from benchmarks.iteration import Bench, peak

    bench = Bench(batch=16)
    bench.prefetcher.close()
    assert peak(bench, bench.gradients) <= 0.6 * peak(bench, bench.gradients_authors)


def test_a_kept_walk_gives_the_same_loss_and_gradient_without_the_teacher():
    config = dataclasses.replace(PLAIN, final_step_scale=1.3)
    weight = torch.ones(TOKENS, 1, 1, dtype=torch.float64, requires_grad=True)

    def student(x, sigma, cond):
        v, logits, log_gamma = (w.detach().repeat(len(x) // BATCH, 1, 1, 1) for w in weights())
        return Mixture(v * weight * sigma[:, None, None, None], logits + x.mean((1, 2))[:, None, None, None], log_gamma)

    parts = list(distill(student, teacher, noise(), {}, config=config, ratio=1.0, generator=draws()))
    again = rehearse(student, [part.walk for part in parts], {}, config=config)
    for one, other in zip(parts, again, strict=True):
        assert other.loss.item() == pytest.approx(one.loss.item(), rel=1e-12)
        assert other.logs["distance"].item() == pytest.approx(one.logs["distance"].item(), rel=1e-12)
    gradients = [torch.autograd.grad(sum(part.loss for part in side), weight)[0] for side in (parts, again)]
    assert torch.allclose(*gradients, rtol=1e-12)


def test_mode_dropout_changes_where_the_teacher_is_asked_but_not_what_learns():
    config = Distill(steps=1, mode_dropout=0.5)
    arc, asked = weights(), []

    def asking(x, sigma, cond):
        asked.append((x[:BATCH], sigma[:BATCH]))
        return teacher(x, sigma, cond)

    (part,) = distill(lambda *_: Mixture(*arc), asking, noise(), {}, config=config, ratio=0.0, generator=draws())
    part.loss.backward()
    ((state, sigma), _) = asked
    assert not torch.allclose(state, noise() - Mixture(*arc).displacement(0.0, 1 - sigma))
    assert (arc[0].grad.abs().sum((0, 1, 3)) > 0).all()  # every mode has a gradient


def test_the_draws_come_from_the_generator_alone():
    def loss(seed):
        arc = Mixture(*weights())
        parts = distill(lambda *_: arc, teacher, noise(), {}, config=Distill(), ratio=0.3, generator=draws(seed))
        return [part.loss.item() for part in parts]

    torch.manual_seed(0)
    first = loss(1)
    torch.manual_seed(1)
    assert loss(1) == first != loss(2)


def test_the_loss_is_float32_for_half_precision_weights():
    arc = Mixture(*weights(dtype=torch.bfloat16))
    (part, _) = distill(lambda *_: arc, teacher, noise(torch.float32), {}, config=PLAIN, ratio=0.0, generator=draws())
    assert part.loss.dtype == torch.float32
    assert part.logs["loss"].requires_grad is False
    assert part.loss.item() == pytest.approx(0.5 * 15 * part.logs["distance"].item())


@pytest.mark.parametrize(("substeps", "short"), [(0, True), (1, True), (1.4, True), (1.6, False), (2, False)])
def test_an_interval_under_two_substeps_is_matched_in_the_instant(substeps, short):
    tau = torch.full((1, 1), 0.6, dtype=torch.float64)
    times = Schedule(Segment(1.0, 0.5), tau, tau - substeps / 128)
    assert torch.equal(matching_end(times, 0.0), tau) == short


def test_the_matching_interval_ends_with_the_segment():
    tau = torch.full((1, 1), 0.51, dtype=torch.float64)
    times = Schedule(Segment(1.0, 0.5), tau, tau - 0.005)
    assert matching_end(times, 3 / 128).item() == 0.51  # 1.28 sub-steps are left: none
    times = Schedule(Segment(1.0, 0.48), tau, tau - 0.01)
    assert matching_end(times, 3 / 128).item() == 0.48


def test_the_ratio_falls_from_one_to_zero():
    assert [teacher_ratio(i, 2000) for i in (0, 500, 1000, 2000, 9000)] == [1.0, 0.75, 0.5, 0.0, 0.0]
    assert teacher_ratio(0, 0) == 0.0
    assert [teacher_ratio(i, 100, hold=50) for i in (0, 50, 100, 150)] == [1.0, 1.0, 0.5, 0.0]
    assert [teacher_ratio(i, 0, hold=50) for i in (49, 50)] == [1.0, 0.0]


@pytest.mark.slow
def test_a_two_step_student_learns_to_beat_two_euler_steps():
    """Eight Gaussians on a circle: a small network, taught by the exact velocity, ends nearer than two chords."""
    angles = torch.arange(8) * torch.pi / 4
    centers = 3 * torch.stack([angles.cos(), angles.sin()], -1)

    def exact(x, sigma, cond):
        s, spread = sigma[:, None], 0.1
        keep, variance = 1 - s, (spread * (1 - s)).square() + s.square()
        offset = x[:, None] - keep[:, None] * centers
        posterior = (-offset.square().sum(-1) / (2 * variance)).softmax(-1)
        x0 = posterior @ centers + spread**2 * keep / variance * (x - keep * (posterior @ centers))
        return (x - x0) / s.clamp(min=1e-4)

    torch.manual_seed(0)
    modes = 4
    net = torch.nn.Sequential(torch.nn.Linear(3, 96), torch.nn.SiLU(), torch.nn.Linear(96, 96), torch.nn.SiLU())
    net.append(torch.nn.Linear(96, 2 * modes + modes + modes - 1))

    def student(x, sigma, cond):
        v, logits, log_gamma = net(torch.cat([x, sigma[:, None]], -1)).split([2 * modes, modes, modes - 1], -1)
        return Mixture(v.unflatten(-1, (modes, 2)), logits.unsqueeze(-1), log_gamma.unsqueeze(-1))

    optimizer, generator = torch.optim.Adam(net.parameters(), 3e-3), draws()
    for step in range(150):
        x, ratio = torch.randn(256, 2, generator=generator), teacher_ratio(step, 100)
        for part in distill(student, exact, x, {}, config=Distill(mode_dropout=0.05), ratio=ratio, generator=generator):
            part.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    x = torch.randn(1000, 2, generator=draws(5))
    end = euler(exact, x, {}, step_grid(100))
    chords, walked = euler(exact, x, {}, step_grid(2)), arcs(student, x, {}, step_grid(2))
    distances = [float((y - end).norm(dim=-1).mean()) for y in (walked, chords)]
    assert distances[0] < 0.6 * distances[1], distances


ENDED = dataclasses.replace(PLAIN, end=0.5, hold=ALWAYS)


def still(v):
    """A student whose velocity is the same everywhere."""

    def student(x, sigma, cond):
        one = v.expand(len(x), TOKENS, 1, WIDTH)
        return Mixture(one, torch.zeros(len(x), TOKENS, 1, PIXELS), torch.zeros(len(x), TOKENS, 0, PIXELS))

    return student


def test_the_loss_of_the_end_is_the_difference_of_mean_velocities_over_the_step():
    v = torch.randn(WIDTH, generator=draws(3), dtype=torch.float64)
    parts = list(distill(still(v), teacher, noise(), {}, config=ENDED, ratio=1.0, generator=draws()))
    for part, (above, below) in zip(parts, itertools.pairwise(step_grid(2).tolist()), strict=True):
        along = part.logs["distance"]
        end = (v - (part.walk.x - part.walk.end) / (above - below)).square().mean()
        expected = part.walk.times.segment.length * 15 * (along + end) / 2
        assert part.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_walk_that_has_an_end_is_the_teachers_to_the_end_of_the_step():
    def steady(x, sigma, cond):
        return torch.ones_like(x)

    (first, second) = distill(
        still(torch.ones(WIDTH).double()), steady, noise(), {}, config=ENDED, ratio=1.0, generator=draws()
    )
    torch.testing.assert_close(second.walk.end, noise() - 1)
    assert first.loss < 1e-12 and second.loss < 1e-12


def test_the_end_counts_where_the_teacher_leads_and_not_on_the_students_own_path():
    """A first segment that is led to its end, and a second whose walk is the student's: as without the end there."""
    v = torch.randn(WIDTH, generator=draws(3), dtype=torch.float64)
    led = dataclasses.replace(PLAIN, led=1)
    ended = dataclasses.replace(led, end=0.5, hold=1)
    plain = list(distill(still(v), teacher, noise(), {}, config=led, ratio=0.0, generator=draws(), clean=noise()))
    both = list(distill(still(v), teacher, noise(), {}, config=ended, ratio=0.0, generator=draws(), clean=noise()))
    assert both[1].loss == plain[1].loss and both[0].loss != plain[0].loss


def test_a_kept_walk_keeps_its_end():
    v = torch.randn(WIDTH, generator=draws(3), dtype=torch.float64)
    parts = list(distill(still(v), teacher, noise(), {}, config=ENDED, ratio=1.0, generator=draws()))
    again = rehearse(still(v), [part.walk for part in parts], {}, config=ENDED)
    assert [part.loss.item() for part in again] == pytest.approx([part.loss.item() for part in parts], rel=1e-9)


def test_the_second_segment_starts_where_the_averaged_student_arrives():
    v = torch.randn(WIDTH, generator=draws(3), dtype=torch.float64)
    config = dataclasses.replace(PLAIN, handover="average")
    _, second = distill(
        still(0 * v), teacher, noise(), {}, config=config, ratio=1.0, generator=draws(), average=still(v)
    )
    length = 1 - float(step_grid(2)[1])
    torch.testing.assert_close(second.walk.x, noise() - length * v)


def test_the_averaged_student_is_asked_for_by_name_and_the_end_where_the_teacher_leads():
    config = dataclasses.replace(PLAIN, handover="average")
    with pytest.raises(ValueError, match="needs the averaged student"):
        next(distill(still(torch.ones(WIDTH)), teacher, noise(), {}, config=config, ratio=1.0, generator=draws()))
    with pytest.raises(ValueError, match="where the teacher never leads; raise distill.hold or distill.led"):
        Distill(end=0.5)
    assert Distill(end=0.5, led=2).end == 0.5
