"""The pipeline with its adapters, styles and teacher, and how one batch is drawn: stock pipeline calls, nothing else.

Prompts are encoded one by one and kept, for at two calls an image the encoders are a tenth of its time. Every image
has a generator of its own, batches have sizes at which rows agree to the last bit (`serving.widths`) and prompts of one
length, and latents are decoded one by one; so an image does not depend on what is drawn beside it.

One thread may use a studio, the one that opened it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from arcflow import paper
from arcflow.families import family_of, network
from arcflow.families.conditioning import Cond
from arcflow.families.family import Family
from arcflow.sampling.open import settle, size_of
from arcflow.sampling.options import Drawing, Machine, ModelAndAdapter
from arcflow.serving.arguments import called_back, guidance_of, inputs_of, known_to, told_of
from arcflow.serving.offer import SERVED, TEACHER, Gone, Offer, StudioSetup, Watch, tasks_of
from arcflow.serving.order import Drawn, Order, Piece
from arcflow.serving.texts import Lengths, Texts, lengths_of, padded_text, together
from arcflow.serving.wardrobe import Wardrobe
from arcflow.serving.widths import agreeing, next_width
from arcflow.serving.words import spelled, words_of
from arcflow.student.record import AdapterInfo
from arcflow.system.timing import now

PARTS = ("text", "transformer", "vae")
"""The parts of an image's time."""

ROUNDED = ("qwen_image", "z_image", "krea2")
"""Families whose text is as long as its words, and whose image stands where it does whatever the length: their text
is padded to round lengths, so that more prompts are drawn together. Others' text stays as it is encoded."""


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
        self.infos: dict[str, AdapterInfo] = {name: one.info for name, one in settled.items() if one.info}
        if len(self.infos) < len(settled) or not settled:
            raise ValueError(f"adapters {list(setup.adapters)}: expected adapters; the teacher is served beside any")
        loras = {info.teacher_lora for info in self.infos.values()}
        if len(loras) > 1:
            raise ValueError(f"the adapters were distilled with different LoRAs on the teacher ({loras}); serve one")
        base = next(iter(settled.values()))
        if base.fit == "group" and len(settled) > 1:
            raise ValueError("--fit group holds every layer by a hook of its own, so adapters cannot change: serve one")
        if base.family.video:
            raise ValueError(
                f"{setup.model} draws videos, and the server draws images: expected one of {', '.join(SERVED)}; draw "
                f"it with arcflow sample --frames"
            )
        if base.family.name not in SERVED:
            raise ValueError(
                f"{setup.model} is of the family {base.family.name!r}, which the server does not draw, for "
                f"diffusers has modular blocks of it and no stock pipeline: expected one of {', '.join(SERVED)}"
            )
        self.wardrobe = Wardrobe(settled, setup.styles, next(iter(self.infos.values())).shift)
        self.pipe = self.wardrobe.pipe
        self.family = family_of(self.pipe.transformer)
        self.texts = Texts(setup.kept_text)
        self.widths = dict[tuple[Order, Lengths], tuple[int, ...]]()
        self.most = dict[Order, int]()
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
            models=(*self.infos, TEACHER),
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
        with torch.inference_mode(), self.wardrobe.dressed(order) as plain:
            start = now()
            texts = [() if spelled(self.family, order) else self._texts(order, piece) for piece in pieces]
            spent = (now() - start) / len(pieces)
            for alike in together(texts):
                widths = self._widths(plain, order, pieces[alike[0]], texts[alike[0]])
                for first in range(0, len(alike), widths[-1]):
                    places = alike[first : first + widths[-1]]
                    some = self._drawn(
                        self.wardrobe.of_task(plain, order.task),
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
                    **words_of(self.pipe, self.family, order, pieces, texts),
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

    def _texts(self, order: Order, piece: Piece) -> tuple[Cond, ...]:
        """Conditioning of the prompt, and of the negative one if there is any."""

        def encode(prompt: str) -> Cond:
            cond = network.encode_text(self.pipe, [prompt])
            return padded_text(cond) if self.family.name in ROUNDED else cond

        wanted = [piece.prompt] if order.negative is None else [piece.prompt, piece.negative]
        return tuple(self.texts.of(prompt, encode, order.styles) for prompt in wanted)


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
