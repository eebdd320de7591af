"""`arcflow sample` as a user types it: folders that are taken up again, recipes, names, and what is refused."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arcflow import cli, config
from arcflow.families import loading
from arcflow.sampling import open
from arcflow.sampling.folder import Recipe, batches, read_manifest
from tests.support.pipelines import fresh

CAPTION = "a red ring left of a blue square on white"


@pytest.fixture(scope="module")
def world():
    """The shipped teacher, read once."""
    return loading.load_pipe(config.Model())


@pytest.fixture(autouse=True)
def read_once(world, monkeypatch) -> None:
    """Every command here opens the shipped teacher as it is: only reading it again is left out."""

    def load(model: config.Model):
        assert (model.base, model.dtype, model.quantize) == ("world", "float32", "none")
        return fresh(world)

    monkeypatch.setattr(loading, "load_pipe", load)


def sample(*words: object, out: Path, capsys) -> list[str]:
    """The lines that a command says, the last of them how many images are new."""
    cli.main(["sample", "--device", "cpu", "--out", str(out), *map(str, words)])
    return capsys.readouterr().out.splitlines()


def refused(capsys, *words: object, code: int = 1) -> str:
    """What a sampling says that is refused."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["sample", *map(str, words)])
    assert stop.value.code == code
    return capsys.readouterr().err


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.mark.slow
def test_a_retrained_adapter_is_drawn_anew_in_the_same_folder(tmp_path, capsys) -> None:
    """Train, look, train on, look again, with the same names: B1 of what a new user found."""
    adapter = shutil.copytree(open.adapter_of("world", "world"), tmp_path / "adapter")
    words = ("--prompt", CAPTION, "--adapter", adapter)
    first, _ = sample(*words, out=tmp_path / "out", capsys=capsys)
    assert sample(*words, out=tmp_path / "out", capsys=capsys) == [f"new images: 0; in {tmp_path / 'out'}: 1 of 1"]
    record = json.loads((adapter / "arcflow.json").read_text())
    (adapter / "arcflow.json").write_text(json.dumps({**record, "shift": 1.0, "sha256": {}}))
    second, said = sample(*words, out=tmp_path / "out", capsys=capsys)
    assert said.startswith("new images: 1;") and second != first
    assert not np.array_equal(pixels(first), pixels(second))


@pytest.mark.slow
def test_the_folder_has_a_page_of_all_its_images(tmp_path, capsys) -> None:
    first, _ = sample("--prompt", CAPTION, out=tmp_path, capsys=capsys)
    second, _ = sample("--prompt", "a blue square", "--seed", 4, out=tmp_path, capsys=capsys)
    page = (tmp_path / "index.html").read_text("utf-8")
    assert all(f'src="{Path(file).name}"' in page for file in (first, second)) and "seed 4, 2 steps" in page
    (tmp_path / "index.html").unlink()
    sample("--prompt", CAPTION, out=tmp_path, capsys=capsys)
    assert (tmp_path / "index.html").exists()


@pytest.mark.slow
def test_what_a_killed_process_has_left_is_gone_after_the_next_one(tmp_path, capsys) -> None:
    words = ["sample", "--prompt", "a red ring", "--out", str(tmp_path)]
    cli.main(words)
    draft = tmp_path / "a-red-ring.png.01234567.tmp"
    draft.touch()
    os.utime(tmp_path / "index.html", (0, 0))  # killed before it was written anew
    cli.main(words)
    assert not draft.exists() and (tmp_path / "index.html").stat().st_mtime > 0
    assert "new images: 0" in capsys.readouterr().out


@pytest.mark.slow
def test_nothing_is_loaded_where_nothing_is_to_draw(tmp_path, capsys, monkeypatch) -> None:
    sample("--prompt", CAPTION, out=tmp_path, capsys=capsys)
    monkeypatch.setattr(open.Setup, "open", lambda setup: pytest.fail("a model was loaded"))
    assert sample("--prompt", CAPTION, out=tmp_path, capsys=capsys) == [f"new images: 0; in {tmp_path}: 1 of 1"]


@pytest.mark.slow
def test_a_folder_of_an_earlier_version_is_read_and_its_images_left_alone(tmp_path, capsys) -> None:
    """Its recipes say nothing of weights and dtype, so none is taken for one of today: drawn anew, by other names."""
    old = {
        "prompt": CAPTION,
        "seed": 0,
        "steps": 2,
        "height": 64,
        "width": 64,
        "guidance": 3.5,
        "model": "world",
        "adapter": "world",
        "version": "0.1.0",
    }
    name = "a-red-ring-left-of-a-blue-square-on-white-0-1a2b3c4d.png"
    (tmp_path / "manifest.jsonl").write_text(json.dumps({"file": name, **old, "seconds": 0.1}) + "\n")
    Image.new("RGB", (64, 64)).save(tmp_path / name)
    before = (tmp_path / name).read_bytes()
    path, said = sample("--prompt", CAPTION, out=tmp_path, capsys=capsys)
    assert said == f"new images: 1; in {tmp_path}: 1 of 1" and Path(path).name != name
    assert (tmp_path / name).read_bytes() == before
    assert [record["file"] for record in read_manifest(tmp_path)] == [name, Path(path).name]


