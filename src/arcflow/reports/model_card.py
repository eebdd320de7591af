"""An adapter made ready for others: a folder in either layout, a model card written from its record, the Hub.

Nothing in the card is typed by hand. Base, steps, guidance and settings come from the adapter's own record, the curves
from the run's log, the table from a results.json of `arcflow evaluate`.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError
from torch import nn

from arcflow import student
from arcflow.evaluation.results import Evaluation, SuiteResults, told
from arcflow.families import family_of
from arcflow.families.weights import dense
from arcflow.path import step_grid
from arcflow.recipes import run_command
from arcflow.reports.page import fill
from arcflow.reports.public import code, fenced, is_hub, prose, public, public_place
from arcflow.reports.side_by_side import curves_figure, markdown_table
from arcflow.reports.table import Line, Table
from arcflow.student.adapter import found_at, load_adapter, save_adapter, write_adapter
from arcflow.student.formats import FILES, AdapterInfo, Found, tensors_of
from arcflow.student.merged import change_of, write_merged
from arcflow.student.places import base_linear, norm_linears
from arcflow.student.plain_lora import (
    LORA,
    Factors,
    Keys,
    factors_of,
    linearized,
    lora_tensors,
    raw_times,
    stock_scheduler,
)
from arcflow.system import files, records
from arcflow.system.text import Json
from arcflow.world.scene import SIZE

LICENSES: dict[str, dict[str, str]] = {
    "black-forest-labs/FLUX.1-dev": {
        "license": "other",
        "license_name": "flux-1-dev-non-commercial-license",
        "license_link": "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
    },
    "black-forest-labs/FLUX.1-Kontext-dev": {
        "license": "other",
        "license_name": "flux-1-dev-non-commercial-license",
        "license_link": "https://huggingface.co/black-forest-labs/FLUX.1-Kontext-dev/blob/main/LICENSE.md",
    },
    "black-forest-labs/FLUX.2-dev": {
        "license": "other",
        "license_name": "flux-dev-non-commercial-license",
        "license_link": "https://huggingface.co/black-forest-labs/FLUX.2-dev/blob/main/LICENSE.txt",
    },
    "black-forest-labs/FLUX.2-klein-base-4B": {"license": "apache-2.0"},
    "Qwen/Qwen-Image": {"license": "apache-2.0"},
    "Qwen/Qwen-Image-2512": {"license": "apache-2.0"},
    "Tongyi-MAI/Z-Image": {"license": "apache-2.0"},
    "stabilityai/stable-diffusion-3.5-large": {
        "license": "other",
        "license_name": "stabilityai-ai-community",
        "license_link": "https://huggingface.co/stabilityai/stable-diffusion-3.5-large/blob/main/LICENSE.md",
    },
    "stabilityai/stable-diffusion-3.5-medium": {
        "license": "other",
        "license_name": "stabilityai-ai-community",
        "license_link": "https://huggingface.co/stabilityai/stable-diffusion-3.5-medium/blob/main/LICENSE.md",
    },
    "lodestones/Chroma1-HD": {"license": "apache-2.0"},
    "meituan-longcat/LongCat-Image": {"license": "apache-2.0"},
    "Alpha-VLLM/Lumina-Image-2.0": {"license": "apache-2.0"},
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": {"license": "apache-2.0"},
    "baidu/ERNIE-Image": {"license": "apache-2.0"},
    "world": {"license": "apache-2.0"},
}
"""What an adapter inherits from its base, of the bases whose own card or whose makers' word was read; of others a card
says that it is not known."""

CURVES = "curves.png"

ExportLayout = Literal["arcflow", "file", "published", "lora", "merged"]

BOUND = 0.01
"""Loss of a plain LoRA of a mixture, at most: relative difference of the latents."""


def export(
    adapter: str,
    out: Path,
    *,
    layout: ExportLayout = "arcflow",
    keys: Keys = "diffusers",
    transformer: nn.Module | None = None,
    base: Path | None = None,
    bound: float = BOUND,
    measure: Callable[[Path], float] | None = None,
    log: Path | None = None,
    results: Path | None = None,
    name: str = "owner/name",
) -> Path:
    """A folder that can be published: the adapter's files, README.md, and the curves if there is a log.

    Args:
        adapter: an adapter's folder or file, or one on the Hub.
        layout: "file" is ours in a single tensor file; "lora" and "merged" need no arcflow.
        keys: names in a plain LoRA's file.
        transformer: the base's, needed to change the layout, and to make a LoRA of a mixture; it ends as it came.
        base: the base pipeline's folder, which "merged" copies.
        bound: the largest loss that a LoRA of a mixture may have.
        measure: how different the images of a LoRA's file are, for a mixture; see `sampling.plain`.
        log: `log.jsonl` of the run that made it.
        results: `results.json` of `arcflow evaluate`.
        name: where it will be found, for the example in the card.

    Raises:
        ValueError: it cannot be made, or loses more than `bound`. Nothing is left in `out` that can be taken for it.
    """
    table = _table_of(results) if results else None
    found = found_at(adapter)
    if layout == "merged":
        use = _write_merged(found, out, base)
    elif layout == "lora":
        use = _write_lora(found, out, keys, *_plain(found, transformer, bound, measure))
    else:
        _write_adapter(adapter, found, out, layout, transformer)
        use = None
    lines = files.read_lines(log) if log else []
    if lines:
        files.write_bytes(out / CURVES, curves_figure(lines))
    out.mkdir(parents=True, exist_ok=True)
    text = str(card(public(found.info), name, table=table, curves=bool(lines), use=use))
    files.write_text(out / "README.md", text)
    return out


def _write_merged(found: Found, out: Path, base: Path | None) -> "Use":
    """The base's folder with the student in its weights."""
    if base is None:
        raise ValueError("a merged folder is a copy of the base's: expected that; give --model.")
    change = change_of(tensors_of(found), public(found.info))
    write_merged(base, out, change)
    return Use("merged", code=change.packed is not None)


