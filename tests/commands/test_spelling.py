"""Options under other names: old ones work for a release, those of other tools and slips of the pen get a hint."""

import re
from dataclasses import fields

import pytest
import tyro

from arcflow import cli
from arcflow.commands.examples import CONFIG, EXAMPLES
from arcflow.commands.sample import Sample
from arcflow.commands.spelling import FOREIGN, RENAMED, foreign, modern
from arcflow.commands.train import Train
from arcflow.evaluation.request import Request
from arcflow.sampling.options import Drawing, Machine, ModelAndAdapter


def shown(*words: str, capsys) -> str:
    """The help of a command, its first screen unless all is asked for."""
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, *(["--help"] if "--help-all" not in words else [])])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "now"),
    [
        ("sample --seeds 1 2 --steps 2", "sample --seed 1 --seed 2 --steps 2"),
        ("sample --seeds=1 2", "sample --seed=1 --seed 2"),
        ("sample --seed 0 1 --prompt x", "sample --seed 0 --seed 1 --prompt x"),
        ("evaluate --seeds 4", "evaluate --images 4"),
        ("evaluate --suite dpg --pictures 4", "evaluate --suite dpg --images 4"),
        ("compare --seeds 3 --prompts 9", "compare --trainings 3 --captions 9"),
        ("", ""),
    ],
)
def test_old_names_are_todays_and_say_so(words, now) -> None:
    after, said = modern(words.split())
    assert after == now.split()
    assert bool(said) == any(old in words.replace("=", " ").split() for old in RENAMED.get(words.split(" ")[0], {}))


def test_several_seeds_reach_the_command_however_they_are_written() -> None:
    for line in ("--seed 3 --seed 4", "--seed 3 4", "--seeds 3 4"):
        words, _ = modern(["sample", *line.split()])
        assert tyro.cli(Sample, args=words[1:]).seed == (3, 4)


@pytest.mark.parametrize("command", FOREIGN)
def test_every_hint_names_an_option_that_is_there(command, capsys) -> None:
    words = (command, "world") if command == "train" else (command,)
    options = set(re.findall(r"--[a-z][\w.-]*", shown(*words, "--help-all", capsys=capsys)))
    for name, ours in FOREIGN[command].items():
        assert name not in options and re.findall(r"--[a-z][\w.-]*", ours)[0] in options, name


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("sample", "--num-inference-steps", "4"), "arcflow sample: no --num-inference-steps here; it is --steps"),
        (("sample", "--guidance_scale=3"), "arcflow sample: no --guidance_scale here; it is --guidance"),
        (("train", "world", "--learning-rate", "1"), "arcflow train: no --learning-rate here; it is --optim.lr"),
        (("train", "world", "--lora-rank", "8"), "it is --model.rank"),
        (("sample", "-p", "a cat"), "arcflow sample: no -p here; it is --prompt"),
        (("sample", "a cat"), "'a cat' stands alone; a prompt follows --prompt"),
        (("sample", "--promt", "x"), "For full helptext, run arcflow sample --help"),
    ],
)
def test_a_slip_is_looked_for_in_the_command_that_was_typed(words, hint, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert hint in said and "compare" not in said and "cache" not in said


def test_commands_that_draw_have_their_options_in_common() -> None:
    for command in (Sample, Request):
        groups = {one.name: type(one.default) for one in fields(command)}
        assert groups["subject"] is ModelAndAdapter and groups["drawing"] is Drawing and groups["machine"] is Machine


@pytest.mark.parametrize("command", [name for name in EXAMPLES if name])
def test_help_ends_with_lines_to_copy_which_are_commands(command, capsys) -> None:
    text = shown(*command.split(), capsys=capsys)
    lines = [line.replace("\\\n", " ") for line in EXAMPLES[command]]
    assert EXAMPLES[command][-1] in text and CONFIG in "\n".join(text.splitlines()[-2:]) + "\n"
    for line in lines:
        _, name, *words = re.findall(r'(?:[^\s"]|"[^"]*")+', line)
        words = [word.strip('"') for word in words]
        assert foreign([name, *words]) is None
        if "--help" not in words and "--config" not in words and name in cli.COMMANDS:
            assert isinstance(
                tyro.cli(cli.COMMANDS[name], args=words, config=(tyro.conf.OmitSubcommandPrefixes,)), object
            )


@pytest.mark.parametrize("command", ["demo", "train", "sample", "export", "serve", "claims", "doctor"])
def test_the_first_screen_has_what_one_touches_first(command, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    first = shown(command, capsys=capsys).splitlines()[:40]
    assert first[0].startswith(f"usage: arcflow {command}")
    if command == "sample":
        assert {"--prompt", "--model", "--adapter", "--steps"} <= set(re.findall(r"--\w+", "\n".join(first)))


def test_errors_of_values_carry_no_names_of_a_parser(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "world-quick", "--optim.iterations", "0"])
    assert "tyro" not in capsys.readouterr().err and Train is cli.COMMANDS["train"]
