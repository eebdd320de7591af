"""How a command opens a model and finds an adapter.

`settle` decides all that can be decided before weights are read: where the adapter is, what it wants, how the model is
fitted to the device, the size, and the digests that tell weights apart. `Setup.open` then loads.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from arcflow import config, paper
from arcflow.sampling.options import Drawing, Machine, ModelAndAdapter
from arcflow.system.text import Json

if TYPE_CHECKING:
    import diffusers
    import torch

    from arcflow.data.prompts import ListedPrompt
    from arcflow.families.family import Family
    from arcflow.families.fit import Chosen
    from arcflow.sampling.folder import Recipe
    from arcflow.student.record import AdapterInfo

SHIPPED = "world"
"""Name of what comes with the package: the small teacher, and its adapter."""

ADAPTERS = {SHIPPED: "adapter", "world-one": "adapter_one"}
"""Adapters that come with the package, for its teacher, and where: in two steps and in one. The recipes that made them
have these names."""

MOST_STEPS = 1000
"""The noise levels that the large models were trained on are that many."""

TEACHER_STEPS = paper.TEACHER_STEPS
"""Steps of a teacher, where nobody says how many."""


def adapter_of(model: str, adapter: str) -> str:
    """Where the adapter is; "" when the teacher itself is wanted."""
    if adapter == "none":
        return ""
    if adapter not in ADAPTERS:
        return adapter
    if model != SHIPPED:
        given = "no adapter given" if adapter == SHIPPED else f"{adapter} is an adapter of the shipped teacher, not one"
        raise ValueError(f"{given} for {model}; add --adapter FOLDER (or owner/name:subfolder, or none)")
    folder = Path(__file__).parents[1] / "assets" / ADAPTERS[adapter]
    if not folder.is_dir():
        raise ValueError(f"no adapter in {folder}; make one with `arcflow train {adapter}` and give --adapter FOLDER")
    return str(folder)


def open_pipe(model: str, device: str, dtype: str, lora: str | None = None) -> "diffusers.DiffusionPipeline":
    """The teacher's pipeline on its device; a LoRA may be part of it."""
    from arcflow.families.loading import load_pipe
    from arcflow.system.devices import torch_device

    settings = config.Model(base=model, dtype=dtype_of(device, dtype), teacher_lora=lora)
    return load_pipe(settings).to(torch_device(device))


