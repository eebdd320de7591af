"""Every command that writes, on a disk that is full and on one that may only be read: one sentence, nothing half."""

import subprocess

import pytest

from arcflow import cli

COMMANDS = {
    "sample": "sample --prompt x --out {}/out",
    "evaluate": "evaluate --count 1 --out {}/out",
    "suite": "evaluate --suite world --adapter none --count 1 --steps 1 --out {}/out",
    "cache": "cache make --prompts world --count 8 --held-out-count 2 --out {}/out",
    "export": "export --adapter world --out {}/out",
    "export a file": "export --adapter world --layout file --out {}/out",
    "compare": "compare --quick --out {}/out",
    "demo": "demo --quick --out {}/out",
    "train": "train world-quick --optim.iterations 8 --out {}/out",
    "render": "world render --count 1 --out {}/out",
    "teacher": "world train --out {}/out",
    "prompts": "prompts --count 4 --out {}/prompts.txt",
}

GOES_ON = {
    "sample": "*.png",
    "cache": "shard-00000.safetensors",
    "export": "adapter.safetensors",
    "export a file": "*.safetensors",
    "render": "*.png",
    "prompts": "prompts.txt",
}
"""What there is when the same command has gone on in the room that it lacked, of those that are quick."""


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A disk of its own, of one megabyte, and what changes its kind."""
    place = tmp_path_factory.mktemp("disk")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], capture_output=True).returncode:
        pytest.skip("only who may mount a disk can fill it up")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def said(words, capfd):
    """The last line that a command says that ends with 1."""
    with pytest.raises(SystemExit) as stop:
        cli.main(words.split())
    err = capfd.readouterr().err
    assert stop.value.code == 1, err
    assert "Traceback" not in err
    return err.strip().splitlines()[-1]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_full_disk_is_one_sentence_and_leaves_nothing_that_could_be_taken_for_whole(name, disk, capfd):
    ballast = disk / "ballast"
    try:
        with open(ballast, "wb", buffering=0) as file:
            while file.write(bytes(4096)) == 4096:
                pass
    except OSError:
        pass
    try:
        assert "no space left on the disk" in said(COMMANDS[name].format(disk), capfd)
        assert [path for path in disk.rglob("*") if path != ballast and path.is_file() and path.stat().st_size] == []
    finally:
        ballast.unlink()
    try:
        if name in GOES_ON:
            subprocess.run(["mount", "-o", "remount,size=40m", disk], check=True)
            cli.main(COMMANDS[name].format(disk).split())
            assert list(disk.rglob(GOES_ON[name])) and not list(disk.rglob("*.tmp"))
    finally:
        subprocess.run(["rm", "-rf", *disk.iterdir()], check=True)
        subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_disk_that_may_only_be_read_is_one_sentence(name, disk, capfd):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    try:
        assert "Read-only file system" in said(COMMANDS[name].format(disk), capfd)
    finally:
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
