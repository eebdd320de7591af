"""The metrics are what their definitions say, and what other people's programs make of the same features."""

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from arcflow.metrics.images import clip_score, diversity, psnr, squared_error
from arcflow.metrics.intervals import Interval, bootstrap, prompt_means, seed_difference, seed_interval, share_interval
from arcflow.metrics.sets import frechet_distance, kernel_distance, precision_recall
from arcflow.metrics.streaming import Moments, merge
from benchmarks import metrics_reference as reference

NUMBERS = json.loads(reference.FILE.read_text("utf-8"))
"""Made by torchmetrics and torch-fidelity."""


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    return frechet_distance(Moments.of(a), Moments.of(b))


@pytest.fixture(params=list(reference.CASES))
def case(request):
    """Two sets of features, and what the others make of them."""
    real, made = reference.features(request.param)
    return real, made, NUMBERS[request.param]


def test_frechet_distance_is_that_of_torchmetrics_and_torch_fidelity(case) -> None:
    real, made, numbers = case
    for package in ("torchmetrics", "torch_fidelity"):
        assert frechet(real, made) == pytest.approx(numbers[package]["frechet"], rel=1e-6)


def test_kernel_distance_is_that_of_torch_fidelity_subset_for_subset(case) -> None:
    real, made, numbers = case
    ours = kernel_distance(real, made, subsets=reference.SUBSETS, subset_size=reference.SUBSET_SIZE)
    assert ours == pytest.approx(numbers["torch_fidelity"]["kernel"], rel=1e-6)


def test_kernel_distance_of_all_images_is_that_of_torchmetrics(case) -> None:
    real, made, numbers = case
    ours = kernel_distance(real, made, subsets=2, subset_size=len(real))
    assert ours.mean == pytest.approx(numbers["torchmetrics"]["kernel_all"], rel=1e-6)
    assert ours.std == pytest.approx(0, abs=1e-12)


def test_precision_and_recall_are_those_of_torch_fidelity(case) -> None:
    real, made, numbers = case
    ours = precision_recall(real, made, neighbors=reference.NEIGHBORS)
    assert ours == pytest.approx(numbers["torch_fidelity"]["precision_recall"], rel=1e-6)


def test_psnr_is_that_of_torchmetrics() -> None:
    a, b = reference.images()
    assert psnr(a, b).tolist() == pytest.approx(NUMBERS["psnr"])
    assert psnr(a, a).tolist() == [math.inf] * len(a)


def gaussian(mean: torch.Tensor, covariance: torch.Tensor, count: int = 10) -> Moments:
    """Images with exactly these moments."""
    outer = (count - 1) * covariance + count * mean.outer(mean)
    return Moments(torch.tensor(float(count), dtype=torch.float64), count * mean, outer)


def test_frechet_distance_of_aligned_gaussians_is_that_of_means_and_deviations() -> None:
    turn = torch.linalg.qr(normal(5, 5)).Q
    mean, other, std, spread = normal(5, seed=1), normal(5, seed=2), normal(5, seed=3).abs(), normal(5, seed=4).abs()
    a = gaussian(turn @ mean, turn @ torch.diag(std**2) @ turn.T)
    b = gaussian(turn @ other, turn @ torch.diag(spread**2) @ turn.T)
    wanted = (mean - other).square().sum() + (std - spread).square().sum()
    assert frechet_distance(a, b) == pytest.approx(float(wanted))


@pytest.mark.parametrize("count", [2, 30, 200])
def test_frechet_distance_is_zero_to_itself_and_the_same_both_ways(count) -> None:
    """Also with fewer images than features."""
    a, b = normal(count, 60) + 3, normal(count, 60, seed=1).exp()
    assert frechet(a, a.flip(0)) == pytest.approx(0, abs=1e-10)
    assert frechet(a, b) == pytest.approx(frechet(b, a))


def test_frechet_distance_of_merged_halves_is_that_of_the_whole(case) -> None:
    real, made, _ = case
    halves = merge(*(Moments.of(half) for half in made.chunk(2)))
    assert frechet_distance(Moments.of(real), halves) == pytest.approx(frechet(real, made))


