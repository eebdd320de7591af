"""Embeddings on disk: the same conditioning, whatever happened while they were made."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from arcflow.data import cache, embeddings
from arcflow.data.cache import Cache
from arcflow.families import network
from arcflow.families.identity import encoder_digest
from arcflow.system import files
from arcflow.system.owner import owned
from arcflow.system.processes import Ranks
from benchmarks import damaged_caches
from tests.support import trainings
from tests.support.pipelines import SIDE

PROMPTS = ["a red cube", "two blue ball on left of a green cube", "a ball", "a green ball", "on left of", "red"]
LENGTH = 16
ABOUT = {"model": "tiny", "max_sequence_length": LENGTH}


def encode_text(pipe, prompts):
    return network.encode_text(pipe, prompts, LENGTH)


@pytest.fixture
def make(pipe, tmp_path):
    encode = partial(encode_text, pipe)
    return partial(
        cache.make, tmp_path / "cache", encode, PROMPTS, about=ABOUT, shard=3, batch=2, log=lambda text: None
    )


def opened(tmp_path, dtype=torch.float32):
    return Cache(tmp_path / "cache", ABOUT, torch.device("cpu"), dtype)


def test_a_cached_batch_is_the_encoded_one(pipe, make, tmp_path):
    make(dtype="float32")
    read = opened(tmp_path)
    for prompts in (PROMPTS[:2], PROMPTS[3:], ["", "red"]):
        mine = network.place(pipe, read(prompts), height=SIDE, width=SIDE)
        theirs = network.encode_prompts(pipe, prompts, height=SIDE, width=SIDE, max_sequence_length=LENGTH)
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-4, msg=name)


def test_padding_is_not_stored_where_it_is_masked(pipe, make, tmp_path):
    make(dtype="float32")
    stored = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.safetensors"))
    full = sum(value.nbytes for value in encode_text(pipe, ["", *PROMPTS]).values())
    masked = cache.MASK in encode_text(pipe, PROMPTS)
    assert not masked or stored < full


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 2**-8), ("float16", 2**-10), ("float8", 2**-4)])
def test_short_numbers_lose_what_their_format_says(pipe, make, tmp_path, dtype, error):
    make(dtype=dtype)
    mine, theirs = opened(tmp_path)(PROMPTS[:1]), encode_text(pipe, PROMPTS[:1])
    for name, value in theirs.items():
        if value.is_floating_point():
            largest = value.abs().amax(-1, keepdim=True)
            assert ((mine[name] - value).abs() <= error * largest + 1e-6).all(), name


def test_a_killed_cache_goes_on_and_several_processes_share_it(pipe, make, tmp_path):
    make()
    whole = {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    asked = []

    def counted(prompts):
        asked.extend(prompts)
        return encode_text(pipe, prompts)

    shutil.rmtree(tmp_path / "cache")
    again = partial(
        cache.make, tmp_path / "cache", counted, PROMPTS, about=ABOUT, shard=3, batch=2, log=lambda text: None
    )
    for rank in (1, 0, 2):
        again(share=(rank, 3))
    assert sorted(asked) == sorted(["", *PROMPTS])
    again()  # nothing is left to do
    assert len(asked) == 7
    assert {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == whole


def test_a_corrupt_shard_is_named_and_made_again_alone(make, tmp_path):
    make()
    path = tmp_path / "cache" / "shard-00001.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-4] + b"\0\1\2\3")
    assert cache.verify(tmp_path / "cache") == [f"{path}: its checksum is wrong"]
    said = []
    make(log=said.append)
    assert path.read_bytes() == good and not cache.verify(tmp_path / "cache")
    assert "shard-00001.safetensors: its checksum is wrong; made again" in said[0]


def test_what_cannot_work_is_refused_with_a_remedy(make, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no cache in .*arcflow cache make"):
        opened(tmp_path)
    make()
    with pytest.raises(ValueError, match="shard: 3 there, 4 now.*choose another folder"):
        make(shard=4)
    with pytest.raises(ValueError, match="model: 'tiny' there, 'other' now.*data.embeddings"):
        Cache(tmp_path / "cache", {"model": "other"}, torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="lacks 1 of 2 prompts, the first 'a cow'"):
        opened(tmp_path).need(["a ball", "a cow"])
    (tmp_path / "cache" / "shard-00000.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="shard-00000.safetensors: its checksum is wrong.*again"):
        opened(tmp_path)
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ValueError, match="GB are needed and 0.0 GB free.*--stored float8"):
        make()
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_a_cache_that_is_killed_often_goes_on_and_nothing_is_lost_doubled_or_half():
    here = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    words = [sys.executable, "-m", "benchmarks.killed", "--kills", "3", "--of", "caches"]
    run = subprocess.run(words, env={**os.environ, **here}, capture_output=True, text=True)
    assert run.stdout == "caches: 3 of 3 killed at work; differing files: none\n", run.stderr


def refused(folder, said, **settings):
    with pytest.raises(ValueError, match=said):
        damaged_caches.make(folder, **settings)


@pytest.mark.slow
def test_a_damaged_cache_is_never_read_in_silence_and_the_same_command_heals_it():
    counts, wrong = damaged_caches.study(range(0, 42, 5))
    assert not wrong and counts["refused by name; made again: the same numbers"] > 5


@pytest.mark.slow
def test_many_damaged_caches():
    assert not damaged_caches.study(range(1000, 1042))[1]


def test_a_training_holds_shards_against_their_checksums_once(tmp_path, monkeypatch):
    damaged_caches.make(tmp_path / "cache")
    asked, real = [], cache.files.digest
    monkeypatch.setattr(cache.files, "digest", lambda path: asked.append(path.name) or real(path))
    for expected in (4, 4):
        damaged_caches.read(tmp_path / "cache")
        assert len(asked) == expected
    path = tmp_path / "cache" / "shard-00002.safetensors"
    path.write_bytes(path.read_bytes())  # another time
    damaged_caches.read(tmp_path / "cache")
    assert asked[4:] == ["shard-00002.safetensors"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in /proc")
def test_no_file_of_a_cache_stays_open(tmp_path):
    """There may be more shards than a process may open."""
    damaged_caches.make(tmp_path, shard=1)
    before = len(os.listdir("/proc/self/fd"))
    read = Cache(tmp_path, damaged_caches.ABOUT, torch.device("cpu"), torch.float32)
    assert len(read(damaged_caches.PROMPTS)) == 3 and len(list(tmp_path.glob("*.safetensors"))) == 12
    assert len(os.listdir("/proc/self/fd")) == before


def test_caches_of_before_are_read_and_go_on(tmp_path):
    folder = tmp_path / "cache"
    damaged_caches.make(folder)
    right = damaged_caches.read(folder)
    record = json.loads((folder / "cache.json").read_text())
    for name in ("sum", "encoder"):
        record.pop(name)
    (folder / "cache.json").write_text(json.dumps(record))
    (folder / "checked.json").unlink()
    for path in folder.glob("*.safetensors"):  # they were bound to nothing
        with safe_open(path, "pt") as file:
            metadata = {"prompts": file.metadata()["prompts"]}
        save_file(load_file(path), path, metadata)
        path.with_suffix(".sha256").write_text(files.digest(path))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert damaged_caches.same(damaged_caches.read(folder), right) and not cache.verify(folder)
    (folder / "checked.json").unlink()
    damaged_caches.make(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / "shard-00001.safetensors").unlink()
    damaged_caches.make(folder)
    assert damaged_caches.same(damaged_caches.read(folder), right)


def test_shards_of_a_model_are_not_taken_for_those_of_another(tmp_path):
    folder = tmp_path / "cache"
    for lost in (False, True):  # with what its shards are bound to, or as those of before
        damaged_caches.make(folder, about=damaged_caches.ABOUT | {"encoder": "1" * 32, "model": "other"}, scale=1.5)
        refused(folder, "encoder: '1111.*there, '0000.*now")
        (folder / "cache.json").unlink()
        if lost:
            for path in folder.glob("*.safetensors"):
                save_file(load_file(path), path, {"prompts": json.dumps(["x"])})
                path.with_suffix(".sha256").write_text(files.digest(path))
        damaged_caches.make(folder)
        damaged_caches.make(tmp_path / "right")
        assert damaged_caches.same(damaged_caches.read(folder), damaged_caches.read(tmp_path / "right"))
        shutil.rmtree(folder)


def test_a_model_may_lie_elsewhere_if_its_encoders_are_the_same(tmp_path):
    damaged_caches.make(tmp_path)
    moved = damaged_caches.ABOUT | {"model": "elsewhere"}
    damaged_caches.make(tmp_path, about=moved)
    Cache(tmp_path, moved, torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="model: 'tiny' there, 'elsewhere' now"):
        Cache(tmp_path, moved | {"encoder": None}, torch.device("cpu"), torch.float32)


def test_numbers_that_are_not_finite_are_refused_while_a_cache_is_made(tmp_path):
    big = {"encoder_hidden_states": torch.full((2, 2, 4), 7e4)}
    with pytest.raises(ValueError, match="of '' reaches 7e.04, which float16 does not hold.*--stored"):
        cache.make(tmp_path / "a", lambda texts: big, ["a"], about={}, dtype="float16")
    assert not (tmp_path / "a").exists()
    for dtype in ("bfloat16", "float8"):
        nan = {"encoder_hidden_states": torch.full((2, 2, 4), float("nan"))}
        with pytest.raises(ValueError, match="text encoder gives encoder_hidden_states of '' that is not finite"):
            cache.make(tmp_path / "a", lambda texts, nan=nan: nan, ["a"], about={}, dtype=dtype)
    cache.make(tmp_path / "a", lambda texts: big, ["a"], about={}, dtype="bfloat16")  # the corrected one is taken
    with pytest.raises(ValueError, match="not finite: expected numbers that torch.float16 holds"):
        Cache(tmp_path / "a", {}, torch.device("cpu"), torch.float16)(["a"])


def test_sizes_that_cannot_be_are_refused_before_anything_is_encoded(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "HEADER", 100_000)
    refused(tmp_path / "a", "shard = 0: expected 1 or more", shard=0)
    refused(tmp_path / "a", "batch = -1: expected 1 or more", batch=-1)
    asked = []
    for shard, prompts, encoded in (
        (100, [f"{i} {'x' * 3990}" for i in range(27)], 0),
        (300, [str(i) for i in range(300)], 1),
    ):
        with pytest.raises(ValueError, match="MB of names and texts.*take a smaller --shard"):
            cache.make(
                tmp_path / "a",
                lambda texts: asked.append(texts) or damaged_caches.encode(texts),
                prompts,
                about={},
                shard=shard,
                log=lambda text: None,
            )
        assert len(asked) == encoded and not (tmp_path / "a").exists()


def test_two_that_make_the_same_cache_are_kept_apart(tmp_path):
    with owned(tmp_path, "makes embeddings"):
        refused(tmp_path, "is in use, process .* makes embeddings there")
    with owned(tmp_path / "part-1-of-2", "makes embeddings"):
        refused(tmp_path, "part-1-of-2 is in use")
        refused(tmp_path, "part-1-of-2 is in use", share=(1, 2))
        damaged_caches.make(tmp_path, share=(0, 2))
    (tmp_path / "shard-00000.safetensors.0123abcd.tmp").write_text("of a killed process")
    damaged_caches.make(tmp_path)
    assert damaged_caches.read(tmp_path) and not list(tmp_path.glob("*.tmp")) + list(tmp_path.glob("part-*"))


def test_text_encoders_are_known_by_their_weights(tmp_path):
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        (tmp_path / name / "text_encoder").mkdir(parents=True)
        save_file({"x": torch.full((4000,), value)}, tmp_path / name / "text_encoder" / "model.safetensors")
    digests = [encoder_digest(str(tmp_path / name)) for name in ("a", "b", "c", "none")]
    assert digests[0] == digests[1] != digests[2] and digests[3] is None
    folder = tmp_path / "a" / "text_encoder"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    assert encoder_digest(str(tmp_path / "a")) is None  # not whole


def test_embeddings_of_another_width_are_named(tmp_path, flux):
    damaged_caches.make(tmp_path / "other", about={"model": "world", "max_sequence_length": None})
    run = trainings.config(tmp_path, data__embeddings=str(tmp_path / "other"))
    wide = flux.transformer.config.joint_attention_dim
    with pytest.raises(ValueError, match=f"other: encoder_hidden_states is 8 wide, and world takes {wide}"):
        embeddings.stored(flux, run, torch.device("cpu"), Ranks())
