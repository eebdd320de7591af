"""Lists of captions: COCO (arXiv 1405.0312) and HPSv2 (arXiv 2306.09341)."""

from collections.abc import Sequence
from pathlib import Path

from arcflow.evaluation.suites.layouts import link, write_once
from arcflow.evaluation.suites.suite import Item, Suite, read_json, read_records


def hpsv2_layout(item: Item, images: Sequence[Path], root: Path, model: str) -> None:
    """<style>/<00000>.jpg, the first image of each prompt."""
    from PIL import Image  # not at the top: the command line lists suites, and does not wait for it

    write_once(
        root / f"{item.id}.jpg",
        lambda draft: Image.open(images[0]).convert("RGB").save(draft, "JPEG"),
        of=images[:1],
    )


def flat_layout(item: Item, images: Sequence[Path], root: Path, model: str) -> None:
    """<id>.png, the first image of each prompt: a folder that any program for Frechet distances reads."""
    link(images[0], root / f"{item.id}.png")


COCO_COUNT = 10_000


def _coco(path: Path) -> list[Item]:
    """Lines with a prompt each, or COCO's own annotations: of each image the caption of the lowest id, the images by
    their ids, the first 10 000."""
    if path.suffix == ".jsonl":
        records = read_records(path)
        return [
            Item(i, str(record.get("id", f"{i:05d}")), record["prompt"] if "prompt" in record else record["caption"])
            for i, record in enumerate(records)
        ]
    captions: dict[int, str] = {}
    for note in sorted(read_json(path)["annotations"], key=lambda note: note["id"]):
        captions.setdefault(note["image_id"], note["caption"].strip())
    return [Item(i, f"{image:012d}", captions[image]) for i, image in enumerate(sorted(captions)[:COCO_COUNT])]


HPSV2_STYLES = ("anime", "concept-art", "paintings", "photo")


def _hpsv2(path: Path) -> list[Item]:
    lists = {style: read_json(path / f"{style}.json") for style in HPSV2_STYLES}
    named = [(style, i, text) for style, texts in lists.items() for i, text in enumerate(texts)]
    return [Item(number, f"{style}/{i:05d}", text, style) for number, (style, i, text) in enumerate(named)]


COCO = Suite(
    name="coco",
    paper="arXiv 1405.0312",
    file="annotations/captions_val2014.json, or lines of JSON with a prompt each (.jsonl)",
    source="cocodataset.org",
    counts=({"": COCO_COUNT},),
    read=_coco,
    layout=flat_layout,
)

HPSV2 = Suite(
    name="hpsv2",
    paper="arXiv 2306.09341",
    file=f"a folder with {', '.join(f'{style}.json' for style in HPSV2_STYLES)}",
    source="huggingface.co/datasets/zhwang/HPDv2 (benchmark)",
    counts=(dict.fromkeys(HPSV2_STYLES, 800),),
    read=_hpsv2,
    layout=hpsv2_layout,
)
