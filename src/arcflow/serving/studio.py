"""The pipeline with its adapters, styles and teacher, and how one batch is drawn: stock pipeline calls, nothing else.

Prompts are encoded one by one and kept, for at two calls an image the encoders are a tenth of its time. Every image
has a generator of its own, batches have sizes at which rows agree to the last bit (`serving.widths`) and prompts of one
length, and latents are decoded one by one; so an image does not depend on what is drawn beside it.

One thread may use a studio, the one that opened it.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines import auto_pipeline
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from arcflow import config, paper
from arcflow.families import family_of, network
from arcflow.families.conditioning import Cond, masked
from arcflow.families.family import Family
from arcflow.families.fit import fitted
from arcflow.sampling.attach import attach, detach
from arcflow.sampling.editing import READS_IMAGES
from arcflow.sampling.generate import stock_euler
from arcflow.sampling.open import SHIPPED, settle, size_of
from arcflow.sampling.options import Drawing, Machine, ModelAndAdapter
from arcflow.serving.arguments import Words, called_back, guidance_of, inputs_of, known_to, told_of
from arcflow.serving.order import Drawn, Order, Piece, Task
from arcflow.serving.texts import Lengths, Texts, lengths_of, padded_text, together
from arcflow.serving.widths import agreeing, next_width
from arcflow.student import views
from arcflow.student.record import AdapterInfo
from arcflow.system.timing import now

TEACHER = "teacher"
"""Name of the base without a student."""

PARTS = ("text", "transformer", "vae")
"""The parts of an image's time."""

SMALL = 500_000_000
"""Parameters of a transformer of which a second copy is kept for the teacher, so that the student can be fused."""

EMBEDDINGS = {
    "encoder_hidden_states": "prompt_embeds",
    "pooled_projections": "pooled_prompt_embeds",
}
"""What a text encoder gives: its name in `families`, and in a stock pipeline's call."""

MASK = "encoder_hidden_states_mask"
"""Name in `families` of the mask that says which tokens of the text there are."""

MASKS = ("prompt_embeds_mask", "prompt_attention_mask")
"""Its names in the calls of stock pipelines; those that know neither take a list of texts, each of its own length."""

SERVED = (
    "flux",
    "flux2",
    "qwen_image",
    "sd3",
    "z_image",
    "krea2",
    "chroma",
    "longcat_image",
    "lumina2",
    "qwen_image_21",
    "ovis_image",
    "ernie_image",
)
"""Families with a stock pipeline: all that draw images, but FLUX.3."""

SPELLED = ("longcat_image", "lumina2")
"""Families whose pipelines are given words: that of LongCat-Image fails on embedded text alone (diffusers 0.42), and
that of Lumina 2 puts a system prompt before the prompt and none before the negative one. Their text has one length."""

ROUNDED = ("qwen_image", "z_image", "krea2")
"""Families whose text is as long as its words, and whose image stands where it does whatever the length: their text
is padded to round lengths, so that more prompts are drawn together. Others' text stays as it is encoded."""


class Gone(Exception):
    """Nobody wants the batch any more."""