def dtype_of(device: str, dtype: str) -> config.Dtype:
    """The precision that a command's --device and --dtype mean."""
    from arcflow.system.devices import torch_device

    if dtype == "auto":
        return "bfloat16" if torch_device(device).type == "cuda" else "float32"
    return dtype  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a command draws with, and how: settled, and nothing loaded yet."""

    subject: ModelAndAdapter
    adapter: str
    """Where the adapter is; "" for the teacher itself."""
    info: "AdapterInfo | None"
    lora: str | None
    """A LoRA that is part of the teacher."""
    family: "Family"
    pipeline: str
    """Class name of the pipeline."""
    token: int
    """Pixels along a side of a token."""
    steps: int
    height: int
    width: int
    frames: int
    sized: bool
    """Whether that size was asked for."""
    guidance: float | None
    negative_prompt: str | None
    true_cfg: float | None
    device: "torch.device"
    dtype: config.Dtype
    fit: "Chosen"
    fused: bool

    def base(self) -> "diffusers.DiffusionPipeline":
        """The pipeline without the adapter, on its device where all of it goes there; else it is put there (`fitted`)
        once the adapter is on."""
        from arcflow.families.fit import fitted, shortened
        from arcflow.families.loading import load_pipe

        model = config.Model(base=self.subject.model, dtype=self.dtype, teacher_lora=self.lora)
        pipe = load_pipe(shortened(model, self.fit, self.device))
        return fitted(pipe, self.fit, self.device) if self.fit == "card" else pipe

    def open(self) -> "diffusers.DiffusionPipeline":
        """The pipeline, on its device: the base, its LoRA, the adapter."""
        from arcflow.families.fit import fitted
        from arcflow.sampling.attach import attach

        pipe = self.base()
        if self.adapter:
            attach(pipe, self.adapter, fuse=self.fused, guidance=self.guided_twice)
        return pipe if self.fit == "card" else fitted(pipe, self.fit, self.device)

    @property
    def guided_twice(self) -> bool:
        """Whether a second call in each step is asked for."""
        return self.negative_prompt is not None or self.true_cfg is not None

    @property
    def quantize(self) -> str:
        """How the base's weights are stored, if shorter than their dtype."""
        return self.fit if self.fit in ("int8", "nf4") else "none"

    @cached_property
    def model_weights(self) -> str:
        """A digest of the pipeline."""
        from arcflow.families.identity import pipeline_digest

        return pipeline_digest(folder_of(self.subject.model))

    @cached_property
    def adapter_weights(self) -> str:
        """A digest of the adapter; empty for the teacher itself."""
        from arcflow.student.identity import adapter_digest

        return adapter_digest(self.adapter)

    @cached_property
    def lora_weights(self) -> str:
        """A digest of the teacher's LoRA, where that is here: of one on the Hub the name must do."""
        from arcflow.families.identity import lora_digest

        return lora_digest(self.lora)

    def recipe(
        self, prompt: str, seed: int, *, height: int, width: int, source: str = "", source_digest: str = ""
    ) -> "Recipe":
        """The recipe of one image; `source` is the file of the image to edit, with its digest."""
        from arcflow import __version__
        from arcflow.sampling.folder import Recipe

        return Recipe(
            prompt=prompt,
            seed=seed,
            height=height,
            width=width,
            frames=self.frames,
            version=__version__,
            fused=self.fused,
            model_weights=self.model_weights,
            adapter_weights=self.adapter_weights,
            source=source,
            source_digest=source_digest,
            **self.recorded,
        )

    def recipes(self, rows: "Sequence[ListedPrompt]", seeds: Sequence[int]) -> "list[Recipe]":
        """The recipes of every prompt with every seed; a size that was asked for goes before the rows' own, and what is
        edited is drawn at the size of its image.

        Raises:
            ValueError: a row's size does not fit the model; an image to edit cannot be read, or is not what this model
                draws from.
        """
        from arcflow.sampling.editing import check_editing, drawn_size
        from arcflow.system.files import digest

        for edits in {bool(row.source) for row in rows}:
            check_editing(self.subject.model, self.pipeline, self.family, asked=edits)
        lacking = [row.source for row in rows if row.source and not Path(row.source).is_file()]
        if lacking:
            raise ValueError(f"no image {lacking[0]!r} to edit: expected a file; check the path")

        # An image is read once, however many prompts and seeds it is edited by.
        drawn = cache(partial(drawn_size, token=self.token))

        def size(row: "ListedPrompt") -> tuple[int, int]:
            if self.sized or not (row.size or row.source):
                return self.height, self.width
            return row.size or drawn(row.source)

        sizes = list(map(size, rows))
        for height, width in dict.fromkeys(sizes):
            self.check_size(height, width)
        digests = {source: digest(Path(source))[:16] for source in {row.source for row in rows if row.source}}
        return [
            self.recipe(
                row.text,
                seed,
                height=height,
                width=width,
                source=row.source,
                source_digest=digests.get(row.source, ""),
            )
            for row, (height, width) in zip(rows, sizes, strict=True)
            for seed in seeds
        ]

    @property
    def recorded(self) -> Json:
        """What all images have in common, as recipes keep it."""
        return {
            "steps": self.steps,
            "guidance": self.guidance,
            "model": self.subject.model,
            "adapter": self.subject.adapter,
            "negative_prompt": self.negative_prompt,
            "true_cfg": self.true_cfg,
            "teacher_lora": self.lora,
            "dtype": self.dtype,
            "quantize": self.quantize,
            "lora_weights": self.lora_weights,
        }

    def check_size(self, height: int, width: int) -> None:
        """Refuse a size that the model's tokens do not fill."""
        check_side(self.token, height, width)


