"""A real server of ComfyUI on the CPU, a workflow posted to it over HTTP, and its picture held against ours.

    python integrations/comfyui/tests/serve.py [--keep FOLDER]

The shipped adapter draws on the small world's teacher: `main.py --cpu` loads the nodes of this package as any custom
nodes, KSampler (euler, simple, 2 steps) samples, SaveImage writes. The same prompt and seed go through the stock
pipeline of diffusers with `arcflow.attach`. The picture is then redrawn from half the noise, and a sampler that would
draw noise has to be refused by name.
"""

import argparse
import io
import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import host

HERE = Path(__file__).parent

PROMPT = "a large red cube left of a small blue ball"

SEED = 7

STARTS = 300
"""Seconds that the server may take to answer."""


def child(folder: Path, arguments: list[str]) -> None:
    """ComfyUI's own main.py, in this process."""
    sys.path[:0] = [str(HERE), str(host.ROOT)]
    import tests.support.pipelines  # noqa: F401  # before ComfyUI's own folder `tests` is in reach

    host.prepare(folder)
    sys.argv = [str(folder / "main.py"), *arguments]
    os.chdir(folder)
    runpy.run_path(str(folder / "main.py"), run_name="__main__")


def asked(address: str, body: Any = None) -> bytes:
    """What the server answers."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


def workflow(adapter: str, **changes: Any) -> dict[str, Any]:
    """A workflow in the form of the API, by stock nodes but for the model, the prompt and the decoder."""
    sampler = {
        "model": ["apply", 0],
        "seed": SEED,
        "steps": 2,
        "cfg": 1.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "positive": ["text", 0],
        "negative": ["none", 0],
        "latent_image": ["base", 1],
        "denoise": 1.0,
    }
    return {
        "base": {"class_type": "ArcFlowTestModel", "inputs": {}},
        "apply": {
            "class_type": "ArcFlowApply",
            "inputs": {"model": ["base", 0], "adapter": adapter, "strength": 1.0},
        },
        "text": {"class_type": "ArcFlowTestText", "inputs": {"text": PROMPT}},
        "none": {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["text", 0]}},
        "draw": {"class_type": "KSampler", "inputs": sampler | changes},
        "decode": {"class_type": "ArcFlowTestDecode", "inputs": {"samples": ["draw", 0]}},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": "arcflow"}},
    }


def drawn(address: str, graph: dict[str, Any]) -> Any:
    """The picture that a workflow makes, as an array."""
    import numpy as np
    from PIL import Image

    key = json.loads(asked(f"{address}/prompt", {"prompt": graph}))["prompt_id"]
    for _ in range(600):
        history = json.loads(asked(f"{address}/history/{key}")).get(key)
        if history and history["status"]["status_str"] == "error":
            raise RuntimeError(json.dumps(history["status"]["messages"][-1])[:2000])
        if history and history["outputs"]:
            (picture,) = history["outputs"]["save"]["images"]
            shown = asked(f"{address}/view?{urllib.parse.urlencode(picture)}")
            return np.asarray(Image.open(io.BytesIO(shown)).convert("RGB"))
        time.sleep(0.2)
    raise TimeoutError("the server did not draw")


def ours() -> Any:
    """The same picture by diffusers and this project."""
    import numpy as np
    import torch

    import arcflow
    from arcflow.sampling.open import adapter_of, open_pipe

    pipe = open_pipe("world", "cpu", "float32")
    arcflow.attach(pipe, adapter_of("world", "world"))
    draws = torch.Generator("cpu").manual_seed(SEED)
    length = pipe.tokenizer_2.model_max_length
    more = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 3.5, "max_sequence_length": length}
    return np.asarray(pipe(PROMPT, generator=draws, **more).images[0])


def main() -> None:
    """Start, draw, compare, stop."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, help="folder for the pictures")
    keep = parser.parse_args().keep
    folder = host.folder()
    if folder is None:
        sys.exit("no ComfyUI: name its folder in COMFYUI_PATH, or make one: python integrations/comfyui/tests/get.py")
    with tempfile.TemporaryDirectory() as home:
        result = tried(folder.resolve(), Path(home), keep)
    print(json.dumps(result, indent=2))


