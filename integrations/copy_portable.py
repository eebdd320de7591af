"""Copies the file that the package shares with its integrations, which cannot install the package, into each of them.

    python integrations/copy_portable.py

A test holds the copies equal to `src/arcflow/portable.py`.
"""

from pathlib import Path

HERE = Path(__file__).parent

ORIGINAL = HERE.parent / "src" / "arcflow" / "portable.py"

COPIES = [HERE / "comfyui" / "portable.py"]


def main() -> None:
    """Write every copy."""
    for copy in COPIES:
        copy.write_bytes(ORIGINAL.read_bytes())


if __name__ == "__main__":
    main()
