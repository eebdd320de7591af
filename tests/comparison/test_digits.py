"""The second bench: real pictures in halves, prompts in words, a pipeline that loses nothing, the order of methods."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from arcflow.comparison.bench import Bench
from arcflow.comparison.jobs import Job
from arcflow.comparison.results import Comparison, SeedMean, ranked, summary
from arcflow.comparison.runs import bench_reference, claim_comparison, run_job
from arcflow.reports.comparison import write_ranking
from arcflow.system import records
from arcflow.world.autoencoder import to_images, to_tensor, vae_decode, vae_encode
from arcflow.world.text import build_tokenizer, tokenize
from benchmarks.digits import order, words
from benchmarks.digits.bench import DIGITS, USUAL

METHODS = Path(__file__).parents[2] / "benchmarks" / "results" / "methods.json"


def test_every_prompt_names_its_digit_in_known_words_and_is_on_one_side() -> None:
    for digit in range(10):
        trained, held = (words.prompts(digit, held_out=side) for side in (False, True))
        assert len(trained) > 100 and len(held) > 20 and not {*trained} & {*held}
        assert {words.digit_of(text) for text in trained + held} == {digit}
    texts = words.captions(10**6) + words.held_out(500)
    ids = tokenize(build_tokenizer(words.VOCABULARY, words.MAX_LENGTH), texts)
    assert not (ids == words.VOCABULARY["<unk>"]).any()
    assert (ids == words.VOCABULARY["</s>"]).sum(1).eq(1).all()


@pytest.mark.parametrize("text", ["a digit", "a seven and a 2"])
def test_a_prompt_of_no_digit_or_several_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"names \d digits: expected one"):
        words.digit_of(text)


def test_the_list_of_captions_is_read_whole() -> None:
    assert len({*words.captions(USUAL.prompts)}) == USUAL.prompts
    assert DIGITS.captions(USUAL).prompts.endswith("captions.txt")
    with pytest.raises(ValueError, match="captions is 5: expected 1960.*leave it out"):
        DIGITS.captions(replace(USUAL, prompts=5))


def test_a_bench_agrees_with_itself_and_disagrees_with_its_mirror_image() -> None:
    bench = records.read(Comparison, METHODS)
    names = ranked(bench.rows, 2)
    mirrored = replace(bench, rows={a: bench.rows[b] for a, b in zip(names, names[::-1], strict=True)})
    itself, mirror = (order.agreement(bench, other, 2, "distance") for other in (bench, mirrored))
    assert itself and mirror
    assert itself.kendall == itself.spearman == 1 and not itself.opposite and itself.same > 0
    assert mirror.kendall == mirror.spearman == -1 and not mirror.same and 0 < len(mirror.opposite) <= itself.same
    assert order.agreement(bench, replace(bench, rows={}), 2, "distance") is None


def test_one_training_of_each_tells_nothing_apart() -> None:
    bench = records.read(Comparison, METHODS)
    single = {}
    for place, (name, row) in enumerate(bench.rows.items()):
        distance = SeedMean(mean=0.1 * place, low=None, high=None, seeds=[0.1 * place])
        single[name] = replace(row, calls={2: replace(row.calls[2], distance=distance)})
    found = order.agreement(replace(bench, rows=single), replace(bench, rows=single), 2, "distance")
    assert found and found.kendall == 1 and found.same == 0 and not found.opposite


@pytest.mark.slow
def test_the_checker_errs_rarely_on_pictures_it_has_not_seen() -> None:
    pytest.importorskip("sklearn")
    from benchmarks.digits import pictures

    halves = [pictures.pictures(half) for half in ("teacher", "checker")]
    assert sum(len(half.digits) for half in halves) == 1797
    assert all({*half.digits.tolist()} == {*range(10)} for half in halves)
    assert pictures.checker_error() < 0.02
    real = halves[0]
    asked = [f"a {words.NAMES[digit]}" for digit in real.digits]
    assert np.mean(pictures.right(real.images, asked)) == 1 - pictures.checker_error()
    noise = np.random.default_rng(0).integers(0, 256, real.images.shape, np.uint8)
    assert pictures.distance_to_real(noise) > 100 > 1 > abs(pictures.distance_to_real(real.images))


@pytest.mark.slow
def test_the_autoencoder_gives_back_what_it_is_given() -> None:
    pytest.importorskip("sklearn")
    from benchmarks.digits.pictures import pictures
    from benchmarks.digits.teacher import build_autoencoder

    vae, images = build_autoencoder(), pictures("teacher").images
    with torch.no_grad():
        latents = vae_encode(vae, to_tensor(images))
        assert (to_images(vae_decode(vae, latents)) == images).all()
    assert latents.shape[1:] == (1, 8, 8) and abs(latents.mean()) < 1e-3 and abs(latents.std() - 1) < 1e-3


@pytest.mark.slow
def test_a_method_is_compared_on_the_digits_as_on_the_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From nothing: a teacher of two steps a stage, a method trained on it, its table and its report."""
    pytest.importorskip("sklearn")
    from benchmarks.digits.teacher import Lengths, train

    monkeypatch.setattr("arcflow.comparison.bench.TEACHER_STEPS", 4)
    monkeypatch.setattr("benchmarks.digits.teacher.PROBED", 60)
    teacher = train(tmp_path, Lengths(text_steps=2, flow_steps=2, guidance_steps=2, batch=8))
    small = {"calls": (2,), "seeds": 1, "budget": 200, "batch": 4, "count": 10, "alike": 2, "pictures": 2, "rank": 2}
    plan = replace(USUAL, model=str(teacher), out=str(tmp_path / "compare"), only=("linear",), **small)
    claim_comparison(plan)
    bench = Bench(plan, DIGITS)
    reference = bench_reference(plan, bench)
    runs = {job: run_job(bench, reference, job) for job in (Job("methods", n, (2,), 0) for n in ("euler", "linear"))}

    results = summary(plan, runs, DIGITS)
    means = results.rows["linear"].calls[2]
    assert means.to_real is not None and means.skills.keys() == {*words.NAMES} and not means.broken
    assert results.about.command.startswith("python -m benchmarks.digits compare --only linear")
    report = write_ranking(tmp_path / "compare" / "digits.html", results, tmp_path / "compare", DIGITS)
    assert "to real pictures" in report.with_suffix(".md").read_text() and bench.prompts[0] in report.read_text()
