"""Suites: official files in, official folders out; whatever is cut off goes on, and nothing is done twice."""

import json
import shlex
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from arcflow import cli, student
from arcflow.evaluation import images as drawn
from arcflow.evaluation import measured, scorers, suite_run, summary
from arcflow.evaluation.results import CategoryScore, Settings, SuiteResults
from arcflow.evaluation.suites import SUITES
from arcflow.evaluation.suites.suite import read_items
from arcflow.sampling import folder as sample_folder
from arcflow.sampling import open
from arcflow.sampling.generate import generate, stock_euler
from arcflow.student.identity import tensors_digest
from arcflow.system import records
from arcflow.system.packages import About
from arcflow.world.scene import FIRST_SEED, held_out
from tests.support.pipelines import SIDE, save_style
from tests.support.suites import GENEVAL, prompt_file, request, table

PROMPTS = {
    "geneval": [
        ("00000", "a photo of a cube"),
        ("00001", "a photo of a red ball"),
        ("00002", "a photo of a blue ball"),
    ],
    "dpg": [("coco12", "a red cube"), ("whoops1", "two green balls")],
    "oneig": [("human/000", "a man"), ("human/001", "a king"), ("object/000", "a")],
    "coco": [("000000000002", "a blue ball"), ("000000000007", "a red cube")],
    "hpsv2": [
        (f"{style}/0000{i}", f"{style} of a {thing}")
        for style in ("anime", "concept-art", "paintings", "photo")
        for i, thing in enumerate(("cube", "ball"))
    ],
}
LAYOUTS = {
    "geneval": {
        f"0000{i}/{file}" for i in range(3) for file in ("metadata.jsonl", *(f"samples/000{j}.png" for j in range(4)))
    },
    "dpg": {"coco12.png", "whoops1.png"},
    "oneig": {"human/mine/000.webp", "human/mine/001.webp", "object/mine/000.webp"},
    "coco": {"000000000002.png", "000000000007.png"},
    "hpsv2": {f"{style}/0000{i}.jpg" for style in ("anime", "concept-art", "paintings", "photo") for i in range(2)},
}


ABOUT = About(versions={}, python="3", device="x", threads=1, command="a test")


@pytest.fixture
def evaluate(flux, tmp_path, official_file):
    """Evaluate the tiny teacher on a suite, or a process's share of it; the results, None while others are missing."""

    def run(suite="geneval", out="out", share=(0, 1), **more):
        prompts = {} if suite == "world" else {"prompts": official_file(suite), "complete": False}
        size = 64 if suite == "world" else SIDE
        options = {"batch": 12, "steps": 1, **prompts, **more}
        asked = request(suite=suite, out=tmp_path / out, name="mine", **options)
        recipe = {"height": size, "width": size, "guidance": None, "version": "0"}
        plan = suite_run.plan(asked, share, "", **recipe)
        plan.draw(lambda: flux)
        plan.score()
        return plan.results(ABOUT)

    return run


@pytest.fixture
def official_file(tmp_path):
    made = {}

    def path(name):
        if name not in made:
            made[name] = prompt_file(name, tmp_path)
        return made[name]

    return path


@pytest.fixture
def saved(monkeypatch):
    """Names of all images that are written."""
    names: list[str] = []
    save = sample_folder.save_png

    def count(image, recipe, path):
        save(image, recipe, path)
        names.append(path.name)

    monkeypatch.setattr(sample_folder, "save_png", count)
    return names


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", PROMPTS)
def test_official_prompt_files_are_read(name, tmp_path) -> None:
    items = read_items(SUITES[name], prompt_file(name, tmp_path), complete=False)
    assert [(item.id, item.prompt) for item in items] == PROMPTS[name]
    assert [item.number for item in items] == list(range(len(items)))


@pytest.mark.parametrize(
    ("name", "whole"), [("geneval", 553), ("dpg", 1065), ("oneig", 1120), ("coco", 10_000), ("hpsv2", 3200)]
)
def test_a_part_of_a_benchmark_is_not_taken_for_the_whole(name, whole, tmp_path) -> None:
    with pytest.raises(
        ValueError, match=rf"{len(PROMPTS[name])}.* prompts, not {whole}.*--no-complete.*expected .* from"
    ):
        read_items(SUITES[name], prompt_file(name, tmp_path))