def tried(folder: Path, home: Path, keep: Path | None = None) -> dict[str, Any]:
    """Greatest difference of the picture in steps of 1/255, and what the server said of itself."""
    from arcflow.sampling.open import adapter_of

    shutil.copytree(HERE.parent, home / "custom_nodes" / "arcflow-nodes", ignore=shutil.ignore_patterns("tests"))
    shutil.copytree(HERE / "world_nodes", home / "custom_nodes" / "world_nodes")
    (home / "models" / "loras").mkdir(parents=True)
    (home / "front").mkdir()
    (home / "front" / "index.html").write_text("")
    shutil.copyfile(
        Path(adapter_of("world", "world")) / "adapter.safetensors", home / "models/loras/adapter.safetensors"
    )
    shutil.copyfile(Path(adapter_of("world", "world")) / "arcflow.json", home / "models/loras/arcflow.json")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--cpu", "--base-directory", str(home), "--port", str(port), "--disable-auto-launch"]
    arguments += ["--front-end-root", str(home / "front"), "--disable-api-nodes", "--dont-print-server"]
    command = [sys.executable, str(HERE / "serve.py"), "--child", str(folder), *arguments]
    with open(home / "server.log", "w") as log:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{host.ROOT / 'src'}{os.pathsep}{host.ROOT}"}
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
    try:
        return compared(server, f"http://127.0.0.1:{port}", home, keep)
    except Exception:
        print((home / "server.log").read_text()[-4000:], file=sys.stderr)
        raise
    finally:
        server.terminate()
        server.wait(30)


def compared(server: subprocess.Popen, address: str, home: Path, keep: Path | None) -> dict[str, Any]:
    """What `tried` gives."""
    import numpy as np
    from PIL import Image

    began = time.monotonic()
    while True:
        try:
            version = json.loads(asked(f"{address}/system_stats"))["system"].get("comfyui_version")
            break
        except (urllib.error.URLError, ConnectionError):
            if server.poll() is not None or time.monotonic() - began > STARTS:
                raise RuntimeError("the server did not start") from None
            time.sleep(0.5)
    started = time.monotonic() - began
    known = json.loads(asked(f"{address}/object_info/ArcFlowApply"))
    assert "adapter.safetensors" in json.dumps(known), known
    pictures = {"text": drawn(address, workflow("adapter.safetensors"))}
    again = workflow("adapter.safetensors", latent_image=["draw", 0], denoise=0.5, seed=SEED + 1)
    again |= {"draw": workflow("adapter.safetensors")["draw"], "redraw": again["draw"]}
    again["decode"]["inputs"]["samples"] = ["redraw", 0]
    pictures["image-to-image"] = drawn(address, again)
    try:
        drawn(address, workflow("adapter.safetensors", sampler_name="lcm"))
        refused = ""
    except RuntimeError as error:
        refused = str(error)
    assert "the sampler 'lcm' does not take the steps" in refused, refused
    expected = ours()
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        for name, picture in (pictures | {"diffusers": expected}).items():
            Image.fromarray(picture).save(keep / f"{name}.png")
    apart = int(np.abs(pictures["text"].astype(int) - expected.astype(int)).max())
    moved = float(np.abs(pictures["image-to-image"].astype(int) - expected.astype(int)).mean())
    assert apart <= 1, f"{apart} of 255 apart"
    assert moved > 0, "the redrawn picture is the same"
    return {
        "comfyui": version,
        "seconds_to_start": round(started, 1),
        "greatest_difference_of_255": apart,
        "pixels_that_differ": float((pictures["text"] != expected).mean()),
        "image_to_image_mean_difference_of_255": round(moved, 3),
        "lcm": "refused",
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
