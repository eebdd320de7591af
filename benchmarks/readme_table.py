"""Numbers into the README, from results.json only.

    python -m benchmarks.readme_table shipped out/evaluate [--picture]     after `arcflow evaluate --count 1024`
    python -m benchmarks.readme_table demo out/demo                        after `make demo`

Keeps a copy of results.json in benchmarks/results/, from which the tests check that the README says the same, and with
`--picture` the folder's path.png as docs/path.png.
"""

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
STORE = Path(__file__).parent / "results"
TITLES = {"teacher": "teacher", "euler": "plain Euler", "arcflow": "**ArcFlow**"}
PICTURE = "![The teacher's curved path, the chords of plain Euler and the student's arcs](docs/path.png)"


def table(results: dict[str, Any]) -> str:
    """The results as Markdown, with what made them."""
    rows = {name: row for name, row in results.items() if name != "about"}
    worst = {
        name: min(share for skill, share in row["accuracy"].items() if skill != "overall") for name, row in rows.items()
    }
    lines = [
        "| | calls | distance | accuracy | weakest skill | transformer, ms per image | all, ms per image |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {TITLES[name.split('_')[0]]} | {row['nfe']} | {row['mse_to_teacher']:.4f} | "
            f"{row['accuracy']['overall']:.1%} | {worst[name]:.1%} | {1e3 * row['seconds']['transformer']:.1f} | "
            f"{1e3 * row['seconds_per_image']:.1f} |"
        )
    about, first = results["about"], rows["teacher_50"]
    images = first["prompts"] * first["seeds"]
    made = f"`{about['command']}`, {images} images, {about['threads']} threads on {about['device']}"
    return "\n".join([*lines, "", f"Made by {made}, torch {about['versions']['torch']}."])


def put(text: str, name: str, content: str) -> str:
    """The text with what stands between two markers replaced."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"no marker <!-- {name} --> in the README; put one where the content belongs")
    return pattern.sub(lambda match: match[1] + content + "\n" + match[2], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("name", choices=("shipped", "demo"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--picture", action="store_true")
    options = parser.parse_args()
    STORE.mkdir(exist_ok=True)
    stored = shutil.copyfile(options.folder / "results.json", STORE / f"{options.name}.json")
    readme = ROOT / "README.md"
    text = put(readme.read_text("utf-8"), f"results:{options.name}", table(json.loads(stored.read_text("utf-8"))))
    if options.picture:
        shutil.copyfile(options.folder / "path.png", ROOT / "docs" / "path.png")
        text = put(text, "picture", PICTURE)
    readme.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
