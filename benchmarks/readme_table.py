"""Numbers into the README, and into docs/world.md, from results.json only.

    python -m benchmarks.readme_table shipped out/evaluate [--image]       after `arcflow evaluate --count 1024`
    python -m benchmarks.readme_table one out/one                          the same with `--adapter world-one`
    python -m benchmarks.readme_table demo out/demo                        after `make demo`

Keeps a copy of results.json in benchmarks/results/, from which the tests check that the pages say the same, and with
`--image` the folder's path.png as docs/path.png.
"""

import argparse
import re
import shutil
from pathlib import Path

from arcflow.evaluation.results import Evaluation
from arcflow.reports.side_by_side import markdown_table
from arcflow.system import records

ROOT = Path(__file__).parent.parent
STORE = Path(__file__).parent / "results"

PAGES = {"shipped": "README.md", "one": "docs/world.md", "demo": "README.md"}
"""Which page has which table."""


def put(text: str, name: str, content: str) -> str:
    """The text with what stands between two markers replaced."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"no marker <!-- {name} --> in the page; put one where the content belongs")
    return pattern.sub(lambda match: match[1] + content + "\n" + match[2], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("name", choices=PAGES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--image", action="store_true")
    options = parser.parse_args()
    STORE.mkdir(exist_ok=True)
    stored = shutil.copyfile(options.folder / "results.json", STORE / f"{options.name}.json")
    page = ROOT / PAGES[options.name]
    table = markdown_table(records.read(Evaluation, Path(stored)))
    text = put(page.read_text("utf-8"), f"results:{options.name}", table)
    if options.image:
        shutil.copyfile(options.folder / "path.png", ROOT / "docs" / "path.png")
    page.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
