"""The folder of a run: who trains in it, and which run it holds.

`run.json` has the resolved settings and, under `contents`, digests of what they name: the prompts, the held-out ones,
the teacher's weights. What is named is known by its content: the same list in another folder is the same, another list
under the same name is not. A folder holds a run once it has begun; what failed before leaves nothing that binds.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from arcflow.config import CONTENTS, Data, Run, flat, from_json, to_json
from arcflow.data import cache
from arcflow.data.batches import PromptData, Prompts
from arcflow.system import files
from arcflow.system.owner import Owner, owned, read_owner
from arcflow.system.processes import OnAll, Ranks
from arcflow.system.text import shown

FREE = (
    "out",
    "device",
    "pictures",
    "eval_every",
    "save_every",
    "keep",
    "milestones",
    "log_every",
    "stop_after",
    "shard",
    "tracker",
    "model.compile",
    "model.text_device",
    "data.grown",
)
"""Settings that may change when a run is taken up again."""

TOLD = ("optim.iterations",)
"""Settings that may change too, and are told."""

NAMES = {
    "data.prompts": "prompts",
    "data.held_out": "held_out",
    "data.embeddings": "embeddings",
    "model.base": "teacher",
    "model.teacher_lora": "teacher",
}
"""Settings that only name something, and what of `contents` knows it better."""

WORDS = {
    "prompts": ("prompts", "data.prompts"),
    "held_out": ("held-out prompts", "data.held_out and data.prompts"),
    "embeddings": ("set of embeddings", "data.embeddings"),
    "teacher": ("teacher", "model.base and model.teacher_lora"),
}
"""For each digest: what it is of, and the settings that decide it."""

SEEN = 30.0
"""Seconds in which what one machine has written must be seen by all."""


@contextmanager
def home(out: str, ranks: Ranks) -> Iterator[Callable[[], str | None]]:
    """Have a run folder to this run while the block lasts, and see it from all processes.

    What is yielded tells why the folder is no longer this run's, on the first process.

    Raises:
        ValueError: another run is in it, or it is not on a disk that all processes see; on all of them.
    """
    folder, owners = Path(out), list[Owner]()
    try:
        out.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"out = {out!a} has letters that the system's encoding lacks: expected a name that every library can "
            f"write; set PYTHONUTF8=1 or LC_ALL=C.UTF-8, or choose another --out"
        ) from error
    with ExitStack() as stack:

        def enter() -> str:
            owners.append(stack.enter_context(owned(folder, "trains")))
            for place in (folder, folder / "adapter", folder / "pictures"):
                files.sweep(place)
            return owners[0].token

        token = ranks.agree(enter)
        (blind,) = ranks.any(ranks.count > 1 and not _sees(folder, token))
        if blind:
            raise OnAll(
                f"{folder} is not the same folder for all {ranks.count} processes: expected a disk that all machines "
                f"see, for each writes its part of a checkpoint there; give --out a folder on such a disk"
            )

        def lost() -> str | None:
            try:
                for owner in owners:
                    owner.check()
            except ValueError as error:
                return str(error)
            return None

        yield lost


def _sees(folder: Path, token: str) -> bool:
    until = time.monotonic() + SEEN
    while (read_owner(folder) or {}).get("token") != token:
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


HELD_OUT = "held_out.jsonl"
"""The held-out prompts of a run, in its folder."""


def prompts_of(config: Run) -> Data:
    """Where a run's prompts come from; where the list has grown, what was held out stands in the run folder.

    Raises:
        ValueError: the list is said to have grown, and nothing was held out here before.
    """
    kept = Path(config.out) / HELD_OUT
    if not config.data.grown or not begun(Path(config.out)):
        return config.data
    if not kept.is_file():
        raise ValueError(
            f"data.grown: {kept} is not there, which has what was held out: expected a run that was begun with this "
            f"version; choose another folder with --out"
        )
    return replace(config.data, held_out=str(kept))


def keep_held_out(config: Run, prompts: Sequence[str]) -> None:
    """Write down what is held out, for when the list grows."""
    path = Path(config.out) / HELD_OUT
    if not path.exists():
        files.write_lines(path, [{config.data.column: text} for text in prompts])


def contents_of(data: Prompts, teacher: nn.Module | None = None, embeddings: str | None = None) -> dict[str, str]:
    """Digests of prompts, teacher and embeddings; those of a stream are of its files, for nobody reads it whole."""
    found = {"held_out": files.text_digest(data.held_out.prompts, 16)}
    if isinstance(data, PromptData):
        # what older lists do not have is left out, so that their digests stay
        listed = [[row.text, row.size, row.image, *filter(None, (row.frames, row.source))] for row in data.train]
        found["prompts"] = files.text_digest(listed, 16)
    elif data.stream.content:
        found["prompts"] = data.stream.content
    if embeddings:
        found["embeddings"] = cache.contents(Path(embeddings))
    if teacher is not None:
        found["teacher"] = weights_digest(teacher)
    return found


SAMPLES = 256
"""Numbers of each tensor that a digest of weights looks at."""


@torch.no_grad()
def weights_digest(net: nn.Module) -> str:
    """A digest of some numbers of every tensor of a network, whatever its names and wherever they are."""
    sums = []
    for value in net.state_dict().values():
        if not isinstance(value, Tensor) or type(value) not in (Tensor, nn.Parameter):
            continue  # a quantized tensor of its own kind, which cannot be read in part
        some = value.flatten()[:: max(1, value.numel() // SAMPLES)][:SAMPLES].cpu().contiguous()
        numbers = some.view(torch.uint8) if some.is_floating_point() else some  # NumPy knows no bfloat16
        sums.append(hashlib.sha256(repr(tuple(value.shape)).encode() + numbers.numpy().tobytes()).hexdigest())
    return files.text_digest(sorted(sums), 16)


def claim_run(
    config: Run,
    ranks: Ranks,
    contents: Mapping[str, str] | None = None,
    say: Callable[[str], None] = lambda message: None,
    write: bool = True,
) -> Path:
    """The run folder, with the resolved configuration in it.

    Args:
        contents: digests of what the settings name, as far as they are known by now.
        say: is told of what has changed and may.
        write: False only looks.

    Raises:
        ValueError: the folder holds another run, or its `run.json` is damaged; on all processes.
    """
    folder = Path(config.out)
    ranks.agree(lambda: _claim(folder, config, dict(contents or {}), say, write))
    return folder


def _claim(folder: Path, config: Run, contents: dict[str, str], say: Callable[[str], None], write: bool) -> None:
    known: dict[str, str] = {}
    if (folder / "run.json").exists() and begun(folder):
        there, known = read_run(folder / "run.json")
        _compare(folder, flat(json.loads(to_json(there))), flat(json.loads(to_json(config))), known, contents, say)
    if write:
        record = json.loads(to_json(config)) | {CONTENTS: known | contents}
        files.write_json(folder / "run.json", record)


def _compare(
    folder: Path,
    there: Mapping[str, object],
    mine: Mapping[str, object],
    known: Mapping[str, str],
    contents: Mapping[str, str],
    say: Callable[[str], None],
) -> None:
    """Refuse what is another run; tell what has changed and may."""
    # The teacher is not yet known at the first look, before it is loaded.
    named = [n for n, kind in NAMES.items() if kind in known and (kind in contents or kind == "teacher")]
    if other := files.differing(there, mine, (*FREE, *TOLD, *named)):
        raise ValueError(
            f"{folder} holds a run with other settings ({other}): expected the same ones to go on with it; "
            f"repeat them, or choose another folder with --out"
        )
    for kind, digest in contents.items():
        if known.get(kind, digest) != digest:
            what, settings = WORDS[kind]
            if kind == "prompts" and mine.get("data.grown"):
                say(f"{folder} goes on with another list of prompts; what was held out stays so")
                continue
            grown = kind in ("prompts", "held_out") and not mine.get("data.grown")
            way = "go on with it and keep held out what was, with --data.grown, " if grown else ""
            raise ValueError(
                f"{folder} holds a run with another {what}: what {settings} name now is not what it was begun with; "
                f"put it back as it was, {way}or choose another folder with --out"
            )
    if changed := files.differing(there, {name: mine[name] for name in (*TOLD, *named) if name in mine}):
        say(f"{folder} goes on with other settings ({changed})")


def begun(folder: Path) -> bool:
    """Whether a run in a folder has come so far that something of it could be lost."""
    return any((folder / name).exists() for name in ("log.jsonl", "checkpoints", "adapter"))


def read_run(path: Path) -> tuple[Run, dict[str, str]]:
    """The settings of a run folder, and the digests of what they name; of before there are none.

    Raises:
        ValueError: the file is damaged; the message names it.
    """
    try:
        text = path.read_text("utf-8")
        contents = json.loads(text).get(CONTENTS, {})
        run = from_json(text)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({shown(error)}): expected the settings of the run in {path.parent}, whose checkpoints "
            f"are untouched. Put it back; or, if you are sure of the settings, remove it and run the same command"
        ) from error
    fits = isinstance(contents, dict) and all(isinstance(one, str) for one in contents.values())
    return run, contents if fits else {}