def test_the_image_says_what_it_was_drawn_with(tmp_path, capsys) -> None:
    path, _ = sample("--prompt", CAPTION, "--seed", 3, "--steps", 1, out=tmp_path, capsys=capsys)
    told = Image.open(path).text  # type: ignore[attr-defined]
    assert (told["seed"], told["steps"], told["dtype"], told["quantize"]) == ("3", "1", "float32", "none")
    (record,) = read_manifest(tmp_path)
    assert all(len(record[name]) == 16 for name in ("model_weights", "adapter_weights")) and record["fused"]


def test_names_begin_with_no_dash_and_tell_recipes_apart_by_sixteen_digits() -> None:
    def name(prompt: str, **more) -> str:
        usual = dict(seed=0, steps=2, height=64, width=64, guidance=None, model="m", adapter="a", version="0")
        return Recipe(prompt=prompt, **{**usual, **more}).file

    for prompt in ("", "---", "\u65e5\u672c\u8a9e", "\x1b[31m", "-rf /"):
        assert not name(prompt, seed=-1).startswith(("-", ".")) and name(prompt).isprintable()
    word, seed, digits = name("a cat")[: -len(".png")].rsplit("-", 2)
    assert (word, seed, len(digits)) == ("a-cat", "0", 16)
    weights = [{}, *({one: "0123456789abcdef"} for one in ("model_weights", "adapter_weights", "lora_weights"))]
    others = [{"dtype": "bfloat16"}, {"quantize": "int8"}, {"fused": True}, {"negative_prompt": ""}, {"true_cfg": 2.0}]
    assert len({name("a cat", **more) for more in [*weights, *others]}) == len(weights) + len(others)


@pytest.mark.slow
def test_sizes_of_a_list_are_drawn_each_in_batches_of_its_own(tmp_path, capsys) -> None:
    (tmp_path / "list.jsonl").write_text(
        "".join(
            json.dumps({"prompt": CAPTION, **size}) + "\n"
            for size in ({}, {"height": 32, "width": 48}, {"height": 64, "width": 64}, {"height": 32, "width": 48})
        )
    )
    *paths, said = sample("--prompts", tmp_path / "list.jsonl", "--seed", 1, out=tmp_path / "out", capsys=capsys)
    assert said.startswith("new images: 2;") and sorted(pixels(path).shape for path in paths) == [
        (32, 48, 3),
        (64, 64, 3),
    ]
    sizes = [(64, 64), (32, 48), (64, 64), (32, 48), (64, 64)]
    rows = [
        Recipe(prompt=str(i), seed=0, steps=1, height=h, width=w, guidance=None, model="", adapter="", version="")
        for i, (h, w) in enumerate(sizes)
    ]
    assert [[recipe.prompt for recipe in batch] for batch in batches(rows, 2)] == [["0", "2"], ["4"], ["1", "3"]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--height", 70, "--width", 101), "height = 70: expected a multiple of 16"),
        (("--height", 8), "height = 8: expected a multiple of 16"),
        (("--steps", 0), "steps = 0: expected 1 to 1000"),
        (("--steps", -1), "steps = -1: expected 1 to 1000"),
        (("--batch", 0), "batch = 0: expected 1 or more"),
        (("--seed", "12345678901234567890123"), "a whole number of at most 64 bits"),
        (("--prompt", "a \udcff cat"), "prompt = 'a \\udcff cat': expected text in UTF-8"),
        (("--negative-prompt", "\udcff"), "prompt = '\\udcff': expected text in UTF-8"),
        (("--guidance", "nan"), "--guidance = nan: expected a number from 0 on"),
        (("--fit", "group"), "--fit group is for GPUs, and the device is cpu"),
        (("--fuse", "--no-fuse"), "expected one of them"),
        (("--negative-prompt", "red", "--true-cfg", 0.5), "a negative prompt at scale 0.5 changes nothing"),
    ],
)
def test_what_cannot_be_drawn_is_one_line_and_nothing_is_loaded(words, said, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(open.Setup, "open", lambda setup: pytest.fail("a model was loaded"))
    told = refused(capsys, "--prompt", CAPTION, "--device", "cpu", "--out", tmp_path / "out", *words)
    assert told.startswith("arcflow: ") and said in told and told.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [-1, 2**64 - 1])
def test_seeds_of_sixty_four_bits_are_fine(seed, tmp_path, capsys) -> None:
    path, _ = sample("--prompt", CAPTION, "--seed", seed, out=tmp_path, capsys=capsys)
    assert f"-{seed}-" in path


def test_without_a_word_the_small_model_draws_one_of_each_skill(tmp_path, capsys) -> None:
    assert sample(out=tmp_path, capsys=capsys)[-1].startswith("new images: 6;")
    assert (tmp_path / "index.html").exists()


@pytest.mark.slow
def test_a_prompt_that_the_small_model_never_read_is_told(tmp_path, capsys) -> None:
    cli.main(["sample", "--prompt", "a dragon", "--prompt", CAPTION, "--out", str(tmp_path)])
    assert "1 of 2 prompts are no captions of the small world, 'a dragon' first" in capsys.readouterr().err
