"""Images to vectors: the networks whose features the metrics compare.

Every function loads a network once and returns a plain callable from uint8 images to one vector each; a metric takes
any other callable as well. Only the world's own network comes with the package. The others are fetched as their
libraries do it, or read from a file, and where one is not installed an error says which, and how to install it.

Resizing is part of a network: Inception sees 299 x 299 by an antialiased bicubic filter, as in pi-Flow (arXiv
2510.14974); CLIP and DINOv2 see what their own processors make, always through PIL, so that a number does not depend
on torchvision being installed. `patches` cuts crops at full resolution, which Inception then does not resize: their
Frechet distance is patch FID (SDXL-Lightning, arXiv 2402.13929) and sees the detail that 299 pixels for a whole image
cannot hold.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, CLIPModel

from arcflow.system import files
from arcflow.system.packages import need
from arcflow.world.autoencoder import CHANNELS, to_tensor, vae_encode
from arcflow.world.scene import SIZE
from arcflow.world.teacher import teacher_folder

Images = UInt8[np.ndarray, "n rows columns 3"]

Vectors = Float[Tensor, "n width"]

Features = Callable[[Images], Vectors]

INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"

INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"

INCEPTION_SIZE = 299


def patches(images: Images, size: int = INCEPTION_SIZE, per_side: int = 1) -> UInt8[np.ndarray, "crops size size 3"]:
    """Square crops of each image, one image's after the other's: its center, or a grid from edge to edge."""
    rows, columns = (_starts(length, size, per_side) for length in images.shape[1:3])
    return np.concatenate([[image[y : y + size, x : x + size] for y in rows for x in columns] for image in images])


def _starts(length: int, size: int, count: int) -> list[int]:
    if size > length:
        raise ValueError(f"a patch of {size} pixels does not fit images of {length}; give a size of {length} or less")
    if count == 1:
        return [(length - size) // 2]
    return np.linspace(0, length - size, count).round().astype(int).tolist()


def world_features(batch_size: int = 32) -> Features:
    """44 numbers that say what is in an image of the built-in world, and what goes with what, but not where.

    The shipped autoencoder's latents were trained to say in each cell what is there (`autoencoder.plain_map`); these
    are the means over the cells of its 8 channels and of their 36 products. For this world alone: the network has seen
    nothing else, and is the teacher's own, so it cannot see what its decoder does wrong in the same way every time.
    """
    vae = AutoencoderKL.from_pretrained(teacher_folder() / "vae")
    first, second = torch.tril_indices(CHANNELS, CHANNELS)

    def call(images: Images) -> Tensor:
        if images.shape[1:3] != (SIZE, SIZE):
            raise ValueError(f"the world's images are {SIZE} x {SIZE}, got {images.shape[1]} x {images.shape[2]}")
        z = vae_encode(vae, to_tensor(images)).flatten(2)
        return torch.cat([z.mean(2), (z @ z.mT)[:, first, second] / z.shape[2]], 1)

    return _in_batches(call, batch_size)


def inception_features(weights: str | Path, *, device: str | torch.device = "cpu", batch_size: int = 64) -> Features:
    """The 2048 numbers of FID, by the TorchScript file of Inception that StyleGAN, clean-fid and pi-Flow use.

    Another file is used with a warning: its numbers compare with no others, and it is a program that runs here.
    """
    if Path(weights).is_file() and files.digest(Path(weights)) != INCEPTION_SHA256:
        warnings.warn(
            f"{weights} is not the file of {INCEPTION_URL}: its SHA-256 is another. It is a program that runs here "
            f"with your rights, and its numbers do not compare with published ones",
            stacklevel=2,
        )
    try:
        net = torch.jit.load(str(weights), map_location=device).eval()
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{weights} is no TorchScript file; download {INCEPTION_URL} and give its path") from error

    def call(images: Images) -> Tensor:
        x = _channels_first(images).to(device).float()
        x = functional.interpolate(x, size=(INCEPTION_SIZE, INCEPTION_SIZE), mode="bicubic", antialias=True)
        return net(x.clamp(0, 255).round().byte(), return_features=True)

    return _in_batches(call, batch_size)


def dino_features(
    model: str | Path = "facebook/dinov2-large", *, device: str | torch.device = "cpu", batch_size: int = 64
) -> Features:
    """The class token of DINOv2; its Frechet distance agrees with people better than Inception's (arXiv 2306.04675)."""
    net = _pretrained(AutoModel, model, dtype=torch.float32).to(device).eval()
    processor = _pretrained(AutoImageProcessor, model, backend="pil")

    def call(images: Images) -> Tensor:
        return net(**processor(images=list(images), return_tensors="pt").to(device)).pooler_output

    return _in_batches(call, batch_size)


