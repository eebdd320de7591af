"""Recipes of the large models, one row each: base, size, guidance, and why.

All take the project's own objective, for the forward passes that were published for Qwen-Image (arXiv 2602.09014), but
for what a row says. The rules behind the rows:

* A teacher that guides by a second call is guided while it is asked, at the scale its authors advise (`teacher_cfg`):
  the student then makes one call a step. Z-Image and Krea 2 count that scale from 0, so it is one more here.
* Such a teacher takes twice the calls, as Qwen-Image's does: `paper.QWEN_ITERATIONS` are those of the published adapter
  that was trained so, which `in_place_of` turns into ours.
* Two steps at shift 3.2 are the published grid, for images. Videos have many times the tokens, and noise hides less of
  what many tokens share: their makers sample with shift 5 and more, and so do their students.
* No row was trained at full size here: what is measured is each family's tiny model (docs/families.md).
"""

from collections.abc import Callable
from dataclasses import dataclass

from arcflow import paper
from arcflow.config import Data, Distill, Model, Optim, Run, Sources
from arcflow.recipes.objective import in_place_of


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """What differs from model to model."""

    base: str
    """Hub id of the teacher."""
    teacher_cfg: float
    """Guidance of the teacher by a second call; the usual scale, 1 is off."""
    why: str
    """Reasons for what is not the rule."""
    shift: float = paper.SHIFT
    height: int = 1024
    width: int = 1024
    frames: int = 1
    guidance: float = paper.GUIDANCE
    """The guidance that the network embeds, where it embeds one."""
    sources: Sources = "none"
    """Where an editing model has its images from."""
    micro_batch: int = 2
    checkpointing: bool = True


ROWS: dict[str, ModelRow] = {
    "flux2-klein": ModelRow(
        base="black-forest-labs/FLUX.2-klein-base-4B",
        teacher_cfg=4.0,
        why="The base, which is not distilled; 9B has another base and the same settings. 4.0 is its pipeline's own.",
        micro_batch=4,
    ),
    "z-image": ModelRow(
        base="Tongyi-MAI/Z-Image",
        teacher_cfg=5.0,
        why="Its pipeline's guidance_scale 4 is 5 here. Not Z-Image-Turbo, which is distilled already.",
    ),
    "krea2": ModelRow(
        base="krea/Krea-2-Raw",
        teacher_cfg=4.5,
        why="Raw is sampled in 52 steps at guidance_scale 3.5, which is 4.5 here; 12.9 billion weights.",
    ),
    "chroma": ModelRow(
        base="lodestones/Chroma1-HD",
        teacher_cfg=5.0,
        why="5.0 is its pipeline's own. Under gradient checkpointing diffusers leaves the text's mask out of some "
        "blocks, so that another network would learn than is drawn: it is off, and batches are small.",
        micro_batch=1,
        checkpointing=False,
    ),
    "sd35-medium": ModelRow(
        base="stabilityai/stable-diffusion-3.5-medium",
        teacher_cfg=4.5,
        why="4.5 is what its authors draw with; 7.0, the pipeline's own, is that of Stable Diffusion 3.",
        micro_batch=4,
    ),
    "sd35-large": ModelRow(
        base="stabilityai/stable-diffusion-3.5-large",
        teacher_cfg=3.5,
        why="3.5 is what its authors draw with.",
    ),
    "qwen-image-2512": ModelRow(
        base="Qwen/Qwen-Image-2512",
        teacher_cfg=paper.TRUE_GUIDANCE,
        why="As Qwen-Image, whose network it is.",
    ),
    "qwen-image-21": ModelRow(
        base="Qwen/Qwen-Image-2.1",
        teacher_cfg=4.0,
        why="Its pipeline draws without guidance; without it the student would learn that.",
    ),
    "longcat-image": ModelRow(
        base="meituan-longcat/LongCat-Image",
        teacher_cfg=4.5,
        why="4.5 is its pipeline's own, which then takes the norm back; here the norm stays.",
    ),
    "lumina2": ModelRow(
        base="Alpha-VLLM/Lumina-Image-2.0",
        teacher_cfg=4.0,
        why="4.0 is its pipeline's own, which then takes the norm back; here the norm stays.",
        micro_batch=4,
    ),
    "ovis-image": ModelRow(
        base="AIDC-AI/Ovis-Image-7B",
        teacher_cfg=5.0,
        why="5.0 is its pipeline's own.",
    ),
    "ernie-image": ModelRow(
        base="baidu/ERNIE-Image",
        teacher_cfg=4.0,
        why="4.0 is its pipeline's own. Prompts are read as they are written, without its prompt writer.",
    ),
    "flux-kontext": ModelRow(
        base="black-forest-labs/FLUX.1-Kontext-dev",
        teacher_cfg=1.0,
        guidance=2.5,
        why="2.5 is what its authors draw with; one call a step, as FLUX.1. The image to edit doubles the tokens.",
        sources="files",
        micro_batch=1,
    ),
    "qwen-image-edit": ModelRow(
        base="Qwen/Qwen-Image-Edit-2511",
        teacher_cfg=paper.TRUE_GUIDANCE,
        why="2509 has another base, Qwen/Qwen-Image-Edit-2509, and the same settings. Its text encoder sees the image "
        "to edit, with the empty instruction too.",
        sources="files",
        micro_batch=1,
    ),
    "wan21": ModelRow(
        base="Wan-AI/Wan2.1-T2V-14B-Diffusers",
        teacher_cfg=5.0,
        why="81 frames at 480 x 832 are 32760 tokens: one sample at a time. Shift 5 is its authors'.",
        shift=5.0,
        height=480,
        width=832,
        frames=81,
        micro_batch=1,
    ),
    "ltx": ModelRow(
        base="Lightricks/LTX-Video",
        teacher_cfg=3.0,
        why="161 frames at 512 x 704 are 7392 tokens, the pipeline's own size.",
        shift=5.0,
        height=512,
        width=704,
        frames=161,
        micro_batch=1,
    ),
}
"""By the names they have on the command line."""


def recipe(name: str) -> Callable[[], Run]:
    """A function that returns the run of a row."""
    row = ROWS[name]

    def make() -> Run:
        published = Run(
            out=f"runs/{name.replace('-', '_')}",
            eval_every=500,
            save_every=250,
            log_every=10,
            model=Model(base=row.base, dtype="bfloat16", gradient_checkpointing=row.checkpointing),
            distill=Distill(teacher_cfg=row.teacher_cfg, guidance=row.guidance, shift=row.shift),
            data=Data(
                prompts="prompts.txt" if row.sources == "none" else "edits.jsonl",
                sources=row.sources,
                held_out_count=16,
                height=row.height,
                width=row.width,
                frames=row.frames,
                cache=False,
            ),
            optim=Optim(iterations=paper.QWEN_ITERATIONS, batch=paper.BATCH, micro_batch=row.micro_batch),
        )
        return in_place_of(published)

    make.__doc__ = f"{row.base}. {row.why} Needs --data.prompts FILE and large GPUs."
    return make
