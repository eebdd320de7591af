"""Small files in the benchmarks' own formats: prompts, and what their scorers answer."""

import csv
import json
from dataclasses import fields
from pathlib import Path

from arcflow.evaluation.request import Request
from arcflow.sampling.options import Drawing, Machine, ModelAndAdapter

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "cube", "count": 1}], "prompt": "a photo of a cube"},
    {"tag": "colors", "include": [{"class": "ball", "count": 1, "color": "red"}], "prompt": "a photo of a red ball"},
    {"tag": "colors", "include": [{"class": "ball", "count": 1, "color": "blue"}], "prompt": "a photo of a blue ball"},
]


def request(**options) -> Request:
    """What is asked of a suite, each option in its group."""
    groups = {}
    for name, kind in (("subject", ModelAndAdapter), ("drawing", Drawing), ("machine", Machine)):
        named = [one.name for one in fields(kind) if one.name in options]
        groups[name] = kind(**{option: options.pop(option) for option in named})
    return Request(**options, **groups)


def table(path: Path, columns: list[str], *rows: list[str]) -> Path:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([columns, *rows])
    return path


def prompt_file(name: str, folder: Path) -> Path:
    """A prompt file in the benchmark's own format, but with few prompts."""
    if name == "geneval":
        path = folder / "evaluation_metadata.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in GENEVAL))
    elif name == "dpg":
        columns = ["item_id", "text", "keywords", "proposition_id", "dependency", "category_broad"]
        rows = [["whoops1", "two green balls", "", str(i), "0", "entity"] for i in (1, 2)]
        path = table(folder / "dpg_bench.csv", columns, *rows, ["coco12", "a red cube", "", "1", "0", "entity"])
    elif name == "oneig":
        rows = [
            ["Portrait", "000", "a man", "P"],
            ["Portrait", "001", "a king", "P"],
            ["General_Object", "000", "a", ""],
        ]
        path = table(folder / "OneIG-Bench.csv", ["category", "id", "prompt_en", "type"], *rows)
    elif name == "coco":
        notes = [(9, 7, "second of seven"), (3, 7, " a red cube\n"), (4, 2, "a blue ball")]
        path = folder / "captions_val2014.json"
        path.write_text(
            json.dumps({"annotations": [{"id": i, "image_id": image, "caption": text} for i, image, text in notes]})
        )
    else:
        path = folder / "benchmark"
        path.mkdir()
        for style in ("anime", "concept-art", "paintings", "photo"):
            (path / f"{style}.json").write_text(json.dumps([f"{style} of a cube", f"{style} of a ball"]))
    return path


def answers_file(name: str, folder: Path) -> Path:
    """What the benchmark's own scorer writes about some of these prompts, for the model "mine"."""
    path = folder / f"{name}-answers"
    if name == "geneval":
        path.write_text(json.dumps({"filename": "x/00001/samples/0000.png", "correct": True}) + "\n")
    elif name == "dpg":
        path.write_text("/x/coco12.png, 1.0, 0.5, 0.5, 1.0, 0.75\n")
    else:
        path = table(folder / "answers.csv", ["", "other", "mine"], ["human_000", "1", "0.5"])
    return path
