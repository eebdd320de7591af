"""The README's image: the shipped teacher in 50 calls above the shipped student in two, from the same noise.

    python -m benchmarks.readme_image            writes docs/teacher_student.png

The first eight held-out prompts of the small world, none picked. Each image is drawn by the stock pipeline.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import arcflow
from arcflow import paper
from arcflow.sampling.generate import generate
from arcflow.sampling.open import adapter_of, open_pipe
from arcflow.world.scene import FIRST_SEED, SIZE, held_out

COUNT = 8
ZOOM = 2
SPACE = 6
LABEL = 26


def main() -> None:
    prompts, seeds = held_out(COUNT), [FIRST_SEED + i for i in range(COUNT)]
    pipe = open_pipe("world", "auto", "auto")
    teacher = generate(pipe, prompts, seeds, steps=paper.TEACHER_STEPS, height=SIZE, width=SIZE)
    arcflow.attach(pipe, adapter_of("world", "world"))
    student = generate(pipe, prompts, seeds, steps=paper.STEPS, height=SIZE, width=SIZE)

    side = SIZE * ZOOM
    width = COUNT * (side + SPACE) - SPACE
    sheet = Image.new("RGB", (width, 2 * (side + LABEL)), "white")
    draw = ImageDraw.Draw(sheet)
    rows = ((f"teacher, {paper.TEACHER_STEPS} calls", teacher), (f"student, {paper.STEPS} calls", student))
    for row, (label, drawn) in enumerate(rows):
        top = row * (side + LABEL)
        draw.text((2, top + 4), label, fill="black", font=ImageFont.load_default(16))
        for column, image in enumerate(drawn.images):
            large = Image.fromarray(np.asarray(image)).resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(large, (column * (side + SPACE), top + LABEL))
    path = Path(__file__).parent.parent / "docs" / "teacher_student.png"
    sheet.save(path, optimize=True)
    for prompt in prompts:
        print(prompt)


if __name__ == "__main__":
    main()
