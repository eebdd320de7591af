"""What a run is: typed, frozen, complete.

Five small dataclasses say everything a distillation needs to know: the model, the objective, the prompts, the
optimizer and the run around them. The command line is generated from the same types, and the run folder keeps the
resolved JSON. Noise level and raw time run from 1 (noise) to 0 (image). Published values: arXiv 2602.09014 and the
configuration released with it.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from arcflow import paper

Dtype = Literal["float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Cooldown = Literal["none", "linear", "cosine"]
Directions = Literal["modes", "segment"]
Spread = Literal["uniform", "stratified", "systematic"]
Solver = Literal["euler", "adams"]
Handover = Literal["walk", "student", "average"]
Sources = Literal["none", "files", "drawn"]
Form = Literal["mixture", "coefficients"]
Targets = Literal["feed_forward", "all", "full"]
Quantize = Literal["none", "nf4", "int8", "fp8"]
Fit = Literal["auto", "card", "offload", "int8", "nf4", "group"]
Tracker = Literal["none", "wandb", "trackio"]
PROMPT_FILES = (".txt", ".jsonl", ".csv", ".tsv", ".parquet")
OTHER_FILES = (".json", ".gz", ".zip", ".bz2", ".xz", ".zst", ".xlsx", ".docx", ".yaml", ".arrow", ".log", ".md")
"""Endings of files that are no list of prompts, and no names of data sets on the Hub."""


ALWAYS = 10**9
"""Iterations that no run has."""


def check(valid: bool, name: str, given: object, expected: str, remedy: str) -> None:
    """Refuse a setting, with what was given, what was expected and what to do."""
    if not valid:
        raise ValueError(f"{name} = {given!r}: expected {expected}; {remedy}")


@dataclass(frozen=True, kw_only=True)
class Model:
    """The teacher, and what is added to it to make the student."""

    base: str = "world"
    """The teacher: "world" for the small one shipped with the package, a diffusers pipeline folder, or a Hub id."""
    dtype: Dtype = "float32"
    """Precision of the frozen weights; what is trained is always float32."""
    modes: int = paper.MODES
    """K, the number of basic velocities in the mixture. 1 is the straight line."""
    form: Form = "mixture"
    """What a call describes: "mixture", the paper's K velocities with gates and momentum factors; or "coefficients",
    the mean velocity over the step by the base's own last layer, and K - 1 bends beside it (4 is a good K), which makes
    a student that is a plain LoRA at its own number of steps."""
    rank: int = paper.RANK
    """Rank (and alpha) of the LoRA."""
    dropout: float = paper.DROPOUT
    """Dropout in front of the LoRA while training."""
    targets: Targets = "feed_forward"
    """Linears that take the LoRA: "feed_forward", those of the published adapters, or "all" of the blocks and of the
    time embedding, attention included. "full" trains every weight instead, for a second network's memory."""
    lora: bool = True
    """Train a LoRA on the blocks; without it only the head and the last norm learn."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    teacher_lora: str | None = None
    """A LoRA of your own (a file, a folder, or a Hub id) that is part of the teacher."""
    quantize: Quantize = "none"
    """Store the frozen weights short: "nf4" (bitsandbytes), "int8" or "fp8" (torchao)."""
    text_bits: Literal[4, 8] | None = None
    """Store the text encoders in 8 or 4 bits (bitsandbytes)."""
    text_device: str | None = None
    """Device of the text encoders, say "cpu" or "cuda:1"; None: that of the transformer."""
    compile: bool = False
    """Compile the repeated blocks (torch.compile): slow to start, then faster."""

    def __post_init__(self) -> None:
        check(bool(self.base), "model.base", self.base, "a name", 'give "world", a folder or a Hub id')
        check(self.modes >= 1, "model.modes", self.modes, "1 or more", "the published adapters use 16")
        plain = self.teacher_lora is None or self.targets != "full"
        remedy = "fuse it into the base (pipe.fuse_lora), or choose other targets"
        check(plain, "model.teacher_lora", self.teacher_lora, "None where every weight is trained", remedy)
        plain = self.quantize == "none" or self.targets != "full"
        check(plain, "model.quantize", self.quantize, '"none" where every weight is trained', "choose other targets")
        if self.form == "coefficients":
            check(self.modes <= 8, "model.modes", self.modes, "at most 8 coefficients", "4 is a good number")
            check(self.lora, "model.lora", self.lora, "True in coefficients", "leave it out, or take the mixture")
            remedy = 'take "feed_forward" or "all", or the mixture'
            check(self.targets != "full", "model.targets", self.targets, "a LoRA in coefficients", remedy)
        check(self.rank >= 1, "model.rank", self.rank, "1 or more", "set model.lora to False to train without LoRA")
        check(
            0 <= self.dropout < 1,
            "model.dropout",
            self.dropout,
            "0 <= p < 1",
            f"the published value is {paper.DROPOUT}",
        )


@dataclass(frozen=True, kw_only=True)
class Distill:
    """The objective: which path is matched, where, and how the states are reached."""

    steps: int = paper.STEPS
    """Network calls of the student; one segment of the path each."""
    also_steps: tuple[int, ...] = ()
    """Other numbers of calls that the same student learns, in turn with the first, iteration by iteration."""
    shift: float = paper.SHIFT
    """Shift from raw time to noise level: sigma = shift tau / (1 + (shift - 1) tau)."""
    final_step_scale: float = paper.FINAL_STEP_SCALE
    """Length of the last step in raw time, relative to the others."""
    guidance: float | tuple[float, float] = paper.GUIDANCE
    """Guidance handed to models that embed it (FLUX.1-dev); others ignore a number. Two are a range: each sample
    is told one of its own, drawn evenly, and the student follows what it is told in there."""
    teacher_cfg: float = 1.0
    """True classifier-free guidance of the teacher against the empty prompt; 1 is off."""
    states: int = paper.STATES
    """N, states per segment at which the teacher is asked."""
    window: int = paper.WINDOW
    """Length of the matching window in 1/128 of raw time; velocities are averaged over it and then matched."""
    spread: Spread = "uniform"
    """How the states' random times are drawn: "uniform", as published; "stratified", one in each of N equal parts,
    which leaves the teacher no long step; or "systematic", all at one place in their parts: equal steps."""
    solver: Solver = "euler"
    """How the teacher walks between states: "euler", as published, or "adams", the two-step Adams-Bashforth rule, which
    takes as many calls and follows the teacher's path more closely."""
    handover: Handover = "walk"
    """Where the next segment starts: at the end of the walk, as published; where the student's own arc ends; or where
    that of the averaged student ends, whom samplers see, for one more call of the student."""
    end: float = 0.0
    """Share of the loss that falls on the mean velocity over the whole step, the student's against that of the
    teacher's walk; the rest falls on the velocities along it. It counts in the segments and as long as the teacher's
    ratio is 1: a walk that is the student's own has no end to be held against. 0, as published, leaves the end out."""
    reuse: int = 1
    """How often a walk of the teacher's is used on average: of so many iterations one asks the teacher, as long as its
    ratio is 1, and the others learn from walks that are kept. 1, as published, asks in every one."""
    kept: int = 64
    """Batches of walks that are kept for that, the newest; their size is told when a run begins."""
    mode_dropout: float = paper.MODE_DROPOUT
    """Probability that a mode is left out of the copy that walks to the states."""
    hold: int = 0
    """Iterations before the teacher ratio begins to fall."""
    decay: int = paper.FLUX_DECAY
    """Iterations over which the teacher ratio falls from 1 (the teacher's path) to 0 (the student's own)."""
    led: int = 0
    """First segments in which the teacher ratio stays at 1 for good. The first decides what is drawn, and on its own
    path a student may settle that otherwise than its teacher."""

    warm_start: bool = False
    """Begin with a student that hears, at the start of each of its steps, the noise level at which its velocity leads
    nearest to the step's end, fitted on the first batch: the time embedding's LoRA makes it so, and learns on from
    there. It pays where a training is short or has many steps; the paper begins with the teacher as it is."""

    def __post_init__(self) -> None:
        check(self.steps >= 1, "distill.steps", self.steps, "1 or more", f"the published adapters use {paper.STEPS}")
        known = all(steps >= 1 for steps in self.also_steps) and self.steps not in self.also_steps
        check(known, "distill.also_steps", self.also_steps, f"numbers of 1 or more beside {self.steps}", "say 1 4")
        check(self.shift > 0, "distill.shift", self.shift, "a positive number", f"the published value is {paper.SHIFT}")
        one = not (self.warm_start and self.also_steps)
        check(one, "distill.warm_start", True, "False for several numbers of calls", "leave out distill.also_steps")
        self._check_guidance()
        scale = self.final_step_scale
        check(
            scale > 0,
            "distill.final_step_scale",
            scale,
            "a positive number",
            f"the published value is {paper.FINAL_STEP_SCALE}",
        )
        check(self.teacher_cfg >= 1, "distill.teacher_cfg", self.teacher_cfg, "1 or more", "1 switches it off")
        check(self.states >= 1, "distill.states", self.states, "1 or more", f"the published value is {paper.STATES}")
        published = f"the published value is {paper.WINDOW}"
        check(0 <= self.window < paper.SUBSTEPS, "distill.window", self.window, f"0 to {paper.SUBSTEPS - 1}", published)
        dropout = self.mode_dropout
        check(
            0 <= dropout < 1,
            "distill.mode_dropout",
            dropout,
            "0 <= p < 1",
            f"the published value is {paper.MODE_DROPOUT}",
        )
        check(self.reuse >= 1, "distill.reuse", self.reuse, "1 or more", "1 asks the teacher in every iteration")
        check(self.kept >= 1, "distill.kept", self.kept, "1 or more", "leave it out to take the default")
        check(self.hold >= 0, "distill.hold", self.hold, "0 or more", "0 lets the ratio fall from the start")
        check(self.decay >= 0, "distill.decay", self.decay, "0 or more", "0 starts on the student's own path")
        most = min(self.all_steps)
        expected = f"0 to {most}, the fewest segments"
        check(0 <= self.led <= most, "distill.led", self.led, expected, "the published value is 0")
        check(0 <= self.end <= 1, "distill.end", self.end, "a share of 0 to 1", "half is a good one, 0 leaves it out")
        leads = not self.end or self.hold > 0 or self.led > 0
        check(leads, "distill.end", self.end, "0 where the teacher never leads", "raise distill.hold or distill.led")

    def _check_guidance(self) -> None:
        """Numbers from 0 on, of a range the lower one first."""
        given = self.guidance
        ends = given if isinstance(given, tuple) else (given, given)
        valid = len(ends) == 2 and all(0 <= end < math.inf for end in ends) and ends[0] <= ends[1]
        expected = "a number from 0 on, or a range of two, the lower one first"
        check(valid, "distill.guidance", given, expected, f"say {paper.GUIDANCE:g}, or 1.5 5")

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        """The lowest and the highest guidance that a sample may be told; None of a number that all are told."""
        return self.guidance if isinstance(self.guidance, tuple) else None

    @property
    def all_steps(self) -> tuple[int, ...]:
        """Every number of calls that is trained."""
        return (self.steps, *self.also_steps)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Prompts, the only data there is."""

    prompts: str = "world"
    """Training prompts: "world" (built-in grammar), a file (.txt, .jsonl, .csv, .tsv, .parquet), or a data set that is
    streamed (a folder of such files, or a Hub id)."""
    column: str = "prompt"
    """Name of the column (or JSON key) with the prompts."""
    split: str = "train"
    """Split of a streamed data set."""
    strict: bool = False
    """Stop at the first row that is no prompt, instead of leaving it out and saying so."""
    buckets: bool = False
    """Take the shape of each image from columns height and width, the area from data.height and data.width."""
    images: bool = False
    """Data-dependent training: the list names an image for every prompt (column image), and later segments start from
    it, noised, instead of where the walk arrives."""
    sources: Sources = "none"
    """For an editing model, which draws from an image and an instruction: what the list's column source has for each
    row, the path of an image (files), or words of which the teacher draws one first (drawn)."""
    count: int = 8192
    """How many prompts to draw from the grammar (a file is read whole)."""
    held_out: str | None = None
    """File of prompts for the distance to the teacher; None: the grammar's test split, a file's last or a stream's
    first ones."""
    grown: bool = False
    """The list is another one than when the run in the folder began: go on with it, and keep the prompts held out that
    were."""
    held_out_count: int = 64
    """How many held-out prompts (and noises) the distance is measured on."""
    teacher_steps: int = paper.TEACHER_STEPS
    """Euler steps of the teacher whose end points the distance is measured against."""
    height: int = 64
    """Image height in pixels."""
    width: int = 64
    """Image width in pixels."""
    frames: int = 1
    """Frames of a video; 1 for images."""
    max_sequence_length: int | None = None
    """Text tokens; None lets the family decide."""
    cache: bool = True
    """Encode all prompts once and keep them in memory; else encode every batch (large text encoders)."""
    embeddings: str | None = None
    """Folder of embeddings made by `arcflow cache make`: then no text encoder is loaded."""

    def __post_init__(self) -> None:
        kinds = ", ".join(PROMPT_FILES)
        known = self.prompts == "world" or _prompt_file(self.prompts) or self.streamed
        expected = f'"world", a file ({kinds}), or a data set (./folder or owner/name)'
        check(known, "data.prompts", self.prompts, expected, "rename or convert the file")
        held = self.held_out
        known = held is None or _prompt_file(held)
        check(known, "data.held_out", held, f"None or a file ({kinds})", "rename or convert the file")
        expected = "False, or a file of prompts with a column image"
        known = not self.images or _prompt_file(self.prompts)
        check(known, "data.images", self.images, expected, "give data.prompts such a file")
        alone = self.frames == 1 or not self.images
        check(alone, "data.images", self.images, "False for videos", "videos are distilled from prompts alone")
        self._check_sources()
        if self.streamed:
            remedy = "set it off: what is streamed is encoded batch by batch"
            check(not self.cache, "data.cache", self.cache, "False for a streamed data set", remedy)
            remedy = "they are made of a file; leave it out"
            check(self.embeddings is None, "data.embeddings", self.embeddings, "None for a streamed data set", remedy)
        for name in ("count", "held_out_count", "teacher_steps", "height", "width", "frames"):
            value = getattr(self, name)
            check(value >= 1, f"data.{name}", value, "1 or more", "leave it out to take the default")

    def _check_sources(self) -> None:
        """Whether there can be images to edit: in a file of prompts, and read as they come."""
        if self.sources == "none":
            return
        asked = "data.sources"
        check(
            _prompt_file(self.prompts),
            asked,
            self.sources,
            "none, or a file of prompts with a column source",
            "leave it out",
        )
        check(self.frames == 1, asked, self.sources, "none for videos", "leave it out")
        remedy = "set it off: what is read with an image is encoded batch by batch"
        check(not self.cache, "data.cache", self.cache, f"False where {asked} is {self.sources}", remedy)
        check(self.embeddings is None, "data.embeddings", self.embeddings, f"None with {asked}", "leave it out")
        check(not self.grown, "data.grown", self.grown, f"False with {asked}", "choose another folder with --out")

    @property
    def size(self) -> tuple[int, ...]:
        """Height and width in pixels, and the frames of a video."""
        return (self.height, self.width) if self.frames == 1 else (self.height, self.width, self.frames)

    @property
    def streamed(self) -> bool:
        """Whether the prompts are a data set that is read as it goes."""
        name = self.prompts
        file = _prompt_file(name) or name.lower().endswith(OTHER_FILES)
        return "/" in name and not file and not os.path.isfile(name)


def _prompt_file(name: str) -> bool:
    """Whether a name is that of a list of prompts."""
    return name.lower().endswith(PROMPT_FILES)


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW, its schedule, and the averaged weights that are kept."""

    iterations: int = paper.FLUX_ITERATIONS
    """Optimizer steps in all."""
    batch: int = 32
    """Samples per iteration."""
    micro_batch: int | None = None
    """Samples per backward pass, to fit in memory; None takes the whole batch at once."""
    lr: float = 1e-4
    """Learning rate."""
    lr_log_gamma: float = 1e-5
    """Learning rate of the head's log-gamma part."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's two decay rates."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    bits: Literal[32, 8] = 32
    """Precision of AdamW's moments; 8 (bitsandbytes) saves 6 bytes for every trained number, on one GPU."""
    directions: Directions = "modes"
    """Coordinates of a step on the head's velocities: "modes", each v_k by itself, as published, or "segment", the
    principal shapes of the exponentials over the longest segment, which learns the bend of the path sooner."""
    warmup: int = 100
    """Iterations of linear warm-up."""
    warmup_start: float = 0.001
    """Fraction of the learning rate at which the warm-up starts."""
    cooldown: Cooldown = "none"
    """Shape of the fall to zero at the end; "none" keeps the rate constant."""
    cooldown_iterations: int = 0
    """Length of that fall."""
    clip: float = 50.0
    """Largest gradient norm."""
    clip_from: int = 100
    """First iteration that is clipped."""
    spike: float | None = None
    """Skip a step whose gradient norm is this many times the usual one; None skips only what is not finite."""
    most_skipped: int = 20
    """Skipped steps in a row that end the run, with a diagnosis."""
    ema_from: int = 100
    """First iteration averaged with beta = (1 - 1/t)^power; a plain copy before."""
    ema_power: float = 8.0
    """Power in beta: the larger, the shorter the memory."""

    def __post_init__(self) -> None:
        for name in ("iterations", "batch", "micro_batch", "most_skipped"):
            value = getattr(self, name)
            check(value is None or value >= 1, f"optim.{name}", value, "1 or more", "leave it out to take the default")
        for name in ("lr", "lr_log_gamma", "clip", "ema_power"):
            value = getattr(self, name)
            check(value > 0, f"optim.{name}", value, "a positive number", "leave it out to take the default")
        spike = self.spike
        check(spike is None or spike > 1, "optim.spike", spike, "None or a factor above 1", "10 is a cautious one")
        for name in ("warmup", "clip_from", "ema_from", "cooldown_iterations", "weight_decay"):
            value = getattr(self, name)
            check(value >= 0, f"optim.{name}", value, "0 or more", "leave it out to take the default")
        if self.directions == "segment":
            remedy = 'set it to 0, or optim.directions to "modes"'
            check(not self.weight_decay, "optim.weight_decay", self.weight_decay, '0 with directions "segment"', remedy)
        low = self.warmup_start
        check(0 < low <= 1, "optim.warmup_start", low, "0 < fraction <= 1", "the published value is 0.001")
        check(all(0 <= b < 1 for b in self.betas), "optim.betas", self.betas, "0 <= beta < 1", "published: 0.9 0.95")
        if self.cooldown != "none":
            length, room = self.cooldown_iterations, self.iterations - self.warmup
            expected = f"1 to {room} (the iterations after warm-up)"
            remedy = "set the length of the cooldown or choose none"
            check(1 <= length <= room, "optim.cooldown_iterations", length, expected, remedy)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A whole run. The same seed gives the same run, however often it was interrupted."""

    out: str = "runs/world"
    """The run folder: configuration, log, checkpoints, adapter. An unfinished run in it is resumed."""
    seed: int = 0
    """All randomness of iteration n is a function of this number and n."""
    device: Device = "auto"
    """Where to compute; auto takes cuda, then mps, then cpu."""
    eval_every: int = 250
    """Iterations between two measurements of the distance to the teacher."""
    pictures: int = 8
    """Held-out images drawn at each measurement, the teacher's above the student's, in `pictures/`; 0 for none."""
    save_every: int = 250
    """Iterations between two checkpoints."""
    keep: int = 2
    """Checkpoints that are kept."""
    milestones: int | None = None
    """Keep the checkpoint of every N-th iteration for good; None keeps none of them."""
    shard: int | None = None
    """Processes that share one copy of the network (FSDP); None: all that torchrun started. With fewer there are
    several copies side by side (HSDP), with 1 a whole one on each."""
    tracker: Tracker = "none"
    """Where the curves go beside log.jsonl and TensorBoard: "wandb" or "trackio"."""
    log_every: int = 1
    """Iterations between two lines of the log."""
    stop_after: float | None = None
    """Minutes after which to save and stop; the same command goes on from there."""
    model: Model = field(default_factory=Model)
    distill: Distill = field(default_factory=Distill)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)

    def __post_init__(self) -> None:
        check(bool(self.out), "out", self.out, "a folder", "give one, say runs/world")
        check(self.seed >= 0, "seed", self.seed, "0 or more", "leave it out to take 0")
        for name in ("eval_every", "save_every", "keep", "log_every"):
            value = getattr(self, name)
            check(value >= 1, name, value, "1 or more", "leave it out to take the default")
        check(self.pictures >= 0, "pictures", self.pictures, "0 or more", "leave it out to take the default")
        for name in ("milestones", "shard"):
            value = getattr(self, name)
            check(value is None or value >= 1, name, value, "1 or more", "leave it out for none")
        lora = self.model.lora and self.model.targets != "full"
        remedy = "train a LoRA, or set distill.warm_start to False"
        check(lora or not self.distill.warm_start, "distill.warm_start", True, "False without a LoRA", remedy)
        limit = self.stop_after
        check(limit is None or limit > 0, "stop_after", limit, "a positive number of minutes", "leave it out for none")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A training that ends when its budget is spent, however many iterations that makes.

    In `run` the learning rate and the teacher's share follow the budget: `optim.iterations` is `PARTS`, and warm-up,
    cooldown, `distill.hold` and `distill.decay` count these parts. All else counts iterations.
    """

    run: Run
    """Model, objective, prompts and optimizer."""
    forwards: int = 24_000
    """Forward-equivalents: samples once through the transformer; a backward pass counts two."""

    def __post_init__(self) -> None:
        parts = self.run.optim.iterations
        check(parts == PARTS, "run.optim.iterations", parts, f"{PARTS}, the parts of a budget", "leave it so")
        check(self.forwards >= 1, "forwards", self.forwards, "1 or more", "leave it out to take the default")


PARTS = 1000
"""Parts of a budget, the unit of its schedules."""


CONTENTS = "contents"
"""Entry of `run.json` with digests of what the settings name: prompts, teacher."""


def to_json(run: Run) -> str:
    """The resolved configuration as it stands in `run.json`."""
    return json.dumps(dataclasses.asdict(run), indent=2) + "\n"


def flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Settings by their full names, `optim.lr` and the like."""
    found: dict[str, object] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def from_json(text: str) -> Run:
    """The run that `to_json` wrote, without what a run folder adds to it; unknown keys are an error that names them."""
    from arcflow.system import records  # which knows of tensors: torch

    values = json.loads(text)
    if isinstance(values, dict):
        values.pop(CONTENTS, None)
    return records.record(Run, values, "run.")