def test_a_whole_benchmark_is_taken(tmp_path) -> None:
    (tmp_path / "prompts").mkdir()
    for i in range(1065):
        (tmp_path / "prompts" / f"vrd{i}.txt").write_text("a red cube\n")
    assert len(read_items(SUITES["dpg"], tmp_path / "prompts")) == 1065
    classes = {"Anime_Stylization": 245, "Portrait": 244, "General_Object": 206, "Text_Rendering": 200}
    classes |= {"Knowledge_Reasoning": 225, "Multilingualism": 200}
    rows = [[name, f"{i:03d}", "a cube"] for name, count in classes.items() for i in range(count)]
    chinese = table(tmp_path / "OneIG-Bench-ZH.csv", ["category", "id", "prompt_cn"], *rows)
    assert len(read_items(SUITES["oneig"], chinese)) == 1320


def test_the_table_of_dpg_and_its_folder_mean_the_same(tmp_path) -> None:
    (tmp_path / "prompts").mkdir()
    for name, text in PROMPTS["dpg"]:
        (tmp_path / "prompts" / f"{name}.txt").write_text(text)
    suite = SUITES["dpg"]
    by_table = read_items(suite, prompt_file("dpg", tmp_path), complete=False)
    assert read_items(suite, tmp_path / "prompts", complete=False) == by_table


@pytest.mark.parametrize(
    ("name", "text", "flaw"),
    [
        ("geneval", '{"tag": "colors", "include": []}', "no 'prompt'"),
        ("geneval", '{"tag": "taste", "include": [], "prompt": "a cube"}', "unknown category 'taste'"),
        ("geneval", "a cube", "Expecting value"),
        ("geneval", '{"tag": "colors", "include": [], "prompt": " "}', "00000 is empty"),
        ("dpg", "id,text\n1,a cube", "no column 'item_id'"),
        ("dpg", "item_id,text\n1,a cube\n1,a ball", "1 has two prompts"),
        ("dpg", "item_id,text\n../1,a cube", "no name for an image"),
        ("oneig", "category,id,prompt\nPortrait,0,a", "no column 'prompt_en' or 'prompt_cn'"),
        ("oneig", "category,id,prompt_en\nPortrait,0,a\nPortrait,0,b", "human/0 is there more than once"),
        ("coco", '{"images": []}', "no 'annotations'"),
        ("hpsv2", "[]", "anime.json"),
    ],
)
def test_a_file_that_is_not_the_benchmarks_is_refused_with_where_to_get_it(name, text, flaw, tmp_path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"{flaw}.*expected .* from {SUITES[name].source[:12]}.*get it again"):
        read_items(SUITES[name], path, complete=False)


def test_prompts_are_asked_for_where_needed_and_nowhere_else(tmp_path) -> None:
    with pytest.raises(
        ValueError, match=r"evaluation_metadata.jsonl from github.com/djghosh13/geneval; give .*--prompts"
    ):
        read_items(SUITES["geneval"], None)
    with pytest.raises(ValueError, match="built in.*leave --prompts out"):
        read_items(SUITES["world"], tmp_path)


def test_a_smaller_count_is_spread_and_keeps_places_in_the_list(tmp_path) -> None:
    items = read_items(SUITES["hpsv2"], prompt_file("hpsv2", tmp_path), count=4, complete=False)
    assert [item.number for item in items] == [0, 2, 4, 6]
    assert [item.prompt for item in read_items(SUITES["world"], None, count=5)] == held_out(5)


def test_noise_depends_on_suite_prompt_and_draw_alone(tmp_path) -> None:
    path, suite = prompt_file("hpsv2", tmp_path), SUITES["hpsv2"]
    every, some = (read_items(suite, path, count=count, complete=False) for count in (None, 4))
    assert [suite.seed(item, 0) for item in some] == [suite.seed(item, 0) for item in every][::2]
    seeds = {SUITES[name].seed(item, draw) for name in SUITES for item in every for draw in range(3)}
    assert len(seeds) == len(SUITES) * len(every) * 3
    assert [SUITES["world"].seed(item, 0) for item in every] == [FIRST_SEED + i for i in range(len(every))]


