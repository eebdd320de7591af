"""A suite's folder: what its images are of, what may be damaged in it, and lists as they come."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from arcflow.evaluation import images as drawn
from arcflow.evaluation import suite_run
from arcflow.evaluation.suites import SUITES
from arcflow.evaluation.suites.layouts import grid, link, write_once
from arcflow.evaluation.suites.suite import read_items
from arcflow.system.owner import owned
from arcflow.system.packages import About
from tests.support.pipelines import SIDE
from tests.support.suites import request

ABOUT = About(versions={}, python="3", device="x", threads=1, command="a test")

PROMPTS = ["a red cube", "a blue ball", "two cones"]


@pytest.fixture
def evaluate(flux, tmp_path):
    """Evaluate the tiny teacher on a list of captions."""
    (tmp_path / "list.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))

    def run(side=SIDE, **more):
        options = {"suite": "coco", "prompts": tmp_path / "list.jsonl", "complete": False, "steps": 1, "batch": 4}
        asked = request(out=tmp_path / "out", device="cpu", **(options | more))
        with drawn.alone(asked.folder, (0, 1)):
            plan = suite_run.plan(asked, (0, 1), "", height=side, width=side, guidance=None, version="0")
            plan.draw(lambda: flux)
            plan.score()
            return plan.results(ABOUT)

    return run


def test_precision_and_weights_are_part_of_what_images_are_of(evaluate, tmp_path) -> None:
    settings = evaluate().settings
    assert settings.dtype == "float32" and len(settings.base) == 32
    with pytest.raises(ValueError, match="images with other settings .dtype: 'float32' there, 'bfloat16' now"):
        evaluate(dtype="bfloat16")
    about = tmp_path / "out" / "suite.json"
    record = json.loads(about.read_text())
    about.write_text(json.dumps(record | {"base": "0" * 32}))
    with pytest.raises(ValueError, match="base: '0000.* there"):
        evaluate()
    del record["base"], record["dtype"]
    about.write_text(json.dumps(record))  # a folder of before
    assert evaluate().settings == settings and json.loads(about.read_text())["dtype"] == "float32"


@pytest.mark.parametrize("content", ["", "[]", "{" * 5, '{"suite": 1}', "[" * 100_000])
def test_a_damaged_record_is_named(content, evaluate, tmp_path) -> None:
    (tmp_path / "out" / "pictures").mkdir(parents=True)
    (tmp_path / "out" / "suite.json").write_text(content)
    with pytest.raises(ValueError, match="suite.json is damaged .*put it back, or choose another folder with --out"):
        evaluate()


@pytest.mark.slow
def test_what_can_be_made_again_is(evaluate, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    reference = tmp_path / "reference"
    reference.mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(reference / f"{i}.png")
    options = {"reference": reference, "features": ("world",), "side": 64}
    right = evaluate(**options)
    (numbers,) = (out / "measured" / "world").glob("*.safetensors")
    (clock,) = (out / "clock").glob("*.json")
    whole = numbers.read_bytes()
    for damage in (
        lambda: numbers.write_bytes(whole[:-4] + b"\0\0\0\0"),
        lambda: numbers.write_bytes(whole[:50]),
        lambda: save_file({"values": load_file(numbers)["values"].int()}, numbers, {"names": "[]"}),
        lambda: clock.write_text('{"layout": [1, "x"], "a": null}'),
        lambda: clock.write_text("[" * 100_000),
        lambda: (out / "pictures" / "manifest.jsonl").write_text("\0\0\n{}\n[]\n" + "[" * 100_000 + "\n"),
        lambda: (out / "pictures" / "00001-0.png").unlink(),
        lambda: (out / "pictures" / "00001-0.png").write_bytes((out / "pictures" / "00001-0.png").read_bytes()[:60]),
        lambda: (out / "results.json").write_text("half"),
        lambda: (out / "pictures" / "00000-0.png.0123abcd.tmp").write_text("of a killed process"),
    ):
        damage()
        again = evaluate(**options)
        assert again.metrics == right.metrics
        assert numbers.read_bytes()[-64:] == whole[-64:]
    assert "is damaged" in capsys.readouterr().err and not list(out.rglob("*.tmp"))
    torn = out / "pictures" / "00001-0.png"
    torn.write_bytes(torn.read_bytes()[:60] + torn.read_bytes()[-60:])
    numbers.unlink()
    with pytest.raises(ValueError, match="00001-0.png is no image that can be read .*take it away"):
        evaluate(**options)


def test_two_in_one_folder_are_kept_apart(evaluate, tmp_path) -> None:
    with owned(tmp_path / "out", "evaluates"), pytest.raises(ValueError, match="out is in use, .* evaluates there"):
        evaluate()


def test_a_count_below_one_is_refused(evaluate, tmp_path) -> None:
    for suite, count in (("coco", 0), ("coco", -1), ("world", 0), ("world", -1)):
        prompts = tmp_path / "list.jsonl" if suite == "coco" else None
        with pytest.raises(ValueError, match=f"--count {count}: expected 1 prompt or more"):
            evaluate(suite=suite, prompts=prompts, count=count)
        assert not (tmp_path / "out").exists()


def test_grids_follow_the_images(tmp_path) -> None:
    def image(name: str, color: str) -> Path:
        Image.new("RGB", (8, 8), color).save(tmp_path / name)
        return tmp_path / name

    four = [image(f"{i}.png", "red") for i in range(4)]
    path = tmp_path / "official" / "a.png"

    def laid_out(images: list[Path]) -> Image.Image:
        write_once(path, lambda draft: grid(images).save(draft, "PNG"), of=images)
        with Image.open(path) as image:
            return image.copy()

    assert laid_out(four).size == (16, 16)
    before = path.stat().st_mtime_ns
    assert laid_out(four).size == (16, 16) and path.stat().st_mtime_ns == before
    assert laid_out(four[:1]).size == (8, 8)
    later = path.stat().st_mtime_ns + 10**9
    os.utime(image("0.png", "blue"), ns=(later, later))
    assert laid_out(four[:1]).getpixel((0, 0)) == (0, 0, 255)
    linked = tmp_path / "official" / "b.png"
    for color in ("green", "white"):
        (tmp_path / "new.png").unlink(missing_ok=True)
        link(image("new.png", color), linked)
        assert linked.read_bytes() == (tmp_path / "new.png").read_bytes()


def test_images_of_more_draws_do_not_stay_with_the_official_scorer(tmp_path) -> None:
    images = [tmp_path / f"{i}.png" for i in range(3)]
    for path in images:
        Image.new("RGB", (8, 8)).save(path)
    suite = SUITES["geneval"]
    (tmp_path / "list.jsonl").write_text(json.dumps({"tag": "colors", "include": [], "prompt": "a"}))
    (item,) = read_items(suite, tmp_path / "list.jsonl", complete=False)
    assert suite.layout
    for count in (3, 2):
        suite.layout(item, images[:count], tmp_path / "official", "x")
        assert len(list((tmp_path / "official/00000/samples").iterdir())) == count


def test_lists_with_a_mark_or_separators_are_read_as_training_reads_them(tmp_path) -> None:
    text = "a cat\u2028on a mat"
    line = json.dumps({"prompt": text, "tag": "colors", "include": []}, ensure_ascii=False)
    (tmp_path / "list.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n\r\n{line}\n".encode())
    for suite in ("coco", "geneval"):
        items = read_items(SUITES[suite], tmp_path / "list.jsonl", complete=False)
        assert [item.prompt for item in items] == [text, text]


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "[1]", '{"prompt": ' + "9" * 5000 + "}", '{"annotations": [1]}', "\0"]
)
@pytest.mark.parametrize(("suite", "name"), [("coco", "l.jsonl"), ("coco", "l.json"), ("geneval", "l.jsonl")])
def test_hostile_lists_are_refused_by_name(suite, name, content, tmp_path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name} cannot be used .*: expected .* from .*; get it again"):
        read_items(SUITES[suite], tmp_path / name, complete=False)


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        "[1]",
        '{"id": [1], "score": 1}',
        '{"id": "00000", "score": ' + "9" * 400 + "}",
        '{"score": 1}',
        "1",
    ],
)
def test_hostile_answers_are_refused_by_name(content, evaluate, tmp_path) -> None:
    (tmp_path / "answers.jsonl").write_text(content)
    with pytest.raises(ValueError, match="cannot read the answers in .*answers.jsonl.*correct --answers"):
        evaluate(answers=(f"mine={tmp_path / 'answers.jsonl'}",))