def settle(subject: ModelAndAdapter, drawing: Drawing, machine: Machine) -> Setup:
    """All that is asked for, completed by what the adapter and the model say; no weights are read.

    Raises:
        ValueError: the options do not go together, or with this model, adapter or device.
    """
    negative = [drawing.negative_prompt] if drawing.negative_prompt is not None else []
    check_drawing(steps=drawing.steps, batch=machine.batch, prompts=negative)
    for name, value in (("guidance", drawing.guidance), ("true-cfg", drawing.true_cfg)):
        fits = value is None or (math.isfinite(value) and value >= 0)
        config.check(fits, f"--{name}", value, "a number from 0 on", "leave it out for the model's own")
    if machine.fuse and machine.no_fuse:
        raise ValueError("--fuse and --no-fuse: expected one of them")
    from arcflow.families import fit
    from arcflow.student.adapter import read_info
    from arcflow.system.devices import torch_device

    device = torch_device(machine.device)
    fit.check_fit(machine.fit, device)
    adapter = adapter_of(subject.model, subject.adapter)
    info = read_info(adapter) if adapter else None
    lora = teacher_lora(subject.teacher_lora, info.teacher_lora if info else None, subject.adapter)
    configs = _configs_of(subject.model)
    index = _index_of(configs, subject.model)
    family, embeds = _family_of(configs, subject.model, index)
    if info and info.family != family.name:
        raise ValueError(
            f"{subject.adapter} is an adapter for the family {info.family!r}, and {subject.model} is of {family.name!r}"
            f": expected its own base{f', {info.base}' if info.base else ''}; give --model"
        )
    height, width = size_of(subject.model, drawing.height, drawing.width)
    token = token_of(configs)
    check_side(token, height, width)
    frames = _frames(drawing.frames, info, family, configs)
    short = fit.is_short(configs)
    if machine.fit in fit.SHORT and short:
        raise ValueError(
            f"--fit {machine.fit}: {subject.model} is quantized already: expected --fit card, offload or group"
        )
    if machine.fuse and (short or machine.fit in fit.SHORT):
        raise ValueError(
            "--fuse makes plain copies of weights that are quantized: expected one or the other; leave it out"
        )
    dtype = dtype_of(machine.device, machine.dtype)
    on_card = device.type == "cuda" and machine.fit in ("auto", "card")
    parts = fit.weighed(folder_of(subject.model), family, dtype) if on_card else fit.parts_of(family.name)
    chosen = fit.choose(machine.fit, device, parts, short=short)
    if machine.fuse and chosen in fit.SHORT:
        raise ValueError(
            f"--fuse: this card wants the model in {chosen}, which is not fused; leave it out, or say --fit"
        )
    free = chosen == "card" and not (short or lora or machine.no_fuse) and fit.room_to_fuse(parts, device)
    guidance, true_cfg = _guidance(subject, drawing, info, family, embeds)
    return Setup(
        subject=subject,
        adapter=adapter,
        info=info,
        lora=lora,
        family=family,
        pipeline=index.get("_class_name", family.pipeline),
        token=token,
        steps=drawing.steps or (info.steps if info else TEACHER_STEPS),
        height=height,
        width=width,
        frames=frames,
        sized=bool(drawing.height or drawing.width),
        guidance=guidance,
        negative_prompt=drawing.negative_prompt,
        true_cfg=true_cfg,
        device=device,
        dtype=dtype,
        fit=chosen,
        fused=bool(adapter) and (machine.fuse or free),
    )


