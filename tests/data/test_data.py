"""Prompts by number: the same for every start of a run, each once per epoch, embeddings independent of the batch."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfFileSystem

from arcflow.config import Data
from arcflow.data.batches import PromptData, PromptStream, open_prompts
from arcflow.data.embeddings import CHUNK, EmbeddedPrompts
from arcflow.data.images import read_images
from arcflow.data.prompts import ListedPrompt
from arcflow.data.stream import data_digest
from arcflow.families.conditioning import repeat, rows
from arcflow.system.processes import Ranks
from arcflow.system.seeds import seed_of
from tests.support.prompt_lists import with_images


def data(tmp_path, count=10, held_out_count=2, batch=3, seed=0):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"prompt {i}\n\n" for i in range(count)))
    return PromptData(Data(prompts=str(path), held_out_count=held_out_count), seed=seed, batch=batch)


def test_a_batch_depends_on_seed_and_step_alone(tmp_path):
    first, second = data(tmp_path), data(tmp_path)
    ahead = [first.batch(step) for step in range(9)]
    assert [second.batch(step) for step in reversed(range(9))][::-1] == ahead
    assert data(tmp_path, seed=1).batch(0) != ahead[0]


def test_every_epoch_has_every_prompt_once_in_an_order_of_its_own(tmp_path):
    prompts = [p for step in range(16) for p in data(tmp_path).batch(step).prompts]
    epochs = [prompts[i : i + 8] for i in range(0, 48, 8)]
    assert all(sorted(epoch) == [f"prompt {i}" for i in range(8)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_no_noise_is_used_twice(tmp_path):
    d = data(tmp_path)
    seeds = [s for step in range(20) for s in d.batch(step).seeds] + d.held_out.seeds
    assert len(set(seeds)) == len(seeds) == 62


@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_share_out_every_prompt_once_each_with_a_noise_of_its_own(tmp_path, count):
    d = data(tmp_path, batch=4)
    for step in range(6):
        batch = d.batch(step)
        mine = [Ranks(rank=rank, count=count).rows(len(batch.prompts)) for rank in range(count)]
        assert [prompt for rows in mine for prompt in batch.prompts[rows]] == batch.prompts
        assert len({seed for rows in mine for seed in batch.seeds[rows]}) == len(batch.prompts)


def test_images_stay_with_their_prompts(tmp_path):
    batch = PromptData(with_images(tmp_path), seed=0, batch=3).batch(0)
    images = read_images(batch.images, (8, 16))
    assert images.shape == (3, 8, 16, 3)
    assert [f"prompt {image[0, 0, 0]}" for image in images] == batch.prompts


def test_rows_without_an_image_are_named(tmp_path):
    config = with_images(tmp_path)
    (tmp_path / "1.png").unlink()
    with pytest.raises(
        ValueError, match=r"1 of 3 rows have no image, the first '1.png' of 'prompt 1'.*data.images off"
    ):
        PromptData(config, seed=0, batch=3)
    (tmp_path / "1.png").write_text("no image")
    with pytest.raises(ValueError, match=r"1.png is no image .*: expected PNG"):
        read_images([str(tmp_path / "1.png")], (8, 8))


def test_the_last_prompts_of_a_file_are_held_out(tmp_path):
    d = data(tmp_path)
    assert d.held_out.prompts == ["prompt 8", "prompt 9"]
    assert not set(d.held_out.prompts) & {row.text for row in d.train}
    with pytest.raises(ValueError, match="10 prompts and 10 are to be held out.*lower data.held_out_count"):
        data(tmp_path, held_out_count=10)
    with pytest.raises(ValueError, match="1 prompts and 1 are to be held out.*give data.held_out a file of its own"):
        data(tmp_path, count=1, held_out_count=1)


def test_what_is_held_out_is_not_trained_on_however_often_it_is_there(tmp_path):
    (tmp_path / "list.txt").write_text("".join(f"prompt {i % 10}\n" for i in range(40)))
    d = PromptData(Data(prompts=str(tmp_path / "list.txt"), held_out_count=4), seed=0, batch=4)
    assert [row.text for row in d.train] == [f"prompt {i}" for i in range(6)]
    assert d.held_out.prompts == [f"prompt {i}" for i in range(6, 10)]
    assert d.message == f"{tmp_path / 'list.txt'}: 30 of 40 rows left out: they are there before"
    (tmp_path / "own.txt").write_text("prompt  3\nprompt 11\n")
    own = Data(prompts=str(tmp_path / "list.txt"), held_out=str(tmp_path / "own.txt"))
    d = PromptData(own, seed=0, batch=4)
    assert len(d.train) == 9 and ListedPrompt("prompt 3") not in d.train
    assert "1 rows left out of training: they are held out" in str(d.message)
    (tmp_path / "list.txt").write_text("prompt 3\n")
    with pytest.raises(ValueError, match="all 1 prompts are held out too"):
        PromptData(own, seed=0, batch=4)


@pytest.mark.slow
def test_held_out_prompts_of_the_world_are_other_combinations():
    d = PromptData(Data(count=200, held_out_count=50), seed=0, batch=4)
    assert len(d.train) == 200 and len(d.held_out.prompts) == 50
    assert not {row.text for row in d.train} & set(d.held_out.prompts)


@pytest.fixture
def shapes(tmp_path):
    """Wide, high and plain images, and one shape too rare to fill a batch."""
    wanted = [(512, 1024)] * 9 + [(1024, 512)] * 7 + [(None, None)] * 8 + [(600, 800)]
    lines = [json.dumps({"prompt": f"p{i}", "height": h, "width": w}) for i, (h, w) in enumerate(wanted)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    return Data(prompts=str(tmp_path / "p.jsonl"), held_out_count=1, height=1024, width=1024, buckets=True, cache=False)


def test_images_of_a_batch_have_one_size_of_about_the_same_area(shapes):
    d = PromptData(shapes, seed=0, batch=3)
    batches = [d.batch(step) for step in range(14)]  # two epochs: 3 + 2 + 2 batches
    first, second = Counter(b.size for b in batches[:7]), Counter(b.size for b in batches[7:])
    assert first == second == {(768, 1344): 3, (1344, 768): 2, (1024, 1024): 2}
    assert all(abs(h * w / 1024**2 - 1) < 0.05 for h, w in first)
    assert len({p for b in batches[:7] for p in b.prompts}) == 21
    assert PromptData(shapes, seed=0, batch=3).batch(11) == batches[11]
    with pytest.raises(ValueError, match="no image size has 20 prompts.*lower optim.batch"):
        PromptData(shapes, seed=0, batch=20)


@pytest.fixture
def shards(tmp_path):
    """A data set of three files, dirty rows among the clean ones."""
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    for k in range(3):
        texts = [f"p{k} {i}" for i in range(7)] + [" "]
        (folder / f"{k}.jsonl").write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts))
    return Data(prompts=str(folder), held_out_count=2, cache=False)


@pytest.mark.slow
def test_a_stream_gives_every_prompt_once_an_epoch_and_says_what_it_left_out(shards):
    d = open_prompts(shards, seed=0, batch=4)
    assert isinstance(d, PromptStream) and d.held_out.prompts == ["p0 0", "p0 1"]
    drawn = [prompt for step in range(19) for prompt in d.batch(step).prompts]  # four epochs of 19
    assert set(Counter(drawn).values()) == {4} and len(set(drawn)) == 19
    assert "3 of 24 rows left out: 3 empty (row 8, 16, 24)" in str(open_prompts(shards, seed=0, batch=4).message)


@pytest.mark.slow
def test_videos_of_a_stream_have_the_frames_that_their_rows_tell(tmp_path):
    """Those of a batch as many, and a stream that is taken up knows the numbers that it has met."""
    pytest.importorskip("datasets")
    rows = [{"prompt": f"p{i}", "frames": (None, 5, 9)[i % 3]} for i in range(13)]
    (tmp_path / "0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {"height": 32, "width": 32, "frames": 5}
    config = Data(prompts=f"{tmp_path}/", held_out_count=1, buckets=True, cache=False, **sizes)
    whole, again = (open_prompts(config, seed=0, batch=2) for _ in range(2))
    batches = [whole.batch(step) for step in range(6)]
    assert {batch.size for batch in batches} == {(32, 32, 5), (32, 32, 9)}
    long = {f"p{i}" for i in range(2, 13, 3)}
    assert all((batch.size[-1] == 9) == bool(set(batch.prompts) & long) for batch in batches)
    again.load(json.loads(json.dumps(whole.state())))
    assert again.batch(6) == whole.batch(6)


@pytest.mark.slow
def test_a_stream_goes_on_where_it_was_left(shards, monkeypatch):
    monkeypatch.setattr("arcflow.data.prompts.BLOCK", 5)
    whole = open_prompts(shards, seed=0, batch=4)
    batches = [whole.batch(step) for step in range(20)]
    for left in (0, 1, 7, 13):
        first, then = open_prompts(shards, seed=0, batch=4), open_prompts(shards, seed=0, batch=4)
        for step in range(left):
            first.batch(step)
        then.load(json.loads(json.dumps(first.state())))
        then.load(json.loads(json.dumps(then.state())))  # saved again before a row is read
        assert [then.batch(step) for step in range(left, 20)] == batches[left:]


def test_a_stream_that_cannot_be_read_says_so(shards, tmp_path):
    for changes, said in (
        ({"prompts": str(tmp_path / "none/")}, "cannot be read|no data set"),
        ({"column": "text"}, r"no column 'text': expected one of \['prompt'\]; name it with --data.column"),
        ({"split": "best"}, "split 'best'.*cannot be read"),
    ):
        with pytest.raises(ValueError, match=said):
            open_prompts(Data(**{**vars(shards), **changes}), seed=0, batch=4)


def test_a_stream_is_known_by_what_is_in_its_files(shards, monkeypatch):
    def content():
        return open_prompts(shards, seed=0, batch=4).stream.content

    first, last = content(), Path(shards.prompts) / "2.jsonl"
    last.rename(last.with_name("3.jsonl"))
    assert first and content() == first
    last.write_text(last.with_name("3.jsonl").read_text())
    assert content() != first

    known = {"hf://a": {"lfs": {"sha256": "1"}}, "hf://b": {"blob_id": "2"}}
    monkeypatch.setattr(HfFileSystem, "info", lambda self, path: known[path])
    assert data_digest(["hf://a", "hf://b"]) == data_digest(["hf://b", "hf://a"]) != data_digest(["hf://a"])
    assert data_digest(["hf://a", "hf://away"]) is None and data_digest(["https://a.org/x.csv"]) is None


def test_a_stream_looks_at_no_images(tmp_path):
    datasets = pytest.importorskip("datasets")
    kinds = datasets.Features({"prompt": datasets.Value("string"), "image": datasets.Image()})
    rows = {"prompt": [f"p {i}" for i in range(40)], "image": [{"bytes": b"no image", "path": None}] * 40}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, features=kinds).to_parquet(tmp_path / "set" / "train.parquet")
    d = open_prompts(Data(prompts=str(tmp_path / "set"), cache=False, held_out_count=3), seed=0, batch=4)
    assert len({prompt for step in range(9) for prompt in d.batch(step).prompts}) == 36


def test_a_stream_that_breaks_off_is_asked_again_from_the_same_row(shards, monkeypatch):
    waits = []
    monkeypatch.setattr("arcflow.data.stream.time.sleep", waits.append)
    whole = open_prompts(shards, seed=0, batch=4)
    batches = [whole.batch(step) for step in range(9)]
    monkeypatch.setattr("arcflow.data.batches.BLOCK", 5)
    flaky, failures = open_prompts(shards, seed=0, batch=4), [3, 2]

    def rows(reader):
        for i, row in enumerate(reader):
            if failures and i == failures[0]:
                failures.pop(0)
                raise ConnectionError("Server disconnected")
            yield row

    go = flaky.stream._go

    def going(*args, **where):
        go(*args, **where)
        flaky.stream._reader = rows(flaky.stream._reader)

    flaky.stream._go = going
    flaky.stream._reader = rows(flaky.stream._reader)
    drawn = [flaky.batch(step) for step in range(9)]
    assert not failures and waits == [1.0, 5.0]
    assert {p for batch in drawn[:4] for p in batch.prompts} <= {p for batch in batches for p in batch.prompts}
    assert len([p for batch in drawn[:4] for p in batch.prompts]) == len({p for b in drawn[:4] for p in b.prompts})
    failures[:] = [0] * 9
    state = flaky.state()
    flaky.stream._reader = rows(flaky.stream._reader)
    with pytest.raises(ValueError, match="cannot be read on after row .*Server disconnected.*the same command goes on"):
        flaky.stream.next()
    assert len(waits) == 6 and flaky.state() == state


def test_seeds_differ_by_purpose_and_fit_a_generator():
    assert seed_of(0, "noise", 1) != seed_of(0, "order", 1) != seed_of(1, "order", 0)
    torch.Generator().manual_seed(seed_of(7, "noise", 2**40))


def test_a_table_encodes_each_prompt_once_in_fixed_chunks():
    asked = []

    def encode(prompts):
        asked.append(len(prompts))
        length = torch.tensor([[float(len(p))] for p in prompts])
        return {"text": length}

    prompts = ["x" * (i % 100) for i in range(300)]
    table = EmbeddedPrompts(encode, prompts)
    assert asked == [CHUNK, 100 - CHUNK]
    assert table(["xxx", "x", "xxx"])["text"].flatten().tolist() == [3, 1, 3]


def test_a_table_of_unequal_lengths_names_the_way_out():
    def encode(prompts):
        return {"text": torch.zeros(len(prompts), len(prompts))}

    with pytest.raises(ValueError, match="text differs in length.*data.cache to False"):
        EmbeddedPrompts(encode, [str(i) for i in range(CHUNK + 1)])


def test_conditioning_is_repeated_and_cut_by_sample():
    cond = {"text": torch.arange(6).view(2, 3), "txt_ids": torch.zeros(2, 3)}
    twice = repeat(cond, 2)
    assert torch.equal(twice["text"], torch.cat([cond["text"]] * 2)) and twice["txt_ids"] is cond["txt_ids"]
    assert (
        torch.equal(rows(cond, slice(1, 2))["text"], cond["text"][1:]) and len(rows(cond, slice(0, 1))["txt_ids"]) == 2
    )
