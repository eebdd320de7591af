"""Images in shards, parquet or tar, on any store that fsspec knows: a folder, s3://, gs://, hf://, ...

A shard is written whole or not at all, under a name that its images decide, so that a worker that draws it again
after another one has died writes the same file. Every image has a key, its recipe's file name; what the shards hold
is not drawn again.

    parquet   a row for each image: key, png (the file's bytes), seconds, and the recipe by its fields
    tar       key.png and key.json with the recipe, as webdataset reads them
"""

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from arcflow.sampling.folder import Recipe
from arcflow.system import files
from arcflow.system.packages import need
from arcflow.system.text import shown

if TYPE_CHECKING:
    import pyarrow

Kind = Literal["parquet", "tar"]

LOCAL = ("file", "local")
"""What fsspec calls the disks of this machine."""


@dataclass(frozen=True, kw_only=True)
class Shot:
    """An image of a shard: its recipe, its PNG file, and the seconds it took."""

    recipe: Recipe
    png: bytes
    seconds: float

    @property
    def key(self) -> str:
        return key_of(self.recipe)


def key_of(recipe: Recipe) -> str:
    """What tells an image from all others: the name of its file, which any part of its recipe changes."""
    return recipe.file.removesuffix(".png")


class Shards:
    """The shards in one place."""

    def __init__(self, where: str, kind: Kind) -> None:
        """Nothing is read or written yet.

        Raises:
            ValueError: fsspec knows no such store, or lacks its package.
        """
        fsspec = need("fsspec", asked="--shards", install="arcflow[ray]")
        if kind == "parquet":
            need("pyarrow", asked="parquet", install="arcflow[ray]")
        self.where, self.kind = where, kind
        try:
            self.store, self.root = fsspec.core.url_to_fs(where)
        except (ValueError, ImportError) as error:
            raise ValueError(f"--shards {where}: {error}") from error
        self.local = not isinstance(self.store.protocol, list) and self.store.protocol in (LOCAL, *LOCAL)

    def keys(self) -> set[str]:
        """Keys of all images that are there.

        Raises:
            ValueError: a shard is damaged.
        """
        return {key for path in self._paths() for key in self._read(path)}

    def has(self, recipes: Sequence[Recipe]) -> bool:
        """Whether there is a shard of just these images."""
        return bool(self.store.exists(self._path(recipes)))

    def write(self, shots: Sequence[Shot]) -> str:
        """Put images into a shard of their own, whole or not at all; where it is."""
        path = self._path([shot.recipe for shot in shots])
        content = _parquet(shots) if self.kind == "parquet" else _tar(shots)
        if self.local:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            files.write_bytes(Path(path), content)
        else:  # an object appears when all of it is there
            self.store.pipe_file(path, content)
        return path

    def _path(self, recipes: Sequence[Recipe]) -> str:
        name = files.text_digest(sorted(map(key_of, recipes)), 16)
        return f"{self.root.rstrip('/')}/{name}.{self.kind}"

    def _paths(self) -> list[str]:
        return sorted(self.store.glob(f"{self.root.rstrip('/')}/*.{self.kind}"))

    def _read(self, path: str) -> list[str]:
        try:
            with self.store.open(path, "rb") as file:
                if self.kind == "parquet":
                    import pyarrow.parquet

                    return pyarrow.parquet.ParquetFile(file).read(columns=["key"])["key"].to_pylist()
                with tarfile.open(fileobj=file) as tar:
                    return [name.removesuffix(".png") for name in tar.getnames() if name.endswith(".png")]
        except (OSError, ValueError, KeyError, tarfile.TarError) as error:
            raise ValueError(
                f"{path} is damaged ({shown(error, 120)}): expected a shard of ours; remove it, and the same command "
                f"draws its images again"
            ) from error


def _schema() -> "pyarrow.Schema":
    """Columns whose types do not depend on what is in them."""
    import pyarrow

    kinds = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_()}
    recipe = [(one.name, kinds[(get_args(one.type) or (one.type,))[0]]) for one in fields(Recipe)]
    own = [("key", pyarrow.string()), ("png", pyarrow.binary()), ("seconds", pyarrow.float64())]
    return pyarrow.schema([*own, *recipe])


def _parquet(shots: Sequence[Shot]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    rows = [{"key": shot.key, "png": shot.png, "seconds": shot.seconds, **asdict(shot.recipe)} for shot in shots]
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=_schema()), sink)
    return sink.getvalue()


def _tar(shots: Sequence[Shot]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for shot in shots:
            about = json.dumps({"key": shot.key, "seconds": shot.seconds, **asdict(shot.recipe)}).encode()
            for end, content in (("png", shot.png), ("json", about)):
                member = tarfile.TarInfo(f"{shot.key}.{end}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return sink.getvalue()
