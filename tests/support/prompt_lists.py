"""Lists of prompts on disk."""

import json

from PIL import Image

from arcflow.config import Data


def with_images(folder, count=4):
    """A list of prompts with an image each, of one color."""
    for i in range(count):
        Image.new("RGB", (8 + i, 20), (i, 0, 0)).save(folder / f"{i}.png")
    lines = [json.dumps({"prompt": f"prompt {i}", "image": f"{i}.png"}) for i in range(count)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return Data(prompts=str(folder / "prompts.jsonl"), images=True, held_out_count=1)
