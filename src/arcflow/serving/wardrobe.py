"""The pipeline, dressed for an order: with an adapter or as the teacher, in styles, for a task."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from diffusers import DiffusionPipeline
from torch import nn

from arcflow.families.fit import fitted
from arcflow.sampling.attach import attach, detach
from arcflow.sampling.generate import stock_euler
from arcflow.sampling.open import Setup
from arcflow.serving.offer import TEACHER
from arcflow.serving.order import Order, Task
from arcflow.student import views

SMALL = 500_000_000
"""Parameters of a transformer of which a second copy is kept for the teacher, so that the student can be fused."""


class Wardrobe:
    """One pipeline, or two where the teacher has a transformer of its own, and what they wear."""

    def __init__(self, settled: Mapping[str, Setup], styles: Mapping[str, str], shift: float) -> None:
        """Load the base, and put every style and every adapter on once; the first adapter is on at the end.

        Args:
            settled: adapters by name, of one base; the first is the default.
            styles: LoRAs by name.
            shift: of the noise levels that the teacher is drawn with.

        Raises:
            ValueError: an adapter or a style does not fit the base.
        """
        self.settled = settled
        self.styles = styles
        self.shift = shift
        self.base = next(iter(settled.values()))
        self.pipe = self.base.base()
        self.pipe.set_progress_bar_config(disable=True)
        small = sum(p.numel() for p in self.pipe.transformer.parameters()) <= SMALL
        self.fused = small and self.base.fit == "card" and all(one.fused for one in settled.values())
        self.teacher = self._beside(copy.deepcopy(self.pipe.transformer)) if self.fused else None
        for pipe in [self.pipe] if self.teacher is None else [self.pipe, self.teacher]:
            for name, path in styles.items():
                self._load_style(pipe, name, path)
        self.attached = ""
        self.worn = dict[int, tuple[tuple[str, float], ...]]()
        self.others = dict[tuple[int, Task], DiffusionPipeline]()
        for name in [*settled][::-1]:
            self._attach(name)

    @contextmanager
    def dressed(self, order: Order) -> Iterator[DiffusionPipeline]:
        """The pipeline with the order's adapter, or as the teacher, and its styles."""
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
                stack.enter_context(stock_euler(pipe, self.shift))
            yield pipe

    def of_task(self, pipe: DiffusionPipeline, task: Task) -> DiffusionPipeline:
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

    def _attach(self, name: str) -> None:
        if self.attached == name:
            return
        if self.attached:
            detach(self.pipe)
        self.attached = ""
        attach(self.pipe, self.settled[name].adapter, fuse=self.fused, guidance=True)
        if self.base.fit != "card":
            fitted(self.pipe, self.base.fit, self.base.device)
        self.attached = name

    def _beside(self, transformer: nn.Module) -> DiffusionPipeline:
        """A pipeline that shares everything but the transformer."""
        parts = {**self.pipe.components, "transformer": transformer, "scheduler": copy.deepcopy(self.pipe.scheduler)}
        pipe = type(self.pipe)(**parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _load_style(self, pipe: DiffusionPipeline, name: str, path: str) -> None:
        from arcflow.system import hub

        with hub.explained(path):
            try:
                pipe.load_lora_weights(path, adapter_name=name)
            except (RuntimeError, ValueError) as error:
                line = str(error).splitlines()[0]
                raise ValueError(
                    f"the style {name!r} ({path}) does not fit {self.base.subject.model}: {line}"
                ) from None
        pipe.disable_lora()

    def _wear(self, pipe: DiffusionPipeline, styles: tuple[tuple[str, float], ...]) -> None:
        if not self.styles or self.worn.get(id(pipe)) == styles:
            return
        if styles:
            pipe.set_adapters([name for name, _ in styles], [strength for _, strength in styles])
            pipe.enable_lora()
        else:
            pipe.disable_lora()
        self.worn[id(pipe)] = styles