def test_frechet_distance_of_one_image_repeated_is_that_of_means() -> None:
    assert frechet(torch.zeros(5, 3), torch.ones(5, 3)) == pytest.approx(3)


def test_kernel_distance_is_zero_on_average_between_draws_of_the_same() -> None:
    """Unbiased, however few: below zero as often as above."""
    drawn = [
        kernel_distance(normal(8, 3, seed=i), normal(8, 3, seed=1000 + i), subsets=1, subset_size=8).mean
        for i in range(60)
    ]
    assert abs(np.mean(drawn)) < 4 * np.std(drawn) / len(drawn) ** 0.5
    assert 0.3 < np.mean(np.array(drawn) < 0) < 0.8


def covered(x: np.ndarray, points: np.ndarray, neighbors: int) -> float:
    """The definition of Kynkaanniemi et al., word for word."""

    def inside(image: np.ndarray) -> bool:
        for i, point in enumerate(points):
            others = [np.linalg.norm(point - other) for j, other in enumerate(points) if j != i]
            if np.linalg.norm(image - point) <= sorted(others)[neighbors - 1]:
                return True
        return False

    return float(np.mean([inside(image) for image in x]))


@pytest.mark.parametrize("neighbors", [1, 3])
@pytest.mark.parametrize("repeated", [False, True])
def test_precision_and_recall_are_their_definition(neighbors, repeated) -> None:
    """Also where images repeat, far from the origin: equal images stay equal."""
    real, made = normal(40, 2), 1.5 * normal(30, 2, seed=1) + 0.5
    if repeated:
        real, made = real.round() + 1e3, made.round() + 1e3
    ours = precision_recall(real, made, neighbors=neighbors)
    wanted = covered(made.numpy(), real.numpy(), neighbors), covered(real.numpy(), made.numpy(), neighbors)
    assert ours == pytest.approx(wanted)
    assert 0 < min(ours) < 1


def test_generated_images_of_one_kind_have_precision_and_little_recall() -> None:
    real = torch.cat([normal(50, 4), normal(50, 4, seed=1) + 20])
    one_kind, noise = normal(40, 4, seed=2) * 0.5, 40 * normal(40, 4, seed=3)
    assert precision_recall(real, one_kind).precision > 0.9
    assert precision_recall(real, one_kind).recall < 0.5
    assert precision_recall(real, noise).precision < 0.1


def test_clip_score_is_100_for_parallel_embeddings_of_any_length() -> None:
    x = normal(3, 8)
    turned = torch.cat([x[:1], -x[1:2], torch.zeros(1, 8, dtype=torch.float64)])
    assert clip_score(x, 5 * turned).tolist() == pytest.approx([100, -100, 0])


def test_the_squared_error_of_a_batch_is_the_mean_of_its_images() -> None:
    a, b = normal(5, 4, 3), normal(5, 4, 3, seed=1)
    assert squared_error(a, b).shape == (5,)
    assert squared_error(a, b).mean() == pytest.approx((a - b).square().mean())


def test_diversity_is_the_mean_distance_between_the_seeds_of_a_prompt() -> None:
    corner = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])  # sides 3, 4, 5
    x = torch.cat([corner, torch.ones(3, 2), 2 * corner + 7])
    assert diversity(x, seeds=3).tolist() == pytest.approx([4, 0, 8])
    assert torch.equal(diversity(x.view(9, 2, 1), seeds=3), diversity(x, seeds=3))


def test_prompt_means_are_over_the_seeds() -> None:
    assert prompt_means(torch.tensor([1.0, 3.0, 5.0, 9.0]), seeds=2).tolist() == [2, 7]


def test_an_interval_holds_the_true_mean_as_often_as_it_says() -> None:
    drawn = [bootstrap(normal(40, seed=i) + 3, confidence=0.8, resamples=200) for i in range(60)]
    assert np.mean([interval.low <= 3 <= interval.high for interval in drawn]) == pytest.approx(0.8, abs=0.1)