@pytest.mark.parametrize("name", LAYOUTS)
def test_images_lie_where_the_official_scorer_looks(name, evaluate, tmp_path) -> None:
    results = evaluate(name)
    assert files(tmp_path / "out" / "official") == LAYOUTS[name]
    assert results.pictures == len(PROMPTS[name]) * SUITES[name].images and not results.complete
    assert records.read(SuiteResults, tmp_path / "out" / "results.json") == results


def test_grids_are_square_row_by_row_and_metadata_is_the_benchmarks_line(evaluate, tmp_path) -> None:
    evaluate("dpg")
    grid = np.asarray(Image.open(tmp_path / "out/official/coco12.png"))
    assert grid.shape == (2 * SIDE, 2 * SIDE, 3)
    corners = [grid[y : y + SIDE, x : x + SIDE] for y in (0, SIDE) for x in (0, SIDE)]
    for draw, corner in enumerate(corners):
        assert np.array_equal(corner, measured.read_image(tmp_path / f"out/pictures/00000-{draw}.png"))
    evaluate("geneval", out="other")
    assert json.loads((tmp_path / "other/official/00001/metadata.jsonl").read_text()) == GENEVAL[1]
    first, shown = tmp_path / "other/pictures/00001-2.png", tmp_path / "other/official/00001/samples/0002.png"
    assert first.read_bytes() == shown.read_bytes() and first.samefile(shown)
    with pytest.raises(ValueError, match="3 images of a prompt make no square.*--images 4"):
        evaluate("dpg", out="third", images=3)


def test_images_are_those_of_the_stock_pipeline_from_their_seed(evaluate, flux, tmp_path) -> None:
    evaluate("coco", steps=2)
    items = read_items(SUITES["coco"], tmp_path / "captions_val2014.json", complete=False)
    with stock_euler(flux):
        seeds = [SUITES["coco"].seed(item, 0) for item in items]
        stock = generate(flux, [item.prompt for item in items], seeds, steps=2, height=SIDE, width=SIDE).images
    for item, image in zip(items, stock, strict=True):
        assert np.array_equal(measured.read_image(tmp_path / f"out/pictures/0000{item.number}-0.png"), image)


SCORER = """
import json, sys
manifest, out, flaw = sys.argv[1:]
with open(out, "w") as answers, open(out.replace(".out", ".asked"), "a") as asked:
    for place, line in enumerate(map(json.loads, open(manifest))):
        assert open(line["image"], "rb").read(4) == b"\\x89PNG" and line["prompt"], line
        score = len(line["prompt"]) + int(line["id"][-1])
        record = {"id": line["id"], "score": score}
        if flaw == "dies" and place == 3:
            answers.write('{"id": "')
            answers.flush()
            sys.exit("out of memory")
        if flaw == "stranger" and place == 1:
            record["id"] = "nobody"
        if flaw == "silent" and place == 1:
            continue
        if flaw == "empty" and place == 1:
            del record["score"]
        if flaw == "nan" and place == 1:
            record["score"] = float("nan")
        if flaw == "word" and place == 1:
            record = "good"
        if flaw == "prose" and place == 1:
            answers.write("loading ...\\n")
        if flaw == "twice" and place == 1:
            answers.write(json.dumps({"id": line["id"], "score": -1}) + "\\n")
        answers.write(json.dumps(record) + "\\n")
        asked.write(line["id"] + "\\n")
"""


@pytest.fixture
def scorer(tmp_path):
    (tmp_path / "score.py").write_text(SCORER)

    def command(flaw="none") -> str:
        return f"{shlex.quote(sys.executable)} -S {shlex.quote(str(tmp_path / 'score.py'))} {{manifest}} {{out}} {flaw}"

    return command


def lines(*ids: str, folder: Path) -> list[scorers.ManifestLine]:
    Image.new("RGB", (1, 1)).save(folder / "a.png")
    more = {"prompt": "a cube", "image": str(folder / "a.png"), "category": "", "suite": "x", "seed": 0}
    return [scorers.ManifestLine(id=name, **more) for name in ids]


def test_a_scorer_is_asked_about_what_has_no_score_and_nothing_else(scorer, tmp_path) -> None:
    assert scorers.run_scorer(tmp_path, "hps", scorer(), lines("x/0", "x/1", folder=tmp_path)) == 2
    assert scorers.run_scorer(tmp_path, "hps", scorer(), lines("x/0", "x/1", "x/2", folder=tmp_path)) == 1
    assert scorers.run_scorer(tmp_path, "hps", "false {manifest} {out}", lines("x/2", folder=tmp_path)) == 0
    assert scorers.read_scores(tmp_path, "hps") == {"x/0": 6, "x/1": 7, "x/2": 8}
    assert scorers.read_scores(tmp_path, "hp") == {}
    assert (tmp_path / "scores/hps.asked").read_text().split() == ["x/0", "x/1", "x/2"]