def _write_lora(found: Found, out: Path, keys: Keys, factors: dict[str, Factors], lost: float) -> "Use":
    """A plain LoRA, and the scheduler that goes with it."""
    info = public(found.info)
    out.mkdir(parents=True, exist_ok=True)
    files.write_tensors(out / LORA[keys], lora_tensors(factors, keys, info.family), {"format": "pt"})
    files.write_json(out / "scheduler" / "scheduler_config.json", stock_scheduler(info))
    return Use("lora", lost)


def _write_adapter(adapter: str, found: Found, out: Path, layout: ExportLayout, transformer: nn.Module | None) -> None:
    """The adapter in our layout, in one file or in the published layout; from one to the other by way of its base."""
    info = public(found.info)
    own = "published" if layout == "published" else "arcflow"
    target = out / FILES["arcflow"][0] if layout == "file" else out
    if found.layout == own == "arcflow":
        write_adapter(tensors_of(found), info, target)
    elif found.layout == own:
        out.mkdir(parents=True, exist_ok=True)
        for file in FILES[own]:
            files.write_atomic(out / file, partial(shutil.copyfile, found.weights.parent / file))
    elif transformer is None:
        raise ValueError(f"{adapter} is not in the layout {own!r}: expected its base to convert it; give --model")
    else:
        load_adapter(transformer, adapter, dtype=torch.float32)  # whatever the base has been read as
        save_adapter(transformer, target, info=info, layout=own)
        student.remove(transformer)