class Clip(NamedTuple):
    """The two halves of CLIP, for `metrics.clip_score`."""

    images: Features
    texts: Callable[[Sequence[str]], Vectors]
    """Words beyond the network's 77 tokens are cut off."""


def clip(
    model: str | Path = "openai/clip-vit-large-patch14-336",
    *,
    device: str | torch.device = "cpu",
    batch_size: int = 64,
) -> Clip:
    """Embeddings of images and of texts in one space; the default network is pi-Flow's."""
    net = _pretrained(CLIPModel, model, dtype=torch.float32).to(device).eval()
    processor = _pretrained(AutoImageProcessor, model, backend="pil")
    tokenizer = _pretrained(AutoTokenizer, model)
    length = net.config.text_config.max_position_embeddings

    def images(images: Images) -> Tensor:
        return net.get_image_features(**processor(images=list(images), return_tensors="pt").to(device)).pooler_output

    def texts(prompts: Sequence[str]) -> Tensor:
        tokens = tokenizer(list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        return net.get_text_features(**tokens.to(device)).pooler_output

    return Clip(_in_batches(images, batch_size), _in_batches(texts, batch_size))


def lpips_distance(
    net: Literal["alex", "vgg", "squeeze"] = "alex", *, device: str | torch.device = "cpu", batch_size: int = 64
) -> Callable[[Images, Images], Float[Tensor, "n"]]:
    """Perceptual distance of each pair of images (arXiv 1801.03924), by the package lpips."""
    library = need("lpips", asked="LPIPS", install="arcflow[eval]")
    try:
        network = library.LPIPS(net=net, verbose=False).to(device)
    except OSError as error:
        raise ValueError(
            f"torchvision could not download the weights of {net!r} ({error}); do it with a network once"
        ) from error

    def call(a: Images, b: Images) -> Tensor:
        x, y = (_channels_first(images).to(device) / 127.5 - 1 for images in (a, b))
        return network(x, y).flatten()

    return _in_batches(call, batch_size)


def _pretrained(kind: Any, model: str | Path, **more: torch.dtype | str) -> Any:
    try:
        return kind.from_pretrained(model, **more)
    except OSError as error:
        raise ValueError(
            f"cannot load {model}: no folder that holds a network, and not on the Hugging Face Hub, or that is out of "
            f"reach; get it with `hf download {model}` where there is a network, or give the folder of a copy"
        ) from error


def _channels_first(images: Images) -> UInt8[Tensor, "n 3 rows columns"]:
    return rearrange(torch.from_numpy(images), "n rows columns c -> n c rows columns")


def _in_batches(call: Callable[..., Tensor], batch_size: int) -> Callable[..., Tensor]:
    """The vectors of any number of inputs, batch by batch, without gradients, in float32 on the CPU."""

    @torch.no_grad()
    def run(*inputs: Images | Sequence[str]) -> Tensor:
        count = len(inputs[0])
        if not count or any(len(part) != count for part in inputs):
            counts = " and ".join(str(len(part)) for part in inputs)
            raise ValueError(f"got {counts} images or texts; expected one at least, and as many of each")
        for images in (part for part in inputs if isinstance(part, np.ndarray)):
            if images.dtype != np.uint8 or images.ndim != 4:
                raise ValueError(f"expected uint8 images (n, rows, columns, 3), got {images.dtype} {images.shape}")
        batches = (slice(start, start + batch_size) for start in range(0, count, batch_size))
        return torch.cat([call(*(part[batch] for part in inputs)).float().cpu() for batch in batches])

    return run
