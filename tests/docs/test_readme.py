"""Every command of the README: run where it is short and needs nothing, else parsed to its end or what is missing."""

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from huggingface_hub import constants

from arcflow import cli
from arcflow.commands.given import completed
from arcflow.system import hub

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
WHOLE = [
    line.split("#")[0].strip() for line in re.findall(r"^    ((?:arcflow|make|pip|python) .*)$", README, re.MULTILINE)
]
SPANS = re.findall(r"`((?:arcflow|make|pip|python -m|hf) [^`\n]+)`", README)
COMMANDS = list(dict.fromkeys(WHOLE + SPANS))

OURS = [line for line in COMMANDS if line.startswith("arcflow ")]

RUN = ("arcflow sample", "arcflow doctor", "arcflow recipes", "arcflow prompts")
"""Begin so: seconds, and they need nothing."""

MISSING = {
    "arcflow train flux": "no prompt file 'prompts.txt'",
    "arcflow evaluate --suite geneval": "evaluation_metadata.jsonl",
    "arcflow evaluate --adapter runs": "runs/world/adapter",
    "arcflow export --adapter runs": "runs/flux/adapter",
}
"""Begin so, and what they say in an empty folder without a network: what is missing is a file, never an option."""


def words_of(line: str) -> list[str]:
    return shlex.split(line)[1:]


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty folder, and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "fetch", lambda repository, patterns: pytest.fail(f"{repository} was asked for"))
    return tmp_path


def test_the_readme_is_short_and_has_commands() -> None:
    assert len(README.splitlines()) <= 120
    assert len(OURS) >= 12 and any(line.startswith("make ") for line in COMMANDS)


@pytest.mark.parametrize("line", OURS)
def test_a_command_is_understood_to_its_end(line) -> None:
    words, _ = completed(words_of(line))
    if words[0] == "export" and "--adapter" not in words:  # a span about one option
        words += ["--adapter", "world"]
    assert cli.did_you_mean(words) is None
    assert type(cli.parsed(words)) is cli.COMMANDS[words[0]]


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in OURS if line.startswith(RUN)])
def test_a_command_that_needs_nothing_runs(line, offline, capsys) -> None:
    try:
        cli.main(words_of(line))
    except SystemExit as stop:
        assert stop.code == 0
    shown = capsys.readouterr().out
    if line.startswith("arcflow sample"):
        assert len(list((offline / "out").glob("*/*.png"))) == 1 and "1 of 1" in shown
    elif line.startswith("arcflow prompts"):
        assert len((offline / "prompts.txt").read_text("utf-8").splitlines()) == 10_000
    else:
        assert len(shown.splitlines()) > 3


@pytest.mark.parametrize("line", [line for line in OURS if line.startswith(tuple(MISSING))])
def test_a_command_that_needs_a_file_names_it(line, offline, capsys) -> None:
    (missing,) = (told for start, told in MISSING.items() if line.startswith(start))
    with pytest.raises(SystemExit) as stop:
        cli.main(words_of(line))
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert missing in said and "Traceback" not in said


def test_targets_modules_and_extras_are_there() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    for line in COMMANDS:
        words = shlex.split(line)
        if words[0] == "make":
            assert set(words[1:]) <= {*targets}, line
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]), line
        elif words[0] == "pip":
            assert {name for one in re.findall(r"\[(.*?)\]", line) for name in one.split(",")} <= extras.keys(), line
