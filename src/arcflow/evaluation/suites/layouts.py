"""The official scorers' side: where each of them looks for images, and what it leaves behind.

A suite's own images are PNG files of one shape, whatever the benchmark (`evaluation.images`). The functions
`*_layout` show them once more as the benchmark's scorer expects them: as hard links where it reads single PNG files, so
that nothing is stored twice, else as grids, WebP or JPEG, compressed as the benchmarks' own example scripts leave it to
Pillow. The functions `*_answers` read the file that a scorer writes, one number for each image or prompt.

Checked against djghosh13/geneval, TencentQQGYLab/ELLA (dpg_bench), OneIG-Bench/OneIG-Benchmark and tgxs002/HPSv2.
"""

import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image


def write_once(path: Path, write: Callable[[Path], object], of: Sequence[Path] = ()) -> None:
    """Let `write` make a file that is not there, or is not made of these images as they are now."""
    if not path.exists() or (of and not _made_of(path, of)):
        # Not at the top: the command line lists suites, and does not wait for torch.
        from arcflow.system import files

        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(path, write)


def _made_of(path: Path, images: Sequence[Path]) -> bool:
    """Whether a file is no older than the images that it shows, and as large as they are side by side."""
    from PIL import Image  # as above

    if path.stat().st_mtime_ns < max(image.stat().st_mtime_ns for image in images):
        return False
    try:
        with Image.open(path) as there, Image.open(images[0]) as one:
            return there.size == tuple(math.isqrt(len(images)) * length for length in one.size)
    except OSError:
        return False


def link(image: Path, path: Path) -> None:
    """Show an image under another name too, as it is now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and (os.path.samefile(image, path) or _made_of(path, [image])):
        return
    try:
        path.unlink(missing_ok=True)
        os.link(image, path)
    except FileExistsError:  # another process was faster
        pass
    except OSError:  # a file system without hard links
        write_once(path, lambda draft: shutil.copyfile(image, draft), of=[image])


def grid(paths: Sequence[Path]) -> "Image.Image":
    """A square of images, row by row; one alone is itself."""
    from PIL import Image  # as above

    side = math.isqrt(len(paths))
    if side**2 != len(paths):
        raise ValueError(f"{len(paths)} images of a prompt make no square; the official grid takes --images 4")
    images = [Image.open(path).convert("RGB") for path in paths]
    width, height = images[0].size
    grid = Image.new("RGB", (side * width, side * height))
    for place, image in enumerate(images):
        grid.paste(image, (place % side * width, place // side * height))
    return grid