def _frames(given: int | None, info: "AdapterInfo | None", family: "Family", folder: Path) -> int:
    """Frames to draw, completed by what the adapter was distilled on and what the model draws.

    Raises:
        ValueError: the model draws images, or its autoencoder makes no video of so many.
    """
    data = info.training.get("settings", {}).get("data", {}) if info else {}
    frames = given or (data.get("frames") if family.video else None) or family.frames
    if not family.video:
        config.check(frames == 1, "--frames", frames, f"1: {family.name} draws images", "leave it out")
        return frames
    vae = _config(folder, "vae")
    scaled = sum(map(bool, vae.get("spatio_temporal_scaling", (True, True))))
    each = vae.get("scale_factor_temporal", 2**scaled)
    fits = frames >= 1 and (frames - 1) % each == 0
    near = 1 + each * max(1, round((frames - 1) / each))
    config.check(fits, "--frames", frames, f"1 and a multiple of {each} more for this model", f"say {near}")
    return frames


def teacher_lora(given: str | None, wanted: str | None, adapter: str) -> str | None:
    """The teacher's LoRA, which the user must have named: what an adapter's record names is not fetched unasked.

    Raises:
        ValueError: the adapter wants one, and nobody has said anything about it.
    """
    if wanted and given is None:
        raise ValueError(
            f"{adapter} was distilled with the LoRA {wanted!r} on its teacher, which is taken from nowhere "
            f"unless you say so: expected --teacher-lora {wanted} (or where you have it), or --teacher-lora none"
        )
    return None if given == "none" else given


def _guidance(
    subject: ModelAndAdapter, drawing: Drawing, info: "AdapterInfo | None", family: "Family", embeds: bool
) -> tuple[float | None, float | None]:
    """(guidance, scale of a second call) as `generate` takes them.

    Raises:
        ValueError: this model has no use for what was given.
    """
    if drawing.negative_prompt is not None and not family.negative:
        raise ValueError(f"--negative-prompt: the pipelines of {family.name} take none; leave it out")
    if drawing.true_cfg is not None and not family.negative and embeds:
        raise ValueError(f"--true-cfg: {subject.model} guides by no second call; give --guidance")
    given, true_cfg = drawing.guidance, drawing.true_cfg
    by_second_call = family.guidance is None or not (embeds or family.negative)
    if by_second_call and given is not None and true_cfg is not None:
        raise ValueError(
            f"--guidance and --true-cfg are the same for {subject.model}, which embeds no guidance: expected one"
        )
    if by_second_call and given is not None and (info or drawing.negative_prompt is not None):
        given, true_cfg = None, given
    if drawing.negative_prompt is not None and true_cfg is not None and true_cfg <= family.off:
        raise ValueError(
            f"a negative prompt at scale {true_cfg:g} changes nothing: expected more than {family.off:g}, "
            f"say {family.scale:g}"
        )
    if given is None and info and embeds:
        given = info.guidance
    return given, true_cfg


def _configs_of(model: str) -> Path:
    """The folder of a pipeline with the configurations of its parts, if nothing else of it is here yet."""
    from arcflow.system import hub
    from arcflow.world.teacher import teacher_folder

    if model == SHIPPED:
        return teacher_folder()
    return Path(model) if Path(model).is_dir() else hub.fetch(model, ["*model_index.json", "*/config.json"])


def _index_of(folder: Path, model: str) -> Json:
    """What a pipeline's folder says of its parts.

    Raises:
        ValueError: it is no pipeline's, or that of modular blocks.
    """
    from arcflow.families.loading import check_modular
    from arcflow.system import hub

    check_modular(folder, model)
    with hub.explained(model):
        return json.loads((folder / "model_index.json").read_text("utf-8"))


