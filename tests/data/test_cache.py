"""Embeddings on disk: the same conditioning, whatever happened while they were made."""

import json
import shutil
from functools import partial

import pytest
import torch

from arcflow.data import cache
from arcflow.data.cache import Cache
from arcflow.families import network
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
    with pytest.raises(ValueError, match="shard-00000.safetensors is not whole.*again"):
        opened(tmp_path)
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ValueError, match="GB are needed and 0.0 GB free.*--stored float8"):
        make()
    assert json.loads((tmp_path / "cache" / "cache.json").read_text())["prompts"] == 7
