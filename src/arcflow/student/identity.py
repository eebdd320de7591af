"""What an adapter is, whatever path it lies at: digests of its files, as folders of images keep them."""

from pathlib import Path

from arcflow.student.adapter import found_at
from arcflow.student.record import FREE, record_content
from arcflow.system import files, hub


def adapter_digest(adapter: str) -> str:
    """Tells adapters apart by their tensors and by what their records say about them; empty for none."""
    if not adapter:
        return ""
    found = found_at(adapter)
    told = {name: value for name, value in record_content(found.info).items() if name not in FREE}
    return files.text_digest([hub.content_of(found.weights), told], 16)


def tensors_digest(adapter: str) -> str:
    """Tells adapters apart by their tensors alone, as `suite.json` does; empty for none."""
    if not adapter:
        return ""
    folder = Path(adapter)
    stored = sorted(folder.glob("*.safetensors")) if folder.is_dir() else [found_at(adapter).weights]
    return "-".join(hub.content_of(path)[:16] for path in stored)