def test_a_scorer_that_dies_loses_nothing_it_answered(scorer, tmp_path) -> None:
    five = lines(*(f"x/{i}" for i in range(5)), folder=tmp_path)
    with pytest.raises(
        ValueError, match=r"ended with code 1 after 3 of 5 .*kept \(out of memory; .*goes on from there"
    ):
        scorers.run_scorer(tmp_path, "hps", scorer("dies"), five)
    assert scorers.run_scorer(tmp_path, "hps", scorer(), five) == 2
    assert scorers.read_scores(tmp_path, "hps") == {f"x/{i}": 6 + i for i in range(5)}
    assert Counter((tmp_path / "scores/hps.asked").read_text().split()) == Counter(f"x/{i}" for i in range(5))


@pytest.mark.parametrize("share", [(0, 1), (1, 2)])
def test_answers_of_a_run_that_was_killed_are_kept(share, scorer, tmp_path) -> None:
    """It left a manifest and some answers; whoever comes after collects them, one process those of several."""
    store = tmp_path / "scores"
    store.mkdir()
    left = store / f"hps{scorers.part_of(share)}"
    left.with_suffix(".manifest").write_text("".join(json.dumps({"id": f"x/{i}"}) + "\n" for i in range(3)))
    left.with_suffix(".out").write_text('{"id": "x/0", "score": 0.5}\n{"id": "x/1", "sco')
    assert scorers.run_scorer(tmp_path, "hps", scorer(), lines("x/0", "x/1", folder=tmp_path)) == 1
    assert scorers.read_scores(tmp_path, "hps") == {"x/0": 0.5, "x/1": 7}


@pytest.mark.parametrize(
    ("flaw", "said", "kept"),
    [
        ("stranger", "line 2: unknown id 'nobody'", 2),
        ("empty", "line 2: x/1 has no score", 2),
        ("nan", "line 2: x/1 has the score nan", 2),
        ("word", "line 2: unknown id 'good'", 2),
        ("prose", "line 2: no JSON", 3),
        ("twice", "line 3: x/1 has two scores, -1 and 7", 3),
        ("silent", "left out 'x/1' after 2 of 3 images", 2),
    ],
)
def test_strange_answers_are_one_error_and_good_ones_are_kept(flaw, said, kept, scorer, tmp_path) -> None:
    three = lines("x/0", "x/1", "x/2", folder=tmp_path)
    with pytest.raises(ValueError, match=rf'{said}.*expected one line {{"id".*run the same command again'):
        scorers.run_scorer(tmp_path, "hps", scorer(flaw), three)
    assert len(scorers.read_scores(tmp_path, "hps")) == kept
    assert scorers.run_scorer(tmp_path, "hps", scorer(), three) == 3 - kept


def test_a_scorer_does_not_take_itself_for_one_of_our_processes(monkeypatch, tmp_path) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "4,6"}.items():
        monkeypatch.setenv(name, value)
    there = scorers._environment()
    assert there["CUDA_VISIBLE_DEVICES"] == "6" and not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(there)


@pytest.mark.parametrize("named", ["hps", "hps=score.py", "hps=score.py {manifest}", "a b=x {manifest} {out}"])
def test_a_scorer_needs_a_name_and_both_places(named) -> None:
    with pytest.raises(ValueError, match=r"expected NAME='COMMAND'.*for example hps='python score.py"):
        scorers.parse_scorer(named)


def comparable(results: SuiteResults) -> dict:
    return {name: getattr(results, name) for name in ("suite", "settings", "prompts", "pictures", "metrics")}


