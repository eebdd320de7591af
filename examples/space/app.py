"""The page as a Hugging Face Space: images as you type, four seeds, and the teacher against the student.

    pip install 'arcflow[serve]' gradio && python app.py

MODEL and ADAPTER in the Space's settings name another model than the shipped small one.
"""

import os
from collections.abc import Iterator

import gradio as gr  # pyright: ignore[reportMissingImports]
import numpy as np

from arcflow.serving.engine import Engine, WaitingImage
from arcflow.serving.order import Drawn, Order, Piece
from arcflow.serving.studio import TEACHER, Studio, StudioSetup

SEEDS = 4
MODEL, ADAPTER = (os.environ.get(name, "world") for name in ("MODEL", "ADAPTER"))
EXAMPLES = ["a red ring left of a square", "three green squares", "a yellow triangle above a blue ring"]

engine = Engine(lambda: Studio(StudioSetup(model=MODEL, adapters={"student": ADAPTER})))
engine.start()
offer = engine.ready()


def draw(prompt: str, seeds: list[int], steps: int, model: str) -> list[Drawn]:
    """Images of one prompt; the engine draws together what is asked for at the same moment."""
    order = Order(
        height=offer.height, width=offer.width, steps=steps, model=model, guidance=offer.guidance[offer.models[0]]
    )
    jobs = [WaitingImage(order, Piece(prompt=prompt, seed=seed)) for seed in seeds]
    engine.submit(jobs)
    try:
        return [job.future.result() for job in jobs]
    finally:
        engine.leave(jobs)


def told(drawn: Drawn) -> str:
    """What an image took."""
    return f"{1000 * sum(drawn.seconds.values()) / drawn.batch:.0f} ms, {drawn.calls} calls"


def typed(prompt: str, seed: float, steps: int) -> tuple[list[tuple[np.ndarray, str]], str]:
    """Four images, and what one took."""
    if not prompt.strip():
        return [], ""
    seeds = [int(seed) + i for i in range(SEEDS)]
    pictures = draw(prompt, seeds, steps, offer.models[0])
    return [(p.image, f"seed {s}") for s, p in zip(seeds, pictures, strict=True)], told(pictures[0])


def against(prompt: str, seed: float, steps: int) -> Iterator[tuple[tuple[np.ndarray, np.ndarray] | None, str]]:
    """The same noise by both, the teacher on the left."""
    yield None, "the teacher draws the same noise"
    (teacher,) = draw(prompt, [int(seed)], offer.steps[TEACHER], TEACHER)
    (student,) = draw(prompt, [int(seed)], steps, offer.models[0])
    yield (teacher.image, student.image), f"teacher {told(teacher)} - student {told(student)}"


with gr.Blocks(title="arcflow") as page:
    gr.Markdown("# arcflow\nPictures in two steps, drawn as you type.")
    prompt = gr.Textbox(EXAMPLES[0], label="Prompt", autofocus=True)
    with gr.Row():
        seed = gr.Number(0, label="Seed of the first", precision=0, minimum=0)
        steps = gr.Slider(1, 8, offer.steps[offer.models[0]], step=1, label="Steps")
    cost = gr.Markdown()
    pictures = gr.Gallery(columns=SEEDS, label="Four seeds", format="png")
    button, both = gr.Button("Teacher against student"), gr.ImageSlider(label="teacher | student", format="png")
    wanted = [prompt, seed, steps]
    for change in (page.load, prompt.input, seed.input, steps.input):
        change(typed, wanted, [pictures, cost], trigger_mode="always_last", show_progress="hidden")
    button.click(against, wanted, [both, cost])
    gr.Examples(EXAMPLES, prompt, [pictures, cost], lambda words: typed(words, 0, 2), run_on_click=True)

if __name__ == "__main__":
    page.launch()
