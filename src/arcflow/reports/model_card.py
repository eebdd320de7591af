"""An adapter made ready for others: a folder in either layout, a model card written from its record, the Hub.

Nothing in the card is typed by hand. Base, steps, guidance and settings come from the adapter's own record, the curves
from the run's log, the table from a results.json of `arcflow evaluate`.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from arcflow import student
from arcflow.recipes import command
from arcflow.reports.side_by_side import curves_figure, markdown_table
from arcflow.student.adapter import found_at, load_adapter, save_adapter, write_adapter
from arcflow.student.formats import FILES, AdapterInfo, tensors_of
from arcflow.system import files

LICENCES: dict[str, dict[str, str]] = {
    "black-forest-labs/FLUX.1-dev": {
        "license": "other",
        "license_name": "flux-1-dev-non-commercial-license",
        "license_link": "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
    },
    "black-forest-labs/FLUX.2-dev": {
        "license": "other",
        "license_name": "flux-dev-non-commercial-license",
        "license_link": "https://huggingface.co/black-forest-labs/FLUX.2-dev/blob/main/LICENSE.txt",
    },
    "Qwen/Qwen-Image": {"license": "apache-2.0"},
    "world": {"license": "apache-2.0"},
}
"""What an adapter inherits from its base."""

CURVES = "curves.png"


def export(
    adapter: str,
    out: Path,
    *,
    layout: Literal["arcflow", "file", "published"] = "arcflow",
    transformer: Any = None,
    log: Path | None = None,
    results: Path | None = None,
    name: str = "owner/name",
) -> Path:
    """A folder that can be published: the adapter's files, README.md, and the curves if there is a log.

    Args:
        adapter: an adapter's folder or file, or one on the Hub.
        layout: "file" is ours in a single tensor file.
        transformer: the base's, needed to change the layout; it ends as it came.
        log: `log.jsonl` of the run that made it.
        results: `results.json` of `arcflow evaluate`.
        name: where it will be found, for the example in the card.
    """
    found = found_at(adapter)
    info, own = found.info, "published" if layout == "published" else "arcflow"
    target = out / FILES["arcflow"][0] if layout == "file" else out
    out.mkdir(parents=True, exist_ok=True)
    if found.layout == own == "arcflow":
        write_adapter(tensors_of(found), info, target)
    elif found.layout == own:
        for file in FILES[own]:
            files.write_atomic(out / file, lambda path, file=file: shutil.copyfile(found.weights.parent / file, path))
    elif transformer is None:
        raise ValueError(f"{adapter} is not in the layout {own!r}: expected its base to convert it; give --model")
    else:
        load_adapter(transformer, adapter, dtype=torch.float32)  # whatever the base has been read as
        save_adapter(transformer, target, info=info, layout=own)
        student.remove(transformer)
    lines = files.read_lines(log) if log else []
    if lines:
        files.write_bytes(out / CURVES, curves_figure(lines))
    table = markdown_table(json.loads(results.read_text("utf-8"))) if results else None
    text = str(card(info, name, table=table, curves=bool(lines)))
    files.write_text(out / "README.md", text)
    return out


def card(info: AdapterInfo, name: str, *, table: str | None = None, curves: bool = False) -> ModelCard:
    """The model card that an adapter's record makes.

    Args:
        table: results as Markdown.
        curves: whether the folder holds a picture of loss and distance.
    """
    licence: dict[str, Any] = LICENCES.get(info.base, {})
    based: dict[str, Any] = {"base_model": info.base, "base_model_relation": "adapter"}
    data = ModelCardData(
        **({} if info.base in ("world", "") else based),
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["arcflow", "distillation", "few-step", "flow-matching", "lora", "text-to-image"],
        **licence,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name.split('/')[-1]}",
        f"{info.steps} network calls for a picture from {info.base or 'its base'}: an ArcFlow adapter "
        f"(arXiv 2602.09014), which is a LoRA and a wider last layer.",
        "```python\nimport arcflow\nimport torch\nfrom diffusers import DiffusionPipeline\n\n"
        f'pipe = DiffusionPipeline.from_pretrained("{info.base or "the/base"}", dtype=torch.bfloat16).to("cuda")\n'
        + (f'pipe.load_lora_weights("{info.teacher_lora}")\n' if info.teacher_lora else "")
        + f'arcflow.attach(pipe, "{name}")\n'
        f'image = pipe("a red cube on a blue sphere", num_inference_steps={info.steps}).images[0]\n```',
        "## Licence",
        "That of the base, whose weights it goes on: "
        + (licence.get("license_link") or licence.get("license") or f"see {info.base or 'its card'}")
        + ".",
        "## What it is",
        _facts(info),
    ]
    if info.training:
        parts += ["## How it was trained", *_training(info.training)]
    if curves:
        parts.append(f"![Loss and distance to the teacher]({CURVES})")
    if table:
        parts += ["## Results", table]
    return ModelCard("\n\n".join(parts) + "\n", ignore_metadata_errors=True)


def _facts(info: AdapterInfo) -> str:
    rows = {
        "base": info.base or "not recorded",
        **({"LoRA of the teacher, needed with it": info.teacher_lora} if info.teacher_lora else {}),
        "steps it was made for": info.steps,
        "shift": info.shift,
        "final step scale": info.final_step_scale,
        "guidance": info.guidance if info.guidance is not None else "none",
        "modes (K)": info.modes,
        "LoRA": f"rank {info.rank} on {info.targets.replace('_', '-')} layers" if info.rank else "none",
        "made with": ", ".join(f"{package} {number}" for package, number in info.versions.items()) or "not recorded",
    }
    return _table(rows.items())


def _training(record: dict[str, Any]) -> list[str]:
    settings, progress = record.get("settings", {}), record.get("progress", {})
    data, optim = settings.get("data", {}), settings.get("optim", {})
    rows = {
        "data": f"prompts alone: {data['prompts']}" if "prompts" in data else None,
        "size": f"{data['width']} x {data['height']} pixels" if {"width", "height"} <= data.keys() else None,
        "iterations": f"{progress['step']} of {optim['batch']}" if "step" in progress and "batch" in optim else None,
        "time": f"{progress['seconds'] / 3600:.1f} h" if "seconds" in progress else None,
        "distance to the teacher": f"{progress['distance']:.4f}" if progress.get("distance") is not None else None,
    }
    told = [(name, value) for name, value in rows.items() if value is not None]
    if "model" in settings:
        told.append(("command", f"`{command(settings)}`"))
    whole = f"<details><summary>All settings</summary>\n\n```json\n{json.dumps(settings, indent=2)}\n```\n\n</details>"
    return [*([_table(told)] if told else []), *([whole] if settings else [])]


def _table(rows: Sequence[tuple[str, Any]] | Any) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def push(folder: Path, repository: str, *, private: bool = False) -> str:
    """Put a folder on the Hugging Face Hub; the repository's address."""
    owner, _, name = repository.partition("/")
    if not owner or not name or "/" in name:
        raise ValueError(f"no repository {repository!r}: expected owner/name; correct --push")
    try:
        api = HfApi()
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="ArcFlow adapter")
    except (LocalTokenNotFoundError, HfHubHTTPError, OSError) as error:
        why = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise ValueError(
            f"{repository} was not pushed ({why}): expected a connection and a token that may write; "
            f"run `hf auth login`. The folder is ready in {folder}"
        ) from error
    return str(address)
