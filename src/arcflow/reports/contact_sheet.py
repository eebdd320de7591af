"""The page of a folder of images: what its manifests list, prompt by prompt, as `arcflow sample` leaves it.

The images are not in the file, for a folder may hold thousands: they lie beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arcflow.reports.page import write_page

INDEX = "index.html"

MOST = 2000
"""Images that a page shows at most."""


@dataclass(frozen=True)
class Group:
    """The images of a prompt."""

    prompt: str
    images: list[dict[str, Any]]
    """Their records in the manifest."""


def write_sheet(folder: Path, records: Sequence[dict[str, Any]]) -> Path:
    """Write index.html for the images that these records are of."""
    shown = records[-MOST:]
    groups = dict[str, list[dict[str, Any]]]()
    for record in shown:
        groups.setdefault(str(record.get("prompt", "")), []).append(record)
    return write_page(
        folder / INDEX,
        "contact_sheet.html",
        name=folder.resolve().name,
        count=len(records),
        left_out=len(records) - len(shown),
        groups=[Group(prompt, images) for prompt, images in groups.items()],
    )
