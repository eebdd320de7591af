"""Shards hold images whole, by key; another store is another address."""

import io
import json
import tarfile

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from arcflow.sampling.folder import Recipe, png
from arcflow.sampling.shards import Shards, Shot, key_of


def shot(seed: int) -> Shot:
    recipe = Recipe(
        prompt="a ring", seed=seed, steps=2, height=8, width=8, guidance=None, model="m", adapter="a", version="1"
    )
    return Shot(recipe=recipe, png=png(np.full((8, 8, 3), seed, np.uint8), recipe), seconds=0.5)


@pytest.mark.parametrize("kind", ["parquet", "tar"])
@pytest.mark.parametrize("store", ["folder", "memory"])
def test_what_was_written_is_there_and_no_shard_twice(tmp_path, kind, store):
    where = str(tmp_path / "shards") if store == "folder" else f"memory://{tmp_path.name}"
    shards = Shards(where, kind)
    assert shards.keys() == set()
    lot = [shot(seed) for seed in range(3)]
    recipes = [one.recipe for one in lot]
    assert not shards.has(recipes)
    assert shards.write(lot) == shards.write(lot[::-1])
    assert shards.has(recipes) and not shards.has(recipes[:2])
    assert shards.keys() == {key_of(recipe) for recipe in recipes}


def test_a_row_and_a_member_carry_the_recipe(tmp_path):
    one = shot(7)
    with pyarrow.parquet.ParquetFile(Shards(str(tmp_path), "parquet").write([one])) as file:
        (row,) = file.read().to_pylist()
    assert (row["key"], row["seed"], row["guidance"], row["seconds"]) == (one.key, 7, None, 0.5)
    assert np.array(Image.open(io.BytesIO(row["png"])))[0, 0, 0] == 7
    with tarfile.open(Shards(str(tmp_path), "tar").write([one])) as tar:
        about = tar.extractfile(f"{one.key}.json")
        assert about and json.load(about)["prompt"] == "a ring"


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_damaged_shard_is_named(tmp_path, kind):
    (tmp_path / f"half.{kind}").write_bytes(b"half of it")
    with pytest.raises(ValueError, match=f"half.{kind} is damaged .* remove it"):
        Shards(str(tmp_path), kind).keys()


def test_an_unknown_store_is_a_sentence():
    with pytest.raises(ValueError, match="--shards nowhere://x"):
        Shards("nowhere://x", "tar")