@pytest.mark.slow
def test_a_run_killed_at_every_stage_goes_on_and_does_nothing_twice(
    evaluate, scorer, saved, monkeypatch, tmp_path
) -> None:
    from arcflow.metrics import features

    evaluate("dpg", out="teacher", images=4, steps=2)
    more = {"scorer": (f"hps={scorer()}",), "reference": tmp_path / "teacher", "features": ("dino",)}
    dying = {"scorer": (f"hps={scorer('dies')}",)}
    seen: list[int] = []

    def dino(model, device):
        def call(images):
            seen.extend(images.reshape(len(images), -1).astype(int).sum(1))
            return torch.from_numpy(images.reshape(len(images), -1)[:, :5]).float()

        return call

    monkeypatch.setattr(features, "dino_features", dino)
    monkeypatch.setattr(measured, "BATCH", 3)
    whole = evaluate("dpg", out="whole", **more)
    once = (len(seen), len(saved) - 8)
    assert once == (16, 8)

    seen.clear(), saved.clear()
    save = sample_folder.save_png

    def die(image, recipe, path):
        if len(saved) == 5:
            raise KeyboardInterrupt
        save(image, recipe, path)

    with monkeypatch.context() as killing, pytest.raises(KeyboardInterrupt):
        killing.setattr(sample_folder, "save_png", die)
        evaluate("dpg", **more)
    compute, rated = measured.measure_squared_error, list[str]()

    def count(twins, images, names):
        rated.extend(names)
        return compute(twins, images, names)

    def die_later(twins, images, names):
        if rated:
            raise KeyboardInterrupt
        return count(twins, images, names)

    monkeypatch.setattr(measured, "measure_squared_error", count)
    with monkeypatch.context() as killing, pytest.raises(KeyboardInterrupt):
        killing.setattr(measured, "measure_squared_error", die_later)
        evaluate("dpg", **more)
    with pytest.raises(ValueError, match="after 3 of 8 images"):
        evaluate("dpg", **{**more, **dying})
    resumed = evaluate("dpg", **more)
    every = Counter(f"0000{i}-{j}.png" for i in range(2) for j in range(4))
    assert Counter(saved) == Counter(rated) == every
    assert len(seen) == 8, "those of the reference are kept with it, and shared"
    assert len((tmp_path / "out/scores/hps.asked").read_text().split()) == 8
    assert comparable(resumed) == comparable(whole)
    seen.clear(), saved.clear()
    assert comparable(evaluate("dpg", **more)) == comparable(whole)
    assert not seen and not saved


@pytest.mark.slow
def test_two_processes_do_what_one_does(evaluate, scorer, saved, tmp_path) -> None:
    more = {"scorer": (f"hps={scorer()}",)}
    alone = evaluate("geneval", out="alone", **more)
    saved.clear()
    assert evaluate("geneval", share=(1, 2), **more) is None
    assert len(saved) == 6 and not (tmp_path / "out/results.json").exists()
    together = evaluate("geneval", share=(0, 2), **more)
    assert len(saved) == len(set(saved)) == 12
    assert comparable(together) == comparable(alone)
    assert files(tmp_path / "out/official") == LAYOUTS["geneval"]
    assert json.loads((tmp_path / "out/results.json").read_text())["pictures"] == 12


def test_a_scorers_number_counts_prompts_and_tasks(evaluate, scorer) -> None:
    metric = evaluate("geneval", scorer=(f"hps={scorer()}",)).metrics["hps"]
    means = [len(line["prompt"]) + 1.5 for line in GENEVAL]
    assert metric.value == pytest.approx(np.mean(means)) and metric.prompts == 3
    assert metric.low <= metric.value <= metric.high
    assert metric.categories["single_object"] == CategoryScore(value=means[0], low=None, high=None, prompts=1)
    assert metric.categories["colors"].value == pytest.approx(np.mean(means[1:]))
    assert metric.category_mean.value == pytest.approx((means[0] + np.mean(means[1:])) / 2)


@pytest.mark.slow
def test_a_reference_of_the_same_images_is_at_no_distance(evaluate, tmp_path) -> None:
    evaluate("world", out="teacher", count=3, images=2)
    metrics = evaluate("world", count=3, images=2, reference=tmp_path / "teacher").metrics
    assert metrics["squared_error"].value == 0 and metrics["squared_error"].better == "lower"
    assert metrics["world frechet"].value == pytest.approx(0, abs=1e-9)
    assert metrics["world precision"].value == metrics["world recall"].value == 1
    assert metrics["accuracy"].prompts == 3 and set(metrics["accuracy"].categories) == {
        "single_object",
        "two_objects",
        "counting",
    }