def test_a_ratio_of_means_is_over_the_same_prompts() -> None:
    teacher = normal(30).exp()
    exact = bootstrap(0.5 * teacher, over=teacher)
    assert (exact.low, exact.high) == pytest.approx((0.5, 0.5))
    student = teacher * normal(30, seed=1).exp()
    assert bootstrap(student, over=teacher).mean == pytest.approx(float(student.mean() / teacher.mean()))


def test_an_interval_is_the_same_every_time_and_reads_as_one() -> None:
    values = normal(30)
    assert bootstrap(values, seed=1) == bootstrap(values, seed=1) != bootstrap(values, seed=2)
    assert f"{Interval(0.5, 0.25, 1.0):.2f}" == "0.50 [0.25, 1.00]"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frechet(normal(5, 3), normal(5, 4)), "got features of widths 3 and 4; use the same feature network"),
        (lambda: kernel_distance(normal(5, 3), normal(5, 4)), "got features of widths 3 and 4"),
        (lambda: precision_recall(normal(5, 3), normal(5, 4)), "got features of widths 3 and 4"),
        (lambda: kernel_distance(normal(9, 3), normal(5, 3)), "subset_size=1000; .* here subset_size=5 at most"),
        (lambda: precision_recall(normal(9, 3), normal(3, 3)), "neighbors=3; expected 1 or more, and fewer"),
        (lambda: squared_error(normal(5, 3), normal(1, 3)), r"got \(5, 3\) and \(1, 3\); expected pairs"),
        (lambda: clip_score(normal(5, 3), normal(1, 3)), "expected pairs of the same shape"),
        (lambda: diversity(normal(5, 3), seeds=2), "got 5 images and seeds=2; expected as many images of each"),
        (lambda: diversity(normal(5, 3), seeds=1), "a distance takes two images of each prompt"),
        (lambda: prompt_means(normal(5), seeds=0), "got 5 images and seeds=0"),
        (lambda: bootstrap(normal(1)), "got 1 values over 1; expected one finite value for each of two prompts"),
        (lambda: bootstrap(normal(4), over=normal(3)), "got 4 values over 3"),
        (lambda: bootstrap(torch.tensor([1.0, math.inf])), "expected one finite value"),
        (lambda: bootstrap(normal(3), over=torch.zeros(3)), "something other than 0 to divide by"),
    ],
)
def test_bad_input_is_refused_with_a_remedy(unchecked, call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_the_interval_over_trainings_is_students():
    values = [0.11, 0.13, 0.12, 0.16]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert seed_interval(values) == pytest.approx((np.mean(values), low, high))
    with pytest.raises(ValueError, match="two trainings or more"):
        seed_interval([0.1])


def test_the_difference_of_trainings_is_welchs():
    a, b = [0.20, 0.22, 0.27], [0.11, 0.13, 0.12, 0.16]
    known = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert seed_difference(a, b)[1:] == pytest.approx((known.low, known.high))
    assert seed_difference(b, a).high == pytest.approx(-known.low)


def test_a_single_number_is_exact_in_a_difference():
    a = [0.20, 0.22, 0.27]
    around = seed_interval(a)
    assert seed_difference(a, [0.1]) == pytest.approx([end - 0.1 for end in around])
    assert seed_difference([0.1], a) == pytest.approx((0.1 - around.mean, 0.1 - around.high, 0.1 - around.low))
    assert seed_difference([0.3], [0.1]) == pytest.approx((0.2, 0.2, 0.2))


def test_a_share_has_wilsons_interval_which_stays_within_0_and_1():
    p, n, z = 0.75, 40, 1.959964
    center, half = (p + z**2 / 2 / n) / (1 + z**2 / n), z * (p * (1 - p) / n + z**2 / 4 / n**2) ** 0.5 / (1 + z**2 / n)
    assert share_interval(p, n) == pytest.approx((p, center - half, center + half))
    assert share_interval(1.0, 24)[1:] == pytest.approx((24 / (24 + z**2), 1.0))
