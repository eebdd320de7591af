"""`arcflow doctor`: what is installed, what is missing, how to get it.

Every line that finds something wrong ends in the command that puts it right. Torch is imported only if it is there, so
the report comes also when the installation is what is broken."""

import importlib.util
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from arcflow import __version__

if TYPE_CHECKING:
    from packaging.requirements import Requirement

    from arcflow.families.memory import Parts

EXTRAS = ("demo", "tensorboard")
"""Extras of the package that a user may miss."""


@dataclass(frozen=True)
class Diagnosis:
    """One line of the report; `remedy` says how to put right what is wrong, empty when nothing is."""

    name: str
    state: str
    remedy: str = ""
    required: bool = True


def diagnose(say: Callable[[str], object]) -> bool:
    """Say every finding; whether all that is required is here."""
    findings = [*_system(), *_packages(), *_devices(), *_assets()]
    for finding in findings:
        mark = "ok " if not finding.remedy else "!! " if finding.required else "-- "
        say(f"{mark} {finding.name:<18} {finding.state}" + (f"   -> {finding.remedy}" if finding.remedy else ""))
    missing = [finding for finding in findings if finding.remedy and finding.required]
    say("everything needed is here" if not missing else f"{len(missing)} things to put right, marked !!")
    return not missing


def _system() -> Iterator[Diagnosis]:
    yield Diagnosis("arcflow", __version__)
    yield Diagnosis("python", f"{platform.python_version()} on {platform.platform()}")
    yield Diagnosis("cpu", f"{os.cpu_count()} cores")
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        yield Diagnosis("memory", f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.0f} GB")
    yield Diagnosis("disk", f"{shutil.disk_usage('.').free / 1e9:.0f} GB free in {Path.cwd()}")


def _packages() -> Iterator[Diagnosis]:
    from packaging.requirements import Requirement

    for line in requires("arcflow") or []:
        requirement = Requirement(line)
        marker = requirement.marker
        needed = marker is None or marker.evaluate({"extra": ""})
        if needed or (marker and any(marker.evaluate({"extra": extra}) for extra in EXTRAS)):
            yield _package(requirement, needed)


def _package(requirement: "Requirement", needed: bool) -> Diagnosis:
    name = requirement.name
    wanted = str(requirement.specifier)
    install = f'pip install "{name}{wanted}"'
    try:
        found = version(name)
    except PackageNotFoundError:
        return Diagnosis(name, "missing", install, needed)
    if not requirement.specifier.contains(found, prereleases=True):
        return Diagnosis(name, f"{found}, expected {wanted}", install, needed)
    return Diagnosis(name, found)


def _devices() -> Iterator[Diagnosis]:
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    from arcflow.families.memory import MODELS

    yield Diagnosis("threads", f"{torch.get_num_threads()} for torch on the CPU")
    if torch.backends.mps.is_available():
        yield Diagnosis("mps", "available")
    for index in range(torch.cuda.device_count()):
        gigabytes = torch.cuda.get_device_properties(index).total_memory / 1e9
        yield Diagnosis(f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, {gigabytes:.0f} GB")
        for model, parts in MODELS.items():
            yield Diagnosis(f"  {model}", _way(parts, gigabytes))
    if not torch.cuda.device_count():
        yield Diagnosis(
            "cuda",
            "none",
            "the small world runs without; for the large models: `arcflow doctor --model flux`",
            required=False,
        )


def say_fit(model: str, say: Callable[[str], object]) -> None:
    """Say how a large model is sampled on cards of several sizes."""
    from arcflow.families.memory import CARDS, MODELS, VIDEOS, best, ways

    parts = MODELS[model]
    counts = VIDEOS.get(model, {})
    drawn = next((f"{frames} frames of 480 x 832" for frames, own in counts.items() if own == parts), "1024 x 1024")
    say(f"{model}, two steps at {drawn}: computed peak of each way (docs/memory.md says how to write it)")
    for way in ways(parts):
        say(f"  {way.gigabytes:5.1f} GB  {way.name}")
    for card in CARDS:
        say(f"card of {card} GB: {_way(parts, card)}")
    for frames, own in counts.items():
        fits = ", ".join(f"{card} GB --fit {way.fit}" for card in CARDS if (way := best(own, card)))
        say(f"{frames} frames: {next(ways(own)).gigabytes:.1f} GB with everything on the card; {fits}")


def _way(parts: "Parts", gigabytes: int | float) -> str:
    from arcflow.families.memory import best

    way = best(parts, gigabytes)
    return f"{way.name} ({way.gigabytes:.1f} GB, --fit {way.fit})" if way else "too small for any way"


def _assets() -> Iterator[Diagnosis]:
    assets = Path(__file__).parents[1] / "assets"
    for name, file, command in (
        ("shipped teacher", "teacher/model_index.json", "reinstall arcflow, or `arcflow world train`"),
        ("shipped adapter", "adapter/arcflow.json", "reinstall arcflow, or `arcflow train world`"),
        ("in one step", "adapter_one/arcflow.json", "reinstall arcflow, or `arcflow train world-one`"),
    ):
        there = (assets / file).is_file()
        yield Diagnosis(name, str((assets / file).parent) if there else "missing", "" if there else command)


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Report versions, devices and memory, and say what is missing and how to get it."""

    model: (
        Literal[
            "flux",
            "qwen-image",
            "qwen_image",
            "flux2",
            "flux3",
            "sd3",
            "z_image",
            "krea2",
            "chroma",
            "longcat_image",
            "lumina2",
            "qwen_image_21",
            "wan",
            "ltx",
            "ovis_image",
            "ernie_image",
        ]
        | None
    ) = None
    """Say instead how this large model fits cards of 12 to 80 GB; of a video model, by frames too."""
    json: bool = False
    """Print the report as JSON."""

    def run(self) -> None:
        if self.model:
            return say_fit(self.model.replace("-", "_"), print)
        if self.json:
            findings = [*_system(), *_packages(), *_devices(), *_assets()]
            print(json.dumps([asdict(one) for one in findings], indent=2))
            raise SystemExit(1 if any(one.remedy and one.required for one in findings) else 0)
        raise SystemExit(0 if diagnose(print) else 1)
