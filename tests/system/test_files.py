"""Files that are whole or absent, and folders that belong to one work."""

import errno
import json
import os
import stat

import pytest

from arcflow.system import files


def test_a_folder_is_taken_up_again_with_the_same_settings_and_refused_with_others(tmp_path):
    home = tmp_path / "run" / "settings.json"
    files.claim(home, json.dumps({"rank": 4, "out": "a"}), holds="a run", free=("out",))
    files.claim(home, json.dumps({"rank": 4, "out": "b"}), holds="a run", free=("out",))
    before = home.read_bytes()

    with pytest.raises(ValueError, match="holds a run with other settings .rank: 4 there, 8 now.*--out"):
        files.claim(home, json.dumps({"rank": 8, "out": "b"}), holds="a run", free=("out",))
    assert home.read_bytes() == before


def test_a_process_that_does_not_write_still_holds_the_settings_against_the_folder(tmp_path):
    home = tmp_path / "settings.json"
    files.claim(home, "{}", holds="a run", write=False)
    assert not home.exists()


def test_lines_come_back_and_one_that_was_cut_short_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    assert files.read_lines(path) == []
    files.write_lines(path, [{"step": 1}, {"step": 2}])
    with path.open("a") as log:
        log.write('{"step": 3')
    assert files.read_lines(path) == [{"step": 1}, {"step": 2}]


def test_digests_tell_values_and_files_apart(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    files.write_text(one, "a")
    files.write_text(other, "b")
    assert files.digest(one) != files.digest(other)
    assert files.text_digest(["a"], 16) != files.text_digest(["b"], 16) and len(files.text_digest(["a"], 16)) == 16


def test_a_link_that_waits_for_the_draft_is_not_followed(tmp_path, monkeypatch):
    (tmp_path / "secret").write_text("mine")
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "a" * 2 * count)
    (tmp_path / "file.aaaaaaaa.tmp").symlink_to(tmp_path / "secret")
    with pytest.raises(FileExistsError):
        files.write_text(tmp_path / "file", "new")
    assert (tmp_path / "secret").read_text() == "mine" and not (tmp_path / "file").exists()


def test_drafts_have_names_of_their_own_and_those_of_the_dead_are_swept(tmp_path):
    drafts = []
    for _ in range(2):
        files.write_atomic(tmp_path / "file", lambda draft: drafts.append(draft.name) or draft.write_text("x"))
    assert len(set(drafts)) == 2
    for name in (drafts[0], "log.jsonl.4711.tmp", "mine.tmp", "00000004.tmp"):
        (tmp_path / name).touch()
    assert {path.name for path in files.sweep(tmp_path)} == {drafts[0], "log.jsonl.4711.tmp"}
    assert {path.name for path in tmp_path.iterdir()} == {"file", "mine.tmp", "00000004.tmp"}


def test_a_disk_that_cannot_sync_folders_is_written_to(tmp_path, monkeypatch):
    real = os.fsync

    def network_disk(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    monkeypatch.setattr(os, "fsync", network_disk)
    files.write_json(tmp_path / "run" / "run.json", {})
    assert files.digest(tmp_path / "run" / "run.json")
