"""Looks into the built distributions: what must be in them is there, what must not is not.

python .ci/contents.py dist
"""

import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def check(dist: Path) -> None:
    """Raises SystemExit, with a sentence, for the first thing that is wrong with the wheel or the sdist in `dist`."""
    (wheel,) = dist.glob("*.whl")
    (sdist,) = dist.glob("*.tar.gz")

    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    source = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src/arcflow").rglob("*") if path.is_file()}
    same(packed, {name for name in source if "__pycache__" not in name}, f"{wheel.name} and src")

    with tarfile.open(sdist) as archive:
        unpacked = {name.partition("/")[2] for name in archive.getnames()}
    needed = {f"src/{name}" for name in packed} | {
        "pyproject.toml",
        "constraints.txt",
        "Makefile",
        "mkdocs.yml",
        "LICENSE",
    }
    needed |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")}
    if missing := sorted(needed - unpacked):
        raise SystemExit(f"{sdist.name} lacks {len(missing)} files, {missing[0]} first; add them to pyproject.toml")

    size = wheel.stat().st_size / 1e6
    print(f"{wheel.name}: {len(packed)} files, {size:.1f} MB; {sdist.name}: {len(unpacked)} files")


def same(packed: set[str], source: set[str], where: str) -> None:
    """Raises SystemExit if the two differ."""
    if packed != source:
        raise SystemExit(f"{where} differ: {sorted(packed ^ source)[:5]}; see [tool.hatch.build] in pyproject.toml")


if __name__ == "__main__":
    check(Path(sys.argv[1]))
