"""`arcflow sample`: prompts to PNG files."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import OmitArgPrefixes, UseAppendAction

from arcflow.sampling.open import SHIPPED, check_drawing, settle
from arcflow.sampling.options import Drawing, Machine, Subject, unset

if TYPE_CHECKING:
    from arcflow.data.prompts import Row
    from arcflow.sampling.folder import Recipe
    from arcflow.sampling.open import Setup


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Turn prompts into PNG files in a few steps. What the folder's manifest lists already is not drawn again."""

    prompt: UseAppendAction[tuple[str, ...]] = ()
    """A prompt; may be given several times."""
    prompts: Annotated[Path | None, unset("FILE")] = None
    """File of prompts: .txt, one a line, or .jsonl, .csv, .tsv or .parquet with a column "prompt", and "height" and
    "width" if the images have sizes of their own."""
    seed: UseAppendAction[tuple[int, ...]] = ()
    """Seed of the noise, by default 0; may be given several times, every prompt is drawn with each of them."""
    out: Path = Path("out/samples")
    """Folder for the images and manifest.jsonl."""
    subject: Annotated[Subject, OmitArgPrefixes] = Subject()
    drawing: Annotated[Drawing, OmitArgPrefixes] = Drawing()
    machine: Annotated[Machine, OmitArgPrefixes] = Machine()

    def run(self) -> None:
        from contextlib import nullcontext

        check_drawing(steps=self.drawing.steps, batch=self.machine.batch, seeds=self.seed)
        rows = self._rows()
        setup = settle(self.subject, self.drawing, self.machine)
        recipes = self._recipes(setup, rows)
        from arcflow.sampling.folder import sample_folder, share_of_work, to_draw
        from arcflow.sampling.generate import euler
        from arcflow.system.owner import owned_share

        share, new = share_of_work(), list[Path]()
        if to_draw(recipes, self.out, share):
            with owned_share(self.out, share, "draws"):
                pipe = setup.open()
                with nullcontext() if setup.adapter else euler(pipe):
                    new = sample_folder(pipe, recipes, self.out, batch_size=self.machine.batch, share=share)
        for path in new:
            print(path)
        wanted = len(set(recipes))
        print(f"new images: {len(new)}; in {self.out}: {wanted - len(to_draw(recipes, self.out))} of {wanted}")

    def _rows(self) -> "list[Row]":
        """The prompts, and the sizes that their file has for them."""
        from arcflow.data.prompts import Row, read_prompts

        rows = [Row(text) for text in self.prompt]
        if self.prompts:
            listed, message = read_prompts(self.prompts)
            rows += listed
            if message:
                print(message, file=sys.stderr)
        if not rows:
            raise ValueError("no prompt given; add --prompt TEXT (several times if you like) or --prompts FILE")
        if self.subject.model == SHIPPED:
            _warn_of_strangers([row.text for row in rows])
        return rows

    def _recipes(self, setup: "Setup", rows: "list[Row]") -> "list[Recipe]":
        """Every prompt with every seed; a size on the command line goes before the list's."""
        told = self.drawing.height or self.drawing.width
        sizes = [row.size if row.size and not told else (setup.height, setup.width) for row in rows]
        for height, width in dict.fromkeys(sizes):
            setup.check_size(height, width)
        return [
            setup.recipe(row.text, seed, height=height, width=width)
            for row, (height, width) in zip(rows, sizes, strict=True)
            for seed in self.seed or (0,)
        ]


def _warn_of_strangers(prompts: list[str]) -> None:
    """Say which prompts the shipped small model has never read the like of."""
    from arcflow.world.scene import parse

    strange = []
    for prompt in prompts:
        try:
            parse(prompt)
        except ValueError:
            strange.append(prompt)
    if strange:
        print(
            f"{len(strange)} of {len(prompts)} prompts are no captions of the small world, {strange[0]!r} first; "
            f'it draws something for them all the same. One that is: "a red ring left of a blue square on white"',
            file=sys.stderr,
        )
