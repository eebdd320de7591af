"""Two commands that write into one folder: the second is refused by name before it has done anything."""

import pytest

from arcflow import cli
from arcflow.families import loading
from arcflow.system.owner import owned

COMMANDS = {
    "sample": "sample --prompt x --out {}",
    "evaluate": "evaluate --count 1 --out {}",
    "suite": "evaluate --suite world --count 1 --steps 1 --out {}",
    "cache": "cache make --prompts world --count 8 --held-out-count 2 --out {}",
    "export": "export --adapter world --out {}",
    "compare": "compare --out {}",
    "train": "train world --out {}",
    "render": "world render --count 1 --out {}",
    "teacher": "world train --out {}",
}


@pytest.mark.parametrize("name", list(COMMANDS))
def test_the_second_is_refused_by_name_and_leaves_the_folder_alone(name, tmp_path, capsys):
    out = tmp_path / "out"
    with owned(out, "works"):
        before = sorted(out.iterdir())
        with pytest.raises(SystemExit) as stop:
            cli.main(COMMANDS[name].format(out).split())
        assert sorted(out.iterdir()) == before
    assert stop.value.code == 1 and f"{out} is in use, process " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["sample", "evaluate", "suite", "train"])
def test_a_folder_that_cannot_be_is_told_before_anything_is_loaded(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loading, "load_pipe", lambda *_, **__: pytest.fail("a model was loaded"))
    (tmp_path / "out").touch()
    with pytest.raises(SystemExit) as stop:
        cli.main(COMMANDS[name].format(tmp_path / "out").split())
    assert stop.value.code == 1 and "cannot be a folder, a file is in the way" in capsys.readouterr().err
