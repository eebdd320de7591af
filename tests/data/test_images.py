"""Images from files: as a viewer shows them, or refused by name."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from arcflow.data.images import read_image, read_images
from arcflow.evaluation import measured


def both(path, size=(32, 32)):
    """What training and evaluation see of a file."""
    return read_images([str(path)], size)[0], measured.read_image(path)


def test_an_image_that_a_phone_turned_stands_upright(tmp_path):
    up = np.zeros((64, 32, 3), np.uint8)
    up[:32, :, 0], up[32:, :, 2] = 255, 255
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(np.rot90(up)).save(tmp_path / "phone.jpg", exif=turned)
    for image in both(tmp_path / "phone.jpg", (64, 32)):
        assert image.shape == (64, 32, 3)
        assert np.abs(image[5, 16].astype(int) - [255, 0, 0]).max() <= 3
        assert np.abs(image[58, 16].astype(int) - [0, 0, 255]).max() <= 3


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bits_are_scaled(tmp_path, ending):
    deep = np.full((32, 32), 100 * 257, np.uint16)
    deep[0, 0], deep[0, 1] = 65535, 0
    Image.fromarray(deep).save(tmp_path / f"deep.{ending}")
    for image in both(tmp_path / f"deep.{ending}"):
        assert (image[2:] == 100).all() and image[0, 0, 0] == 255 and image[0, 1, 0] == 0


def test_what_is_transparent_is_white(tmp_path):
    clear = np.zeros((32, 32, 4), np.uint8)
    clear[..., 0], clear[:16, :, 3] = 255, 255
    image = Image.fromarray(clear)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.webp", lossless=True)
    image.convert("LA").save(tmp_path / "c.png")
    image.quantize(4).save(tmp_path / "d.png")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "e.png", transparency=(255, 0, 0))
    for name in ("a.png", "b.webp", "c.png", "d.png", "e.png"):
        for seen in both(tmp_path / name):
            assert (seen[20:] == 255).all(), name
            assert name == "e.png" or (seen[:10] != 255).any(), name


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


MODES = {"png": ("L", "LA", "RGBA"), "jpg": ("L", "CMYK"), "webp": ("L", "RGBA"), "tif": ("L", "LA", "CMYK", "RGBA")}


@pytest.mark.parametrize(("ending", "mode"), [(ending, mode) for ending, modes in MODES.items() for mode in modes])
def test_gray_is_gray_in_every_mode(tmp_path, ending, mode):
    lossless = {"lossless": True} if ending == "webp" else {}
    Image.new("RGB", (32, 32), (128, 128, 128)).convert(mode).save(tmp_path / f"a.{ending}", **lossless)
    for image in both(tmp_path / f"a.{ending}"):
        assert image.shape == (32, 32, 3) and (image == 128).all()


def test_a_palette_has_its_colors(tmp_path):
    image = Image.new("RGB", (32, 32), (10, 20, 30)).quantize(4)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "a.gif")
    for name in ("a.png", "a.gif"):
        for seen in both(tmp_path / name):
            assert (seen == [10, 20, 30]).all()


def test_what_pillow_refuses_is_named(tmp_path):
    head = struct.pack(">IIBBBBB", 20000, 20000, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
    (tmp_path / "large.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    text = PngImagePlugin.PngInfo()
    text.add_text("x", "y" * 3_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "text.png", pnginfo=text)
    (tmp_path / "cut.png").write_bytes((tmp_path / "text.png").read_bytes()[:40])
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((8, 8), 1 << 20, np.int32)).save(tmp_path / "deep.tif")
    (tmp_path / "html.jpg").write_text("<html>")
    (tmp_path / "._a.png").write_bytes(b"\0\5\x16\7")
    (tmp_path / "empty.png").touch()
    for name in (
        "._a.png",
        "empty.png",
        "large.png",
        "text.png",
        "cut.png",
        "float.tif",
        "deep.tif",
        "html.jpg",
        "none.png",
    ):
        for read in (lambda path: read_images([str(path)], (8, 8)), read_image):
            with pytest.raises(ValueError, match=f"{name} is no image that can be read .*: expected PNG"):
                read(tmp_path / name)
