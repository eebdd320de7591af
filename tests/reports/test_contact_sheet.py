"""The page of a folder of images: every image of the manifest, by its prompt, none of them inside the file."""

import re

from arcflow.reports import contact_sheet
from arcflow.reports.contact_sheet import write_sheet


def record(prompt: str, seed: int, **more: object) -> dict[str, object]:
    file = f"{re.sub('[^a-z]+', '-', prompt)}-{seed}.png"
    return {"file": file, "prompt": prompt, "seed": seed, "steps": 2, "height": 64, "width": 32, "adapter": "a", **more}


def test_images_stand_by_their_prompt_and_lie_beside_the_page(tmp_path) -> None:
    records = [record("a <red> ring", 0), record("a square", 0, adapter="none"), record("a <red> ring", 1)]
    page = write_sheet(tmp_path, records).read_text("utf-8")
    assert page.count("<figure") == 2 and page.count("<img") == 3 and "data:" not in page
    assert "a &lt;red&gt; ring" in page and "3 images of 2 prompts" in page and "32 &times; 64, teacher" in page
    assert all(f'href="{one["file"]}"' in page for one in records)


def test_of_very_many_the_last_are_shown_and_the_rest_counted(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(contact_sheet, "MOST", 3)
    page = write_sheet(tmp_path, [record("x", seed) for seed in range(5)]).read_text("utf-8")
    assert (
        page.count("<img") == 3 and "first 2 are in the folder" in page and "seed 4" in page and "seed 1," not in page
    )