def test_diversity_is_told_in_units_of_the_references(tmp_path) -> None:
    items = read_items(SUITES["world"], None, count=3)
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    assert summary.relative_diversity(items, 2, 2 * x, x).value == pytest.approx(2)
    assert summary.relative_diversity(items, 2, x, None).value == pytest.approx(
        float((x[::2] - x[1::2]).norm(dim=1).mean())
    )
    assert "something other than 0 to divide by" in summary.relative_diversity(items, 2, x, torch.zeros_like(x)).why


@pytest.mark.slow
def test_other_images_are_farther_and_few_are_said_to_be_too_few(evaluate, tmp_path) -> None:
    evaluate("world", out="teacher", count=2, steps=2)
    metrics = evaluate("world", count=2, reference=tmp_path / "teacher").metrics
    assert metrics["squared_error"].value > 0 and metrics["world frechet"].value > 0
    assert metrics["world recall"].value is None and "neighbors=3" in metrics["world recall"].why
    with pytest.raises(ValueError, match=r"1 of 3 images are not in .*00002-0.png first.*finish that evaluation first"):
        evaluate("world", count=3, reference=tmp_path / "teacher")


@pytest.mark.slow
def test_any_folder_of_images_is_a_reference_whatever_their_sizes(evaluate, monkeypatch, tmp_path) -> None:
    from arcflow.metrics import features

    (tmp_path / "real/deep").mkdir(parents=True)
    rng, seen = np.random.default_rng(0), []
    for i, (side, kind) in enumerate([(16, "png"), (20, "jpg"), (20, "webp"), (8, "png"), (16, "jpg")]):
        Image.fromarray(rng.integers(0, 256, (side, 2 * side, 3), np.uint8)).save(tmp_path / f"real/deep/{i}.{kind}")

    def call(images):
        seen.extend(images.shape[1:3] for _ in images)
        return torch.from_numpy(images.reshape(len(images), -1)[:, :3]).float()

    monkeypatch.setattr(features, "dino_features", lambda model, device: call)
    more = {"reference": tmp_path / "real", "features": ("dino",)}
    for again in range(2):
        metric = evaluate("coco", **more).metrics["dino frechet"]
        assert (metric.pictures, metric.reference) == (2, 5)
        assert len(seen) == 7, f"the same {again + 1} times"
    assert files(tmp_path / "real") == {"deep/0.png", "deep/1.jpg", "deep/2.webp", "deep/3.png", "deep/4.jpg"}


def test_what_official_scorers_write_is_read_back(evaluate, official_file, tmp_path) -> None:
    found = [
        {"filename": f"x/0000{i}/samples/000{j}.png", "correct": i == 1 or j == 0} for i in range(3) for j in range(4)
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    metric = evaluate("geneval", answers=(f"correct={tmp_path / 'results.jsonl'}",)).metrics["correct"]
    assert metric.value == pytest.approx((0.25 + 1 + 0.25) / 3)
    assert metric.category_mean.value == pytest.approx((0.25 + 0.625) / 2)

    text = "/x, y/coco12.png, 1.0, 0.5, 0.5, 1.0, 0.75\n/x, y/whoops1.png, 0.0, 0.0, 0.5, 0.5, 0.25\n"
    (tmp_path / "dpg.txt").write_text(f"{text}Model: out\nL1 category scores:\n\tentity: 50.0\nDPG-Bench score: 50.0\n")
    metric = evaluate("dpg", out="dpg", answers=(f"mplug={tmp_path / 'dpg.txt'}",)).metrics["mplug"]
    assert metric.value == pytest.approx(0.5) and metric.categories is None

    table(tmp_path / "one.csv", ["", "other", "mine"], ["human_000", "1", "0.5"], ["human_001", "1", ""])
    metric = evaluate("oneig", out="oneig", answers=(f"alignment={tmp_path / 'one.csv'}",)).metrics["alignment"]
    assert (metric.value, metric.prompts) == (0.5, 1)


@pytest.mark.parametrize(
    ("suite", "text", "flaw"),
    [
        ("geneval", '{"filename": "x/00009/samples/0000.png", "correct": true}', "line 1 tells of no image"),
        ("geneval", '{"id": "00000/9", "score": 1}', "'00000/9' is not of this suite"),
        ("geneval", '{"id": "00000/0", "score": NaN}', "or no number"),
        ("dpg", "/x/none.png, 1.0, 1.0", "'none', which is no prompt"),
        ("dpg", "nothing", "empty"),
        ("oneig", ",theirs\nhuman_000,1", r"\['theirs'\] and not 'mine'; give one of them with --name"),
        ("coco", "1.0", "coco has no file of its own"),
    ],
)
def test_answers_that_are_not_of_the_suite_are_refused(suite, text, flaw, evaluate, tmp_path) -> None:
    path = tmp_path / ("answers.jsonl" if text.startswith("{") else "answers.txt")
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"{flaw}.*expected NAME=FILE.*correct --answers"):
        evaluate(suite, answers=(f"theirs={path}",))