def _family_of(folder: Path, model: str, index: Json) -> "tuple[Family, bool]":
    """The family of a pipeline's folder, by its index, and whether its transformer embeds guidance."""
    from arcflow.families import FAMILIES, UNCARRIED
    from arcflow.system import hub

    with hub.explained(model):
        inside = json.loads((folder / "transformer" / "config.json").read_text("utf-8"))
    _, name = index.get("transformer") or (None, None)
    family = next((family for family in FAMILIES if family.transformer == name), None)
    if family is None:
        known = ", ".join(family.transformer for family in FAMILIES)
        why = f", which cannot be carried ({UNCARRIED[name]})" if name in UNCARRIED else ""
        raise ValueError(f"{model} has a transformer {name!r}{why}: expected one of {known}")
    default = family.guidance is not None and name == "Flux2Transformer2DModel"
    return family, bool(inside.get("guidance_embeds", default))


def token_of(folder: Path) -> int:
    """Pixels along a side of a token, by the autoencoder of a pipeline's folder; 16 where it does not tell."""
    vae = _config(folder, "vae")
    if "scale_factor_spatial" in vae:
        return 2 * vae["scale_factor_spatial"]
    if "spatio_temporal_scaling" in vae:  # a token is one latent pixel there
        return vae.get("patch_size", 4) * 2 ** sum(map(bool, vae["spatio_temporal_scaling"]))
    if "temperal_downsample" in vae:  # so spelt in diffusers
        return 2 * 2 ** len(vae["temperal_downsample"])
    return 2 * 2 ** (len(vae["block_out_channels"]) - 1) if "block_out_channels" in vae else 16


def _config(folder: Path, part: str) -> Json:
    """The configuration of a part of a pipeline's folder; empty if there is none."""
    path = folder / part / "config.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def open_transformer(model: str, family: str) -> "diffusers.ModelMixin":
    """A base's transformer alone, on the CPU."""
    if model == SHIPPED:
        return open_pipe(model, "cpu", "float32").transformer
    import diffusers
    import torch

    from arcflow.families import family_named
    from arcflow.system.hub import explained

    row = family_named(family)
    with explained(model):
        return getattr(diffusers, row.transformer).from_pretrained(model, subfolder="transformer", dtype=torch.bfloat16)


def folder_of(model: str) -> Path:
    """The folder of a base's pipeline; of one on the Hub what diffusers loads of it is fetched, and not what else lies
    beside it (the whole model in one file, often)."""
    from arcflow.system import hub

    if model == SHIPPED or Path(model).is_dir():
        return _configs_of(model)
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    with hub.explained(model):
        return Path(DiffusionPipeline.download(model))


def size_of(model: str, height: int | None, width: int | None) -> tuple[int, int]:
    """Image size in pixels, completed by the model's own."""
    side = height or width or (64 if model == SHIPPED else 1024)
    return height or side, width or side


def check_side(token: int, height: int, width: int) -> None:
    """Refuse a size that tokens of so many pixels along a side do not fill.

    Raises:
        ValueError: a side is no multiple of a token's, 16 pixels for the large models.
    """
    for name, pixels in (("height", height), ("width", width)):
        fits = pixels >= token and pixels % token == 0
        config.check(fits, name, pixels, f"a multiple of {token} for this model", "take the nearest one")


def check_drawing(*, steps: int | None, batch: int, seeds: Sequence[int] = (), prompts: Sequence[str] = ()) -> None:
    """Refuse settings that no image can be drawn with, before anything is loaded.

    Raises:
        ValueError: fewer than one step or image at a time, a seed that does not fit in 64 bits, or a prompt that is not
            UTF-8: the command line hands such bytes on as halves of letters, which no tokenizer takes.
    """
    fits = steps is None or 1 <= steps <= MOST_STEPS
    config.check(fits, "steps", steps, f"1 to {MOST_STEPS}", "leave it out for what the adapter is made for")
    config.check(batch >= 1, "batch", batch, "1 or more", "leave it out for 8")
    for seed in seeds:
        config.check(-(2**63) <= seed < 2**64, "seed", seed, "a whole number of at most 64 bits", "take a smaller one")
    for prompt in prompts:
        halves = any("\ud800" <= letter <= "\udfff" for letter in prompt)
        config.check(not halves, "prompt", prompt, "text in UTF-8", "type it again, or give a file with --prompts")
