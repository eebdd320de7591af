"""Copies what the package shares with its integrations, which cannot install the package, into each of them.

    python integrations/copy_portable.py

ComfyUI's nodes get `arcflow.portable`, the plugins of engines the scheduler of merged folders, which holds it. A test
holds the copies equal to what is written here.
"""

from pathlib import Path

from arcflow.student.merged import SCHEDULING, scheduler_code

HERE = Path(__file__).parent

ORIGINAL = HERE.parent / "src" / "arcflow" / "portable.py"

ENGINES = {"vllm_omni": "arcflow_vllm_omni", "sglang": "arcflow_sglang"}
"""Folder of a plugin -> its package."""


def copies() -> dict[Path, str]:
    """What stands where."""
    schedulers = {HERE / folder / package / f"{SCHEDULING}.py": scheduler_code() for folder, package in ENGINES.items()}
    return {HERE / "comfyui" / "portable.py": ORIGINAL.read_text("utf-8"), **schedulers}


def main() -> None:
    """Write every copy."""
    for path, text in copies().items():
        path.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
