"""OneIG-Bench (arXiv 2506.07977): its prompts, the folder its scorer reads, the answers it writes."""

import csv
from collections.abc import Sequence
from pathlib import Path

from arcflow.evaluation.suites.layouts import grid, write_once
from arcflow.evaluation.suites.suite import Item, Suite, read_table


def oneig_layout(item: Item, images: Sequence[Path], root: Path, model: str) -> None:
    """<class>/<model>/<id>.webp, four images in two rows."""
    folder, name = item.id.split("/")
    path = root / folder / model / f"{name}.webp"
    write_once(path, lambda draft: grid(images).save(draft, "WEBP"), of=images)


def oneig_answers(path: Path, items: Sequence[Item], model: str) -> dict[str, float]:
    """The score of each prompt, from a results file `alignment_prompt_score_*.csv` or `diversity_prompt_score_*.csv`:
    one row for each prompt, one column for each model."""
    ids = {item.id.replace("/", "_"): item.id for item in items}
    with path.open(newline="", encoding="utf-8-sig") as stream:
        header, *rows = list(csv.reader(stream)) or [[]]
    if model not in header[1:]:
        raise ValueError(f"it has the models {header[1:]} and not {model!r}; give one of them with --name")
    column = header.index(model)
    found = {}
    for row in rows:
        if row[0] not in ids:
            raise ValueError(f"its row {row[0]!r} is about no prompt of this suite")
        if row[column]:
            found[ids[row[0]]] = float(row[column])
    return found


ONEIG_CLASSES = {
    "Anime_Stylization": "anime",
    "Portrait": "human",
    "General_Object": "object",
    "Text_Rendering": "text",
    "Knowledge_Reasoning": "reasoning",
    "Multilingualism": "multilingualism",
}
"""Categories, and the folders of their images."""


def _oneig(path: Path) -> list[Item]:
    rows = read_table(path, "category", "id")
    column = next((name for name in ("prompt_en", "prompt_cn") if name in rows[0]), None) if rows else None
    if column is None:
        raise ValueError("no column 'prompt_en' or 'prompt_cn'")
    return [
        Item(i, f"{ONEIG_CLASSES.get(row['category'], 'unknown')}/{row['id']}", row[column], row["category"])
        for i, row in enumerate(rows)
    ]


_ONEIG = dict(zip([*ONEIG_CLASSES][:5], (245, 244, 206, 200, 225), strict=True))

ONEIG = Suite(
    name="oneig",
    paper="arXiv 2506.07977",
    file="OneIG-Bench.csv or OneIG-Bench-ZH.csv",
    source="github.com/OneIG-Bench/OneIG-Benchmark",
    counts=(_ONEIG, {**_ONEIG, "Multilingualism": 200}),
    images=4,
    read=_oneig,
    layout=oneig_layout,
    answers=oneig_answers,
)