def test_a_folder_holds_images_of_one_kind(evaluate, tmp_path) -> None:
    evaluate("coco")
    with pytest.raises(ValueError, match=r"steps: 1 there, 3 now.*choose another folder with --out"):
        evaluate("coco", steps=3)
    (tmp_path / "captions_val2014.json").write_text('{"annotations": [{"id": 1, "image_id": 1, "caption": "new"}]}')
    with pytest.raises(ValueError, match="holds images with other settings .prompts: "):
        evaluate("coco")
    (tmp_path / "foreign/pictures").mkdir(parents=True)
    with pytest.raises(ValueError, match="has images but no suite.json"):
        drawn.claim_images(tmp_path / "foreign", records.read(Settings, tmp_path / "out" / "suite.json"))


def test_a_list_may_grow_and_a_retrained_adapter_is_another_model(evaluate, saved, tmp_path) -> None:
    evaluate("world", count=2)
    assert evaluate("world", count=3).prompts == 3
    assert saved == ["00000-0.png", "00001-0.png", "00002-0.png"]
    (tmp_path / "adapter.safetensors").write_bytes(b"one")
    before = tensors_digest(str(tmp_path))
    (tmp_path / "adapter.safetensors").write_bytes(b"two")
    assert tensors_digest(str(tmp_path)) != before


