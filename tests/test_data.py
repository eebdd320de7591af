"""Prompts by number: the same for every start of a run, each once per epoch, embeddings independent of the batch."""

import json

import pytest
import torch

from arcflow.config import Data
from arcflow.data import CHUNK, PromptData, Table, read_prompts, repeat, rows, seed_of


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
    prompts = [p for step in range(16) for p in data(tmp_path).batch(step)[0]]
    epochs = [prompts[i : i + 8] for i in range(0, 48, 8)]
    assert all(sorted(epoch) == [f"prompt {i}" for i in range(8)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_no_noise_is_used_twice(tmp_path):
    d = data(tmp_path)
    seeds = [s for step in range(20) for s in d.batch(step)[1]] + d.held_out_seeds
    assert len(set(seeds)) == len(seeds) == 62


def test_the_last_prompts_of_a_file_are_held_out(tmp_path):
    d = data(tmp_path)
    assert d.held_out == ["prompt 8", "prompt 9"] and not set(d.held_out) & set(d.train)


def test_held_out_prompts_of_the_world_are_other_combinations():
    d = PromptData(Data(count=200, held_out_count=50), seed=0, batch=4)
    assert len(d.train) == 200 and len(d.held_out) == 50
    assert not set(d.train) & set(d.held_out)


def test_json_lines_are_read(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "a dog", "id": 1}) + "\n" + json.dumps({"prompt": "a cat"}) + "\n")
    assert read_prompts(str(path)) == ["a dog", "a cat"]


def test_prompt_files_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(ValueError, match="no prompt file 'nowhere.txt'.*check the path"):
        read_prompts("nowhere.txt")
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match='p.jsonl, line 2: .*expected a JSON object with a "prompt"'):
        read_prompts(str(path))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="empty.txt is empty"):
        read_prompts(str(tmp_path / "empty.txt"))
    with pytest.raises(ValueError, match="10 prompts and 10 are to be held out.*lower data.held_out_count"):
        data(tmp_path, held_out_count=10)


def test_seeds_differ_by_purpose_and_fit_a_generator():
    assert seed_of(0, "noise", 1) != seed_of(0, "order", 1) != seed_of(1, "order", 0)
    torch.Generator().manual_seed(seed_of(7, "noise", 2**40))


def test_a_table_encodes_each_prompt_once_in_fixed_chunks():
    asked = []

    def encode(prompts):
        asked.append(len(prompts))
        length = torch.tensor([[float(len(p))] for p in prompts])
        return {"text": length, "img_ids": torch.zeros(4, 3)}

    prompts = ["x" * (i % 100) for i in range(300)]
    table = Table(encode, prompts)
    assert asked == [CHUNK, 100 - CHUNK]
    cond = table(["xxx", "x", "xxx"])
    assert cond["text"].flatten().tolist() == [3, 1, 3] and cond["img_ids"].shape == (4, 3)


def test_a_table_of_unequal_lengths_names_the_way_out():
    def encode(prompts):
        return {"text": torch.zeros(len(prompts), len(prompts))}

    with pytest.raises(ValueError, match="text differs in length.*data.cache to False"):
        Table(encode, [str(i) for i in range(CHUNK + 1)])


def test_conditioning_is_repeated_and_cut_by_sample():
    cond = {"text": torch.arange(6).view(2, 3), "txt_ids": torch.zeros(2, 3)}
    twice = repeat(cond, 2)
    assert torch.equal(twice["text"], torch.cat([cond["text"]] * 2)) and twice["txt_ids"] is cond["txt_ids"]
    assert (
        torch.equal(rows(cond, slice(1, 2))["text"], cond["text"][1:]) and len(rows(cond, slice(0, 1))["txt_ids"]) == 2
    )