@dataclass(frozen=True, kw_only=True)
class StudioSetup:
    """What a studio is made of."""

    model: str = SHIPPED
    """The shipped small teacher, a diffusers pipeline folder, or a Hub id."""
    adapters: Mapping[str, str] = field(default_factory=lambda: {SHIPPED: SHIPPED})
    """Adapters by name; the first one is the default."""
    styles: Mapping[str, str] = field(default_factory=dict)
    """LoRAs by name."""
    teacher_lora: str | None = None
    """A LoRA on the teacher, as the adapters' records ask for it; "none" draws without."""
    device: config.Device = "auto"
    dtype: config.Dtype | Literal["auto"] = "auto"
    fit: config.Fit = "auto"
    """How the model is fitted to the card, as `families.fit` has it."""
    max_batch: int = 8
    kept_text: int = 256
    """MB of encoded prompts that are kept."""


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What a studio can draw, for whoever asks before ordering."""

    model: str
    models: tuple[str, ...]
    """Names that an order may have, the default first."""
    steps: Mapping[str, int]
    """Steps that each is meant for."""
    guidance: Mapping[str, float | None]
    """What each embeds unless an order says another."""
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """The lowest and the highest guidance of those that were distilled over a range."""
    styles: tuple[str, ...]
    height: int
    width: int
    multiple: int
    """Height and width are multiples of this."""
    tasks: tuple[Task, ...]
    negative: bool
    """Whether negative prompts are understood."""


@dataclass(kw_only=True)
class Watch:
    """How the one who waits follows a batch."""

    wanted: Callable[[], bool] = lambda: True
    """Whether anybody still waits; asked after every step."""
    partial: Mapping[int, Callable[[int, UInt8[np.ndarray, "height width 3"]], None]] = field(default_factory=dict)
    """By place in the batch: called with the number of steps taken and the image as it would be."""

    def of(self, places: Sequence[int]) -> "Watch":
        """The same for some of the batch."""
        partial = {new: self.partial[old] for new, old in enumerate(places) if old in self.partial}
        return Watch(wanted=self.wanted, partial=partial)


class Studio:
    """A pipeline that draws what is ordered."""

    def __init__(self, setup: StudioSetup) -> None:
        """Load everything.

        Raises:
            ValueError: a model, an adapter or a style that is not there, does not fit, or is named twice.
        """
        self.setup = setup
        names = [*setup.adapters, *setup.styles]
        if TEACHER in names or len(set(names)) < len(names):
            raise ValueError(f"names {names}: expected each once, and none of them {TEACHER!r}; rename one")
        machine = Machine(device=setup.device, dtype=setup.dtype, fit=setup.fit)
        subjects = {
            name: ModelAndAdapter(model=setup.model, adapter=path, teacher_lora=setup.teacher_lora)
            for name, path in setup.adapters.items()
        }
        settled = {name: settle(subject, Drawing(), machine) for name, subject in subjects.items()}
        self.paths = {name: one.adapter for name, one in settled.items()}
        self.infos: dict[str, AdapterInfo] = {name: one.info for name, one in settled.items() if one.info}
        if len(self.infos) < len(settled) or not settled:
            raise ValueError(f"adapters {list(setup.adapters)}: expected adapters; the teacher is served beside any")
        loras = {info.teacher_lora for info in self.infos.values()}
        if len(loras) > 1:
            raise ValueError(f"the adapters were distilled with different LoRAs on the teacher ({loras}); serve one")
        self.base = next(iter(settled.values()))
        if self.base.fit == "group" and len(settled) > 1:
            raise ValueError("--fit group holds every layer by a hook of its own, so adapters cannot change: serve one")
        if self.base.family.video:
            raise ValueError(
                f"{setup.model} draws videos, and the server draws images: expected one of {', '.join(SERVED)}; draw "
                f"it with arcflow sample --frames"
            )
        if self.base.family.name not in SERVED:
            raise ValueError(
                f"{setup.model} is of the family {self.base.family.name!r}, which the server does not draw, for "
                f"diffusers has modular blocks of it and no stock pipeline: expected one of {', '.join(SERVED)}"
            )
        self.pipe = self.base.base()
        self.pipe.set_progress_bar_config(disable=True)
        self.family = family_of(self.pipe.transformer)
        small = sum(p.numel() for p in self.pipe.transformer.parameters()) <= SMALL
        self.fused = small and self.base.fit == "card" and all(one.fused for one in settled.values())
        self.teacher = self._beside(copy.deepcopy(self.pipe.transformer)) if self.fused else None
        pipes = [self.pipe] if self.teacher is None else [self.pipe, self.teacher]
        for pipe in pipes:
            for name, path in setup.styles.items():
                self._load_style(pipe, name, path)
        self.texts = Texts(setup.kept_text)
        self.widths = dict[tuple[Order, Lengths], tuple[int, ...]]()
        self.most = dict[Order, int]()
        self.attached = ""
        self.worn = dict[int, tuple[tuple[str, float], ...]]()
        self.others = dict[tuple[int, Task], DiffusionPipeline]()
        for name in [*self.paths][::-1]:  # all of them fit, and the default is on at the end
            self._attach(name)
        self.warm()

    # --- what there is

    def warm(self) -> None:
        """Draw the usual image once, so that the first one who asks does not wait for what is done once."""
        offer = self.offer()
        name = offer.models[0]
        order = Order(
            height=offer.height, width=offer.width, steps=offer.steps[name], model=name, guidance=offer.guidance[name]
        )
        if "generate" in offer.tasks and "edit" not in offer.tasks:
            self.draw(order, [Piece(prompt="", seed=0)])

    def offer(self) -> Offer:
        """What can be drawn."""
        height, width = size_of(self.setup.model, None, None)
        steps = {name: info.fewest for name, info in self.infos.items()}
        guidance = {name: info.guidance for name, info in self.infos.items()}
        return Offer(
            model=self.setup.model,
            models=(*self.paths, TEACHER),
            steps={**steps, TEACHER: paper.TEACHER_STEPS},
            guidance={**guidance, TEACHER: None},
            ranges={name: info.guidance_range for name, info in self.infos.items() if info.guidance_range},
            styles=tuple(self.setup.styles),
            height=height,
            width=width,
            multiple=2 * self.pipe.vae_scale_factor,
            tasks=tasks_of(type(self.pipe).__name__),
            negative="negative_prompt_embeds" in known_to(self.pipe),
        )

    # --- one batch

    def draw(self, order: Order, pieces: Sequence[Piece], watch: Watch | None = None) -> list[Drawn]:
        """An image for each piece.

        Raises:
            Gone: the watcher says that nobody waits any more.
        """
        watch = watch or Watch()
        drawn = dict[int, Drawn]()
        with torch.inference_mode(), self._dressed(order) as plain:
            start = now()
            texts = [() if self._spelled(order) else self._texts(order, piece) for piece in pieces]
            spent = (now() - start) / len(pieces)
            for alike in together(texts):
                widths = self._widths(plain, order, pieces[alike[0]], texts[alike[0]])
                for first in range(0, len(alike), widths[-1]):
                    places = alike[first : first + widths[-1]]
                    some = self._drawn(
                        self._of_task(plain, order.task),
                        order,
                        [pieces[place] for place in places],
                        [texts[place] for place in places],
                        next_width(len(places), widths),
                        watch.of(places),
                        spent,
                    )
                    drawn |= zip(places, some, strict=True)
        return [drawn[place] for place in range(len(pieces))]

    def _drawn(
        self,
        pipe: DiffusionPipeline,
        order: Order,
        pieces: Sequence[Piece],
        texts: Sequence[tuple[Cond, ...]],
        width: int,
        watch: Watch,
        text: float,
    ) -> list[Drawn]:
        """Images of one call of the pipeline; encoding the text of each took `text` seconds."""
        start = now()
        latents, calls, spent = self._latents(pipe, order, pieces, texts, width, watch)
        middle = now()
        images = [self._decode(pipe, latents[i : i + 1], order) for i in range(len(pieces))]
        end = now()
        parts = (text * len(pieces), middle - start - spent, end - middle + spent)
        seconds: dict[str, float] = dict(zip(PARTS, parts, strict=True))
        tokens = sum(cond["encoder_hidden_states"].shape[1] for cond in texts[0][:1])
        return [
            Drawn(
                image=image,
                seconds=seconds,
                batch=len(pieces),
                calls=calls,
                text_tokens=tokens,
                image_tokens=self._tokens(latents).shape[1],
            )
            for image in images
        ]

    def room(self, order: Order) -> int:
        """Images of this order that may be drawn together."""
        if order.task == "edit":
            return 1
        shape = _shape(order)
        return max((widths[-1] for key, widths in self.widths.items() if key[0] == shape), default=self._most(order))

    def shrink(self, order: Order) -> bool:
        """Draw fewer images of this shape at a time, after memory ran out; False if one alone was too many."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        most = self._most(order)
        if most == 1:
            return False
        shape = _shape(order)
        self.most[shape] = most // 2
        self.widths = {key: widths for key, widths in self.widths.items() if key[0] != shape}
        return True

    def _most(self, order: Order) -> int:
        return self.most.get(_shape(order), self.setup.max_batch)

    def _widths(self, plain: DiffusionPipeline, order: Order, piece: Piece, text: tuple[Cond, ...]) -> tuple[int, ...]:
        """Batch sizes for orders of this shape and text of this length, tried out when the first one comes."""
        if order.task == "edit" or self._most(order) == 1:
            return (1,)
        key = (_shape(order), lengths_of(text))
        if key not in self.widths:
            steps = 1 if order.model == TEACHER else min(order.steps, 2)
            base = replace(order, task="generate", steps=steps, strength=1.0)

            def draw(n: int) -> Tensor:
                return self._latents(plain, base, [piece], [text], n, Watch())[0]

            self.widths[key] = agreeing(draw, self._most(order))
        return self.widths[key]

    def _latents(
        self,
        pipe: DiffusionPipeline,
        order: Order,
        pieces: Sequence[Piece],
        texts: Sequence[tuple[Cond, ...]],
        width: int,
        watch: Watch,
    ) -> tuple[Float[Tensor, "width *tokens size"], int, float]:
        """Latents, the calls that they took, and the seconds that went into images on the way."""
        pieces = [*pieces, *[pieces[-1]] * (width - len(pieces))]
        texts = [*texts, *[texts[-1]] * (width - len(texts))]
        last = list[Tensor]()
        glimpse = _Glimpse(self.family)
        spent = 0.0

        def after(
            pipe: DiffusionPipeline, step: int, timestep: object, tensors: dict[str, Tensor]
        ) -> dict[str, Tensor]:
            nonlocal spent
            last[:] = [tensors["latents"]]
            if not watch.wanted():
                raise Gone
            if watch.partial and glimpse.clean is not None and glimpse.steps_left(pipe, step):
                start = now()
                # a batch that is doubled for guidance has the prompt's own half last
                clean = glimpse.clean[-len(tensors["latents"]) :, : tensors["latents"].shape[1]]
                for place, show in watch.partial.items():
                    show(step + 1, self._decode(pipe, clean[place : place + 1], order))
                spent += now() - start
            glimpse.clean = None
            return {}

        hook = pipe.transformer.register_forward_hook(glimpse, with_kwargs=True)
        try:
            with called_back(pipe, after) as back:
                pipe.__call__(
                    height=order.height,
                    width=order.width,
                    num_inference_steps=order.steps,
                    generator=[torch.Generator("cpu").manual_seed(piece.seed) for piece in pieces],
                    output_type="latent",
                    **back,
                    **self._words(order, pieces, texts),
                    **guidance_of(pipe, order),
                    **inputs_of(pipe, order, pieces),
                    **told_of(pipe),
                )
        finally:
            hook.remove()
        return last[0], glimpse.calls, spent

    def _decode(self, pipe: DiffusionPipeline, latents: Tensor, order: Order) -> UInt8[np.ndarray, "height width 3"]:
        return network.decode(pipe, self._tokens(latents).clone(), order.height, order.width)[0]

    def _tokens(self, latents: Tensor) -> Float[Tensor, "batch tokens channels"]:
        """Latents of a pipeline, which some have as images."""
        return latents if latents.ndim == 3 else network.unfolded(latents, self.family.patch_of(self.pipe.transformer))

    # --- words

    def _spelled(self, order: Order) -> bool:
        """Whether the pipeline encodes the text: with the image to edit, or because it must."""
        return order.task == "edit" or self.family.name in SPELLED

    def _texts(self, order: Order, piece: Piece) -> tuple[Cond, ...]:
        """Conditioning of the prompt, and of the negative one if there is any."""

        def encode(prompt: str) -> Cond:
            cond = network.encode_text(self.pipe, [prompt])
            return padded_text(cond) if self.family.name in ROUNDED else cond

        wanted = [piece.prompt] if order.negative is None else [piece.prompt, piece.negative]
        return tuple(self.texts.of(prompt, encode, order.styles) for prompt in wanted)

    def _words(self, order: Order, pieces: Sequence[Piece], texts: Sequence[tuple[Cond, ...]]) -> Words:
        if order.task == "edit":  # its encoder may read the images too
            negative = {} if order.negative is None else {"negative_prompt": pieces[0].negative}
            return {"prompt": pieces[0].prompt, **negative}
        if self._spelled(order):
            negative = {} if order.negative is None else {"negative_prompt": [piece.negative for piece in pieces]}
            return {"prompt": [piece.prompt for piece in pieces], **negative}
        # some pipelines have an empty text there, which would stand beside the embeddings
        known = known_to(self.pipe)
        words: Words = {"negative_prompt": None} if "negative_prompt" in known else {}
        mask = next((name for name in MASKS if name in known), None)
        names = EMBEDDINGS if mask is None else {**EMBEDDINGS, MASK: mask}
        for which, before in enumerate(("", "negative_")[: len(texts[0])]):
            conds = [text[which] for text in texts]
            if mask == "prompt_attention_mask":  # Chroma's, which is added to the attention as it is
                conds = [{**cond, MASK: cond[MASK].to(cond["encoder_hidden_states"].dtype)} for cond in conds]
            if MASK in conds[0] and MASK not in names:
                words[f"{before}prompt_embeds"] = [row for cond in conds for row in masked(cond)]
                continue
            words |= {before + names[name]: torch.cat([cond[name] for cond in conds]) for name in conds[0]}
        return words

    # --- the pipeline, dressed for an order

    @contextmanager
    def _dressed(self, order: Order) -> Iterator[DiffusionPipeline]:
        """The pipeline with the order's adapter, or with the teacher, and its styles."""
        with ExitStack() as stack:
            pipe = self.pipe
            if order.model != TEACHER:
                self._attach(order.model)
            elif self.teacher is not None:
                pipe = self.teacher
            else:
                stack.enter_context(views.teacher(pipe.transformer))
            self._wear(pipe, order.styles)
            if order.model == TEACHER:
                stack.enter_context(stock_euler(pipe, next(iter(self.infos.values())).shift))
            yield pipe

    def _attach(self, name: str) -> None:
        if self.attached == name:
            return
        if self.attached:
            detach(self.pipe)
        self.attached = ""
        attach(self.pipe, self.paths[name], fuse=self.fused, guidance=True)
        if self.base.fit != "card":
            fitted(self.pipe, self.base.fit, self.base.device)
        self.attached = name

    def _beside(self, transformer: nn.Module) -> DiffusionPipeline:
        """A pipeline that shares everything but the transformer."""
        parts = {**self.pipe.components, "transformer": transformer, "scheduler": copy.deepcopy(self.pipe.scheduler)}
        pipe = type(self.pipe)(**parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _of_task(self, pipe: DiffusionPipeline, task: Task) -> DiffusionPipeline:
        """The stock pipeline of another task, of the same parts."""
        if task in ("generate", "edit"):
            return pipe
        key = (id(pipe), task)
        if key not in self.others:
            from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

            kind = AutoPipelineForImage2Image if task == "vary" else AutoPipelineForInpainting
            self.others[key] = kind.from_pipe(pipe)
            self.others[key].set_progress_bar_config(disable=True)
        self.others[key].scheduler = pipe.scheduler
        return self.others[key]

    def _load_style(self, pipe: DiffusionPipeline, name: str, path: str) -> None:
        from arcflow.system import hub

        with hub.explained(path):
            try:
                pipe.load_lora_weights(path, adapter_name=name)
            except (RuntimeError, ValueError) as error:
                line = str(error).splitlines()[0]
                raise ValueError(f"the style {name!r} ({path}) does not fit {self.setup.model}: {line}") from None
        pipe.disable_lora()

    def _wear(self, pipe: DiffusionPipeline, styles: tuple[tuple[str, float], ...]) -> None:
        if not self.setup.styles or self.worn.get(id(pipe)) == styles:
            return
        if styles:
            pipe.set_adapters([name for name, _ in styles], [strength for _, strength in styles])
            pipe.enable_lora()
        else:
            pipe.disable_lora()
        self.worn[id(pipe)] = styles


def tasks_of(pipeline: str) -> tuple[Task, ...]:
    """What a pipeline of this class draws, by itself or by its siblings in diffusers."""
    if any(word in pipeline for word in READS_IMAGES):
        return ("generate", "edit")
    tasks: list[Task] = ["generate"]
    if auto_pipeline._get_task_class(auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, pipeline, False):
        tasks.append("vary")
    if auto_pipeline._get_task_class(auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING, pipeline, False):
        tasks.append("inpaint")
    return tuple(tasks)


class _Glimpse:
    """A forward hook that keeps what the image would be if the path went straight on from here."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.clean: Tensor | None = None
        self.calls = 0

    def __call__(
        self, module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object], output: Sequence[object]
    ) -> None:
        self.calls += 1
        if self.clean is None:  # a second call in a step is the negative prompt's
            x = kwargs.get("hidden_states")
            time = kwargs.get("timestep")
            velocity = output[0]
            if not isinstance(x, Tensor) or not isinstance(time, Tensor) or not isinstance(velocity, Tensor):
                return  # a network that takes a list: nothing is shown on the way
            if not self.family.folds:
                velocity = self.family.leaves(velocity, x.shape[1], {})
            velocity, (start, slope) = self.family.sign * velocity.float(), self.family.time
            sigma = ((time.float() - start) / slope).reshape(-1, *[1] * (x.ndim - 1))
            self.clean = x.float()[:, : velocity.shape[1]] - sigma * velocity

    def steps_left(self, pipe: DiffusionPipeline, step: int) -> bool:
        return step + 1 < getattr(pipe, "num_timesteps", len(pipe.scheduler.timesteps))


def _shape(order: Order) -> Order:
    """What decides the shapes of the matrix products: strengths and numbers of steps do not."""
    styles = tuple((name, 1.0) for name, _ in order.styles)
    negative = None if order.negative is None else 1.0
    return replace(order, task="generate", steps=1, strength=1.0, styles=styles, negative=negative, guidance=None)