def _table_of(results: Path) -> str:
    """Results as Markdown, of either kind that `arcflow evaluate` writes. Raises ValueError if they are neither."""
    try:
        kind = json.loads(results.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{results} is no JSON ({error}): expected results of `arcflow evaluate`") from error
    if not isinstance(kind, dict) or "suite" not in kind:
        return markdown_table(records.read(Evaluation, results))
    suite = records.read(SuiteResults, results)
    rows = [Line.of(prose(name), prose(told(metric)), metric.better) for name, metric in suite.metrics.items()]
    whole = "" if suite.complete else ", a part of it"
    about = f"{prose(suite.suite)} ({suite.prompts} prompts, {suite.pictures} images{whole})"
    return Table([about, "value [95 % interval]", "better"], rows).markdown()


def _plain(
    found: Found, transformer: nn.Module | None, bound: float, measure: Callable[[Path], float] | None
) -> tuple[dict[str, Factors], float]:
    """An adapter's LoRA, and how far its images are from the student's.

    Raises:
        ValueError: they are further than `bound`.
    """
    info = found.info
    tensors = tensors_of(found)
    if info.form == "coefficients":
        return factors_of(tensors, info), 0.0
    if info.targets == "full":
        raise ValueError("every weight of this student is trained, which is no LoRA; take the layout 'arcflow'.")
    if transformer is None or measure is None:
        raise ValueError(
            f"{found.weights} is a mixture, whose gates look at the features: expected its base, to make the LoRA that "
            f"comes nearest and to measure what is lost; give --model. A student in coefficients (model.form) loses "
            f"nothing."
        )
    names = [*norm_linears(transformer), family_of(transformer).head]
    bases = {name: dense(base_linear(transformer, name)) for name in names}
    factors = linearized(tensors, info, bases)
    with TemporaryDirectory() as draft:
        file = Path(draft) / LORA["diffusers"]
        files.write_tensors(file, lora_tensors(factors, "diffusers", info.family), {"format": "pt"})
        lost = measure(file)
    if not lost <= bound:
        raise ValueError(
            f"a plain LoRA of {found.weights} draws latents that differ by {lost:.1%} from the student's; expected at "
            f"most {bound:.1%}. It is a mixture, whose gates and momentum factors no LoRA has. Use it with "
            f"arcflow.attach, train a student in coefficients (--model.form coefficients), or raise --bound."
        )
    return factors, lost


@dataclass(frozen=True)
class Use:
    """What a folder is, and how it is used: an adapter of ours, a plain LoRA, or a whole pipeline."""

    kind: Literal["adapter", "lora", "merged"] = "adapter"
    lost: float = 0.0
    """How far its images are from the adapter's, of a LoRA."""
    code: bool = False
    """Whether a pipeline brings a scheduler as a file, which is run when it is loaded."""


def card(
    info: AdapterInfo, name: str, *, table: str | None = None, curves: bool = False, use: Use | None = None
) -> ModelCard:
    """The model card that an adapter's record makes.

    Args:
        table: results as Markdown.
        curves: whether the folder holds a plot of loss and distance.
        use: what the folder is; by default an adapter of ours.
    """
    use = use or Use()
    info = public(info)
    license: Json = LICENSES.get(info.base, {})
    based: Json = {"base_model": info.base, "base_model_relation": "adapter"} if is_hub(info.base) else {}
    data = ModelCardData(
        **based,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["arcflow", "distillation", "few-step", "flow-matching", "lora", "text-to-image"],
        **license,
    )
    times = raw_times(info)
    grid = step_grid(info.fewest, info.shift, info.final_step_scale).tolist()
    settings = info.training.get("settings", {})
    small = f", height={SIZE}, width={SIZE}" if info.base == "world" else ""
    steps = f"num_inference_steps={info.fewest}" if times is None else f"sigmas={times}"
    text = fill(
        "card.md",
        data=data.to_yaml(),
        info=info,
        title=prose(name.split("/")[-1]),
        base=prose(info.base),
        base_code=code(public_place(info.base)),
        lora_code=code(public_place(info.teacher_lora)) if info.teacher_lora else "",
        name_code=code(name),
        prompt=code("a red ring" if info.base == "world" else "a red cube on a blue sphere"),
        kind=use.kind,
        code=use.code,
        lost=f"{use.lost:.1%}" if use.lost else "",
        steps=(f"num_inference_steps={info.steps}" if use.kind == "adapter" else steps) + small,
        levels=", ".join(f"{level:.4g}" for level in grid),
        license={"license_link": "", "license": ""} | license,
        facts=_facts(info).markdown(),
        training=_training(settings, info.training.get("progress", {})),
        settings=fenced(settings) if settings else "",
        curves=CURVES if curves else "",
        results=table,
    )
    return ModelCard(text, ignore_metadata_errors=True)


def _facts(info: AdapterInfo) -> Table:
    rows = {
        "base": info.base or "not recorded",
        **({"LoRA of the teacher, needed with it": info.teacher_lora} if info.teacher_lora else {}),
        "steps it was made for": info.steps,
        "shift": info.shift,
        "final step scale": info.final_step_scale,
        "guidance": _guidance(info),
        "modes (K)": info.modes,
        "LoRA": f"rank {info.rank} on {info.targets.replace('_', '-')} layers" if info.rank else "none",
        "made with": ", ".join(f"{package} {number}" for package, number in info.versions.items()) or "not recorded",
    }
    return Table(["", ""], [Line.of(name, prose(value)) for name, value in rows.items()])


def _guidance(info: AdapterInfo) -> str:
    """The guidance to draw with, in words."""
    if info.guidance is None:
        return "none"
    if info.guidance_range is None:
        return f"{info.guidance}"
    low, high = info.guidance_range
    return f"{low:g} to {high:g}, as you choose; {info.guidance:g} by default"


def _training(settings: Json, progress: Json) -> str:
    """What the record knows of its training, as Markdown; empty if nothing."""
    data, optim = settings.get("data", {}), settings.get("optim", {})
    step, batch, seconds, distance = (
        _number(part, name)
        for part, name in ((progress, "step"), (optim, "batch"), (progress, "seconds"), (progress, "distance"))
    )
    height, width = (_number(data, name) for name in ("height", "width"))
    rows = {
        "data": prose(f"prompts alone, of {data['prompts']}") if isinstance(data.get("prompts"), str) else None,
        "size": f"{width:.0f} x {height:.0f} pixels" if height is not None and width is not None else None,
        "iterations": f"{step:.0f} of {batch:.0f} samples each" if step is not None and batch is not None else None,
        "time": f"{seconds / 3600:.1f} h" if seconds is not None else None,
        "distance to the teacher": f"{distance:.4f}" if distance is not None else None,
        "command": _command(settings),
    }
    known = [Line.of(name, value) for name, value in rows.items() if value is not None]
    return Table(["", ""], known).markdown() if known else ""


def _number(record: Json, name: str) -> float | None:
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e15:
        return None
    return float(value)


def _command(settings: Json) -> str | None:
    """The command of a run, in a span of code; None of a record that does not tell it, or would end the span."""
    if "model" not in settings:
        return None
    try:
        line = run_command(settings)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return None if "`" in line or not line.isprintable() else f"`{line}`"


def push(folder: Path, repository: str, *, private: bool = False) -> str:
    """Put a folder on the Hugging Face Hub; the repository's address."""
    owner, _, name = repository.partition("/")
    if not owner or not name or "/" in name:
        raise ValueError(f"no repository {repository!r}: expected owner/name; correct --push")
    try:
        api = HfApi()
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="ArcFlow adapter")
    except (LocalTokenNotFoundError, HfHubHTTPError, HTTPError, OSError) as error:
        why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ValueError(
            f"{repository} was not pushed ({why}): expected a connection and a token that may write; "
            f"run `hf auth login`. The folder is ready in {folder}"
        ) from error
    return str(address)