@pytest.mark.parametrize(
    ("options", "flaw"),
    [
        ({"features": ("vgg",)}, "no features 'vgg': expected world, dino"),
        ({"features": ("inception=nowhere.pt",)}, "no features 'inception=nowhere.pt'.*correct --features"),
        ({"scorer": ("clip=x {manifest} {out}",)}, "named .*clip.*rename one"),
        ({"scorer": ("a=x {manifest} {out}", "a=y {manifest} {out}")}, "expected each once"),
        ({"lpips": True}, "LPIPS compares images of the same prompts.*--adapter none --steps 50"),
        ({"reference": Path("nowhere")}, "no image in nowhere.*check --reference"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_anything_is_drawn(options, flaw, evaluate, saved) -> None:
    with pytest.raises(ValueError, match=flaw):
        evaluate("coco", **options)
    assert not saved


def test_numbers_that_are_not_finite_and_files_that_are_no_images_are_named(tmp_path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="a.png gives a number that is not finite"):
        measured.measure(tmp_path / "s", {"a": tmp_path / "a.png"}, lambda: lambda *_: torch.tensor([[float("nan")]]))
    with pytest.raises(ValueError, match="b.png is no image that can be read"):
        measured.read_image(tmp_path / "b.png")
    assert measured.table(tmp_path / "s", ["a"]) is None


def test_the_time_of_evaluation_is_told_beside_that_of_generation(evaluate, scorer) -> None:
    seconds = evaluate("world", count=3, scorer=(f"hps={scorer()}",)).seconds
    assert set(seconds.evaluation) == {"saving", "layout", "accuracy", "hps", "results"}
    own = sum(spent for stage, spent in seconds.evaluation.items() if stage != "hps")
    assert seconds.share == pytest.approx(own / seconds.generation)


def test_a_folder_is_bound_to_what_it_was_drawn_with_and_one_of_before_by_what_it_kept(tmp_path) -> None:
    usual = dict(suite="world", prompts="built in", height=64, width=64, guidance=3.5, model="world", adapter="a")
    now = Settings(**usual, steps=2, weights="w", dtype="float32", base="b")  # type: ignore[arg-type]
    later = {"negative_prompt": "red", "true_cfg": 2.0, "quantize": "int8", "teacher_lora": "l", "lora_weights": "v"}
    drawn.claim_images(tmp_path / "new", now)
    drawn.claim_images(tmp_path / "new", now)
    for name, value in {**later, "dtype": "bfloat16", "base": "c", "weights": "v"}.items():
        with pytest.raises(ValueError, match=f"other settings .*{name}: .* {value!r} now"):
            drawn.claim_images(tmp_path / "new", replace(now, **{name: value}))
    drawn.claim_images(tmp_path / "guided", replace(now, negative_prompt="red"))
    with pytest.raises(ValueError, match="negative_prompt: 'red' there, None now"):
        drawn.claim_images(tmp_path / "guided", now)

    about = tmp_path / "old" / "suite.json"
    about.parent.mkdir()
    for name, value in (("negative_prompt", "red"), ("true_cfg", 2.0), ("quantize", "int8"), ("weights", "v")):
        about.write_text(json.dumps({**usual, "steps": 2, "weights": "w"}))
        with pytest.raises(ValueError, match=f"other settings .*{name}"):
            drawn.claim_images(about.parent, replace(now, **{name: value}))
    drawn.claim_images(about.parent, replace(now, teacher_lora="l", lora_weights="v"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "4", "--lpips"], "arcflow: --lpips: only with --suite NAME"),
        (["--steps", "4"], "arcflow: --steps: the report of the small world is always drawn alike"),
        (
            ["--suite", "world", "--seed", "2"],
            "arcflow: --seed: the noises of a benchmark's images are fixed",
        ),
    ],
)
def test_an_option_that_means_nothing_here_is_refused(words, said, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["evaluate", *words])
    assert capsys.readouterr().err.startswith(said) and not list(tmp_path.iterdir())


def test_a_suite_without_its_prompts_says_where_they_are(capsys, tmp_path) -> None:
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--suite", "geneval", "--out", str(tmp_path)])
    said = capsys.readouterr().err
    assert said.startswith("arcflow: the suite geneval has its prompts in a file") and "Traceback" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_shipped_student_is_evaluated_on_the_world(tmp_path, capsys) -> None:
    """The same images, and so the same share of right ones, as `arcflow evaluate` draws without a suite."""
    from arcflow.sampling.attach import attach
    from arcflow.world.check import accuracy

    words = ["evaluate", "--suite", "world", "--count", "12", "--out", str(tmp_path)]
    cli.main(words)
    metric = json.loads((tmp_path / "results.json").read_text())["metrics"]["accuracy"]
    pipe = attach(open.open_pipe("world", "auto", "auto"), open.adapter_of("world", "world"), fuse=True)
    seeds = list(range(FIRST_SEED, FIRST_SEED + 12))
    direct = generate(pipe, held_out(12), seeds, steps=2, height=64, width=64).images
    assert metric["value"] == pytest.approx(accuracy(direct, held_out(12))["overall"])
    assert metric["categories"]["counting"]["prompts"] == 2
    cli.main(words)
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.slow
def test_a_lora_that_was_part_of_the_teacher_is_part_of_the_images(tmp_path) -> None:
    """Every command opens base, LoRA and adapter the same way."""
    from arcflow.sampling.attach import attach
    from arcflow.student.adapter import save_adapter
    from arcflow.student.record import AdapterInfo

    pipe = open.open_pipe("world", "cpu", "float32")
    style = str(save_style(pipe, tmp_path / "style", ["to_q", "ff.net.2"]))
    pipe.load_lora_weights(style)
    net = student.build(pipe.transformer, modes=4, rank=2, generator=torch.Generator().manual_seed(0))
    adapter = str(save_adapter(net, tmp_path / "adapter", info=AdapterInfo(base="world", teacher_lora=style)))

    fresh = open.open_pipe("world", "cpu", "float32", style)
    wanted = generate(attach(fresh, adapter), held_out(2), [FIRST_SEED, FIRST_SEED + 1], steps=2, height=64, width=64)
    out = tmp_path / "suite"
    words = ["evaluate", "--suite", "world", "--count", "2", "--device", "cpu", "--adapter", adapter, "--out", str(out)]
    cli.main([*words, "--teacher-lora", style])
    drawn = [np.asarray(Image.open(path)) for path in sorted((out / "pictures").glob("*.png"))]
    assert all(np.array_equal(one, other) for one, other in zip(drawn, wanted.images, strict=True))
