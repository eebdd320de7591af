"""What of an adapter's record may be published: no place on this machine, and text that is only text.

A record's strings come from whoever made the adapter. In a model card they stand in prose, in tables, in code and in
YAML; each has its own way of being more than text.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from arcflow.student.record import AdapterInfo

HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""An id on the Hugging Face Hub: owner/name."""

NAMES = ("model.base", "model.teacher_lora", "data.prompts", "data.held_out", "data.embeddings")
"""Settings that name something, which may lie on this machine."""

PLACE = re.compile(r"[/~\\]|\.{1,2}[/\\]|[A-Za-z]:[/\\]|[a-z]+://")
"""How a place on a machine or a server begins."""

MARKS = re.compile(r"([\\`*_{}\[\]<>()#!&~$:@]|(?<=www)\.)")
"""What makes Markdown of a text, and links."""


def is_hub(name: str) -> bool:
    """Whether a name is that of a repository on the Hub, and of nothing that lies here."""
    return bool(HUB.fullmatch(name)) and not Path(name).exists()


def public_name(name: str) -> str:
    """A model or file without the folder it lies in; names that mean the same everywhere stay."""
    if name in ("", "world") or is_hub(name):
        return name
    last = PurePosixPath(name.replace("\\", "/")).name
    return re.sub(r"[^\w.-]+", "-", last).strip("-.") or "model"


def public_place(name: str) -> str:
    """A name as it stands in code: what lies on some machine lies elsewhere for others."""
    own = public_name(name)
    return own if is_hub(own) or own == "world" else f"path/to/{own or 'base'}"


def public(info: AdapterInfo) -> AdapterInfo:
    """The record without places on this machine."""
    training = dict(info.training)
    if isinstance(training.get("settings"), dict):
        training["settings"] = public_settings(training["settings"])
    lora = None if info.teacher_lora is None else public_name(info.teacher_lora)
    return dataclasses.replace(info, base=public_name(info.base), teacher_lora=lora, training=training)


def public_settings(settings: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Settings of a run without places on this machine."""
    found = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            value = public_settings(value, f"{prefix}{name}.")
        elif isinstance(value, str) and (PLACE.match(value) or (prefix + name in NAMES and "/" in value)):
            value = public_name(value)
        found[name] = value
    return found


def prose(text: object) -> str:
    """A text that is nothing but text in Markdown: one line, no markup, no HTML, no link."""
    return MARKS.sub(r"\\\1", " ".join(str(text).split()))


def code(text: str) -> str:
    """A text as a literal of Python and of JSON, in ASCII."""
    return json.dumps(text)


def fenced(settings: Mapping[str, object]) -> str:
    """Settings as JSON in which nothing ends a fence or begins a tag."""
    return json.dumps(settings, indent=2).replace("<", "\\u003c").replace("`", "\\u0060")
