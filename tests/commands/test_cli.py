"""The command line: instant help, hints for typing errors, one line for what the user can put right."""

import dataclasses
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import arcflow
from arcflow import cli, config, recipes
from arcflow.commands import demo, screens
from arcflow.commands.doctor import diagnose
from arcflow.sampling import open


def arcflow_command(*words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""
    command = [str(Path(sys.executable).with_name("arcflow")), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def refused(capsys, *words: str) -> str:
    """What a command says when it fails."""
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code not in (0, None)
    return capsys.readouterr().err


TYRO = {"tyro", "docstring_parser", "typing_extensions"}
IMPORT = "import arcflow"
HELP = """
from arcflow import cli
try:
    cli.main(["--help"])
except SystemExit:
    pass
"""


def python(code: str) -> str:
    """The last line that a fresh interpreter prints."""
    return subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()[-1]


def test_help_names_every_command() -> None:
    shown = arcflow_command("--help")
    assert shown.returncode == 0
    assert all(name in shown.stdout for name in cli.CHOICES[()])


@pytest.mark.parametrize(("code", "light"), [(IMPORT, set()), (HELP, TYRO)], ids=["import", "help"])
def test_a_cold_start_loads_no_torch_nor_numpy(code, light) -> None:
    """Nothing outside the standard library, and for the command line what makes its options."""
    loaded = f"import sys; before = set(sys.modules)\n{code}\nprint(*(set(sys.modules) - before))"
    modules = {name.split(".")[0] for name in python(loaded).split()} - sys.stdlib_module_names
    assert "arcflow" in modules and modules - {"arcflow"} <= light


@pytest.mark.slow
@pytest.mark.parametrize(("code", "seconds"), [(IMPORT, 0.3), (HELP, 1.0)], ids=["import", "help"])
def test_a_cold_start_is_short(code, seconds) -> None:
    """In CPU time, the interpreter's own start included, for other work on the machine does not count."""
    timed = f"{code}\nimport time; print(time.process_time())"
    assert min(float(python(timed)) for _ in range(5)) < seconds


@pytest.mark.parametrize("words", [("demo",), ("sample",), ("train", "world"), ("world", "render"), ("evaluate",)])
def test_every_option_is_explained(words, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--help"])
    assert stop.value.code == 0
    assert "TODO" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("trian",), "arcflow: no 'trian' here; did you mean 'train'?"),
        (("world", "rendr"), "arcflow world: no 'rendr' here; did you mean 'render'?"),
        (("train", "world_quik"), "did you mean 'world-quick'?"),
        (("xyzzy",), f"choose from {', '.join(cli.COMMANDS)}"),
        (("demo", "--quik"), "--quick"),
        (("train", "world", "--optim.lrr", "1"), "--optim.lr"),
    ],
)
def test_typing_errors_get_a_hint(words, hint, capsys) -> None:
    assert hint in refused(capsys, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("sample", "--model", "some/model"), "no prompt given; add --prompt TEXT"),
        (("sample", "--prompts", "nowhere.txt"), "no prompt file 'nowhere.txt'"),
        (("sample", "--prompt", "a square", "--model", "some/model"), "no adapter given for some/model; add --adapter"),
        (
            ("sample", "--prompt", "a square", "--model", "some/model", "--adapter", "world-one"),
            "world-one is an adapter of the shipped teacher, not one for some/model; add --adapter",
        ),
        (("world", "check", "nowhere"), "expected a folder written by `arcflow sample`"),
        (("train", "flux"), "no prompt file 'prompts.txt'"),
    ],
)
def test_what_a_user_can_put_right_is_one_line(words, message, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = refused(capsys, *words)
    assert said.startswith("arcflow: ") and message in said and "Traceback" not in said


def test_a_recipe_takes_overrides() -> None:
    import tyro

    args = ["train", "world", "--optim.lr", "0.5", "--model.modes", "4", "--out", "elsewhere"]
    command = tyro.cli(cli.Command, args=args, config=(tyro.conf.OmitSubcommandPrefixes,))  # type: ignore[arg-type]
    assert isinstance(command, cli.Train)
    assert (command.recipe.optim.lr, command.recipe.model.modes, command.recipe.out) == (0.5, 4, "elsewhere")
    assert command.recipe.optim.iterations == recipes.world().optim.iterations


FEW = ("world", "flux", "qwen-image-48gb")
NAMED = [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in recipes.RECIPES]
"""Recipes; those that differ from the few in numbers alone are for the slow part."""


@pytest.mark.parametrize("recipe", NAMED)
def test_the_command_of_a_run_makes_that_run_again(recipe) -> None:
    import tyro

    run = recipes.RECIPES[recipe]()
    assert recipes.run_command(json.loads(config.to_json(run))) == f"arcflow train {recipe}"
    checkpointing = not run.model.gradient_checkpointing
    changed = dataclasses.replace(
        run,
        seed=3,
        milestones=100,
        model=dataclasses.replace(run.model, gradient_checkpointing=checkpointing, teacher_lora="my style.safetensors"),
        distill=dataclasses.replace(
            run.distill, also_steps=(3, 4), led=0, end=0.0, teacher_cfg=2.5, guidance=(1.5, 5.0)
        ),
        optim=dataclasses.replace(run.optim, micro_batch=None, betas=(0.5, 0.6)),
    )
    settings = json.loads(config.to_json(changed))
    del settings["out"]
    words = shlex.split(recipes.run_command(settings))
    assert words[:2] == ["arcflow", "train"] and words[2] in recipes.RECIPES
    again = tyro.cli(cli.Command, args=words[1:], config=(tyro.conf.OmitSubcommandPrefixes,))  # type: ignore[arg-type]
    assert isinstance(again, cli.Train) and dataclasses.replace(again.recipe, out=run.out) == changed


def test_the_quick_demo_is_the_same_recipe_but_short() -> None:
    short, full = demo.shorten(recipes.world_quick()), recipes.world_quick()
    assert short.optim.iterations < 0.1 * full.optim.iterations
    assert (short.model, short.optim.lr) == (full.model, full.optim.lr)


def test_image_size_follows_the_model() -> None:
    assert open.size_of("world", None, None) == (64, 64)
    assert open.size_of("owner/name", None, None) == (1024, 1024)
    with pytest.raises(ValueError, match="width = 101: expected a multiple of 16"):
        open.check_side(16, 64, 101)
    for wrong, said in (({"steps": 0}, "steps = 0"), ({"batch": 0}, "batch = 0"), ({"seeds": [10**20]}, "64 bits")):
        with pytest.raises(ValueError, match=said):
            open.check_drawing(**{"steps": 2, "batch": 8, **wrong})
    assert open.size_of("owner/name", 512, None) == (512, 512)
    assert open.size_of("owner/name", 512, 768) == (512, 768)


def test_render_and_check_agree(tmp_path, capsys) -> None:
    cli.main(["world", "render", "--count", "12", "--out", str(tmp_path)])
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and all((tmp_path / line["file"]).exists() for line in lines)
    cli.main(["world", "check", str(tmp_path)])
    assert "overall                     100.00%" in capsys.readouterr().out


def test_the_checker_tests_itself(capsys) -> None:
    cli.main(["world", "check", "--count", "40"])
    assert capsys.readouterr().out.count("100.00%") == 2


def test_the_doctor_says_what_is_missing_and_how_to_get_it(monkeypatch) -> None:
    from importlib.metadata import PackageNotFoundError

    from arcflow.commands import doctor

    def version(name: str) -> str:
        if name == "peft":
            raise PackageNotFoundError
        return {"diffusers": "0.1.0"}.get(
            name, "99.0" if name == "torch" else __import__("importlib").metadata.version(name)
        )

    monkeypatch.setattr(doctor, "version", version)
    said: list[str] = []
    assert not diagnose(said.append)
    text = "\n".join(said)
    assert 'pip install "peft' in text and 'pip install "diffusers' in text
    assert "python" in text and "cores" in text


def test_a_cache_says_that_it_has_no_place_before_a_model_is_read(tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(SystemExit):
        cli.main(
            ["cache", "make", "--prompts", "world", "--model", str(tmp_path), "--out", str(tmp_path / "file" / "c")]
        )
    assert "cannot be a folder, a file is in the way" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
def test_a_cache_is_made_held_against_its_checksums_and_mended(tmp_path, capsys) -> None:
    make = ["cache", "make", "--prompts", "world", "--count", "6", "--held-out-count", "2", "--shard", "4"]
    cli.main([*make, "--out", str(tmp_path / "cache")])
    said = capsys.readouterr().out
    assert "9 prompts for this process: about 0.00 GB" in said and "train with --data.embeddings" in said
    cli.main(["cache", "verify", str(tmp_path / "cache")])
    assert ": whole" in capsys.readouterr().out
    shards = sorted((tmp_path / "cache").glob("*.safetensors"))
    whole = [shard.read_bytes() for shard in shards]
    shards[1].write_bytes(whole[1][:-1] + bytes([whole[1][-1] ^ 1]))
    with pytest.raises(SystemExit, match="run the same `arcflow cache make` again"):
        cli.main(["cache", "verify", str(tmp_path / "cache")])
    assert capsys.readouterr().out == f"{shards[1]}: its checksum is wrong\n"
    times = [shard.stat().st_mtime_ns for shard in shards]
    cli.main([*make, "--out", str(tmp_path / "cache")])
    assert f"{shards[1]}: its checksum is wrong; made again" in capsys.readouterr().out
    assert [shard.stat().st_mtime_ns != time for shard, time in zip(shards, times, strict=True)] == [False, True, False]
    assert [shard.read_bytes() for shard in shards] == whole


def test_the_version_is_the_packages(capsys) -> None:
    cli.main(["--version"])
    assert capsys.readouterr().out == f"arcflow {arcflow.__version__}\n"


@pytest.mark.slow
def test_a_sample_answers_in_seconds(tmp_path, capsys) -> None:
    words = [
        "sample",
        "--prompt",
        "a red ring left of a blue square on white",
        "--seeds",
        "1",
        "2",
        "--out",
        str(tmp_path),
    ]
    cli.main(words)
    images = sorted(tmp_path.glob("*.png"))
    assert len(images) == 2 and all(np.asarray(Image.open(p)).shape == (64, 64, 3) for p in images)
    cli.main(words)
    assert f"new images: 0; in {tmp_path}: 2 of 2" in capsys.readouterr().out


@pytest.mark.long
def test_a_new_user_runs_the_quick_demo(tmp_path) -> None:
    done = arcflow_command("demo", "--quick", "--out", str(tmp_path), timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    for row in ("teacher_50", "euler_2", "euler_4", "euler_8", "arcflow_1", "arcflow_2", "arcflow_4"):
        keys = {"nfe", "seconds_per_image", "mse_to_teacher", "accuracy", "prompts", "seeds"}
        assert keys <= set(results[row])
        assert 0 <= results[row]["accuracy"]["overall"] <= 1
    assert results["arcflow_2"]["nfe"] == 2 and results["teacher_50"]["nfe"] == 50
    assert results["teacher_50"]["accuracy"]["overall"] > 0.8
    report = (tmp_path / "report.html").read_text()
    assert report.startswith("<!doctype html>") and report.count("data:image/png;base64") > 30
    assert (tmp_path / "run" / "adapter" / "arcflow.json").exists()


SCREENS = [(), *((name,) for name in cli.COMMANDS), *(("train", name) for name in recipes.RECIPES)]
SCREENS += [("cache", name) for name in ("make", "verify")] + [("world", name) for name in cli.CHOICES["world",]]


@pytest.mark.parametrize("words", SCREENS, ids=" ".join)
def test_help_is_one_screen(words, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--help"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert 5 < sum(max(1, math.ceil(len(line) / 100)) for line in lines) <= 40


@pytest.mark.parametrize("command", screens.FIRST)
def test_what_the_first_screen_shows_is_an_option_and_the_whole_help_has_it_too(command, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    shown = dict[str, str]()
    for asked in ("-h", "--help-all"):
        with pytest.raises(SystemExit) as stop:
            cli.main([*command.split(), *(["world"] if command == "train" else []), asked])
        assert stop.value.code == 0
        shown[asked] = capsys.readouterr().out
    first, whole = shown.values()
    assert f"arcflow {command}" in first.splitlines()[0] and first.endswith("--help-all\n")
    assert len(whole.splitlines()) >= 40 > len(first.splitlines()) and max(map(len, first.splitlines())) <= 100
    for option in screens.FIRST[command]:
        assert f"  {option}" in first and f" {option}" in whole, option


def test_the_first_screen_of_a_recipe_has_its_own_defaults(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "flux", "--help"])
    shown = capsys.readouterr().out
    assert f"(default: {recipes.flux().optim.batch})" in shown and "arcflow train flux --help-all" in shown


def test_the_whole_help_says_nothing_in_a_parsers_words(capsys) -> None:
    for words in (("train", "world"), ("compare",), ("export",), ("serve",)):
        with pytest.raises(SystemExit):
            cli.main([*words, "--help-all"])
        shown = capsys.readouterr().out
        assert not any(odd in shown for odd in ("{None}", "[STR [", "(default: )")), words
    assert "--stop-after FLOAT" in cli.plainly("usage: x [--stop-after {None}|FLOAT]\n\n--stop-after {None}|FLOAT  y")
