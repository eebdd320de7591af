"""What surrounds the code agrees with it: hooks, CI, versions, the site and its reference."""

import importlib
import importlib.util
import re
import tomllib
import typing
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import arcflow
from arcflow import cli, config, student

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PYTHONS = [line.split(" :: ")[-1] for line in PROJECT["project"]["classifiers"] if re.search(r":: 3\.\d+$", line)]


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def script(name: str) -> ModuleType:
    """A file of .ci, imported."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pins(text: str) -> dict[str, str]:
    return dict(re.findall(r"([a-z][a-z_-]+)==([\w.]+)", text))


def test_the_hooks_run_the_pinned_versions():
    hooks = pins(read(".pre-commit-config.yaml"))
    assert set(hooks) == {"ruff", "pyright"}
    assert hooks.items() <= pins(read("constraints.txt")).items()


def test_ci_runs_on_the_oldest_and_the_newest_python_that_is_claimed():
    jobs = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]
    (setup,) = (step["with"] for step in jobs["oldest"]["steps"] if "setup-python" in step.get("uses", ""))
    assert PROJECT["project"]["requires-python"] == f">={PYTHONS[0]}"
    assert [setup["python-version"], *jobs["newest"]["strategy"]["matrix"]["python"]] == PYTHONS
    assert f"Python {PYTHONS[0]} to {PYTHONS[-1]}" in read("docs/stability.md")


def test_the_oldest_torch_that_is_claimed_is_the_pinned_one():
    (torch,) = (line for line in PROJECT["project"]["dependencies"] if line.startswith("torch>="))
    oldest = re.findall(r">=([\d.]+)", torch)[0]
    assert pins(read("constraints.txt"))["torch"].startswith(f"{oldest}.")
    assert f"torch from {oldest} on" in read("docs/stability.md")


def test_a_tag_must_name_the_version_that_the_files_name(monkeypatch):
    version = script(".ci/version.py")
    texts = {name: read(name) for name in ("pyproject.toml", "src/arcflow/__init__.py", "CITATION.cff", "CHANGELOG.md")}
    texts["CHANGELOG.md"] = f"# Changelog\n\n## {arcflow.__version__}\n"
    monkeypatch.setattr(version, "read", texts.get)
    version.check(f"v{arcflow.__version__}")
    with pytest.raises(SystemExit, match=f"the tag says 9.9.9, pyproject.toml says {arcflow.__version__}"):
        version.check("v9.9.9")
    texts["CHANGELOG.md"] = f"# Changelog\n\n## {arcflow.__version__} (unreleased)\n"
    with pytest.raises(SystemExit, match="CHANGELOG.md says nothing"):
        version.check(f"v{arcflow.__version__}")


def test_the_citation_names_the_software_and_the_paper_it_implements():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["version"] == arcflow.__version__ and citation["license"] == PROJECT["project"]["license"]
    (paper,) = citation["references"]
    assert paper["identifiers"][0]["value"] == "arXiv:2602.09014"


def test_what_the_source_distribution_takes_along_is_there():
    for pattern in PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]:
        assert list(ROOT.glob(pattern.removeprefix("/"))), pattern


def pages(nav) -> typing.Iterator[str]:
    """The pages of a navigation, in order."""
    for entry in nav:
        for value in entry.values():
            yield from [value] if isinstance(value, str) else pages(value)


def test_every_document_is_in_the_navigation():
    nav = list(pages(yaml.safe_load(read("mkdocs.yml"))["nav"]))
    there = [path.relative_to(ROOT / "docs").as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]
    missing = [page for page in there if page not in nav]
    assert not missing, f"add to `nav` in mkdocs.yml: {missing}"
    assert len(set(nav)) == len(nav)


def documented(page: str) -> set[str]:
    """The names that a page of the reference shows."""
    shown = re.findall(
        r"^::: (\S+)(?:\n    options:\n      heading: (\S+))?", read(f"docs/reference/{page}.md"), re.MULTILINE
    )
    return {heading or name for name, heading in shown}


def test_the_reference_shows_the_stable_names_and_no_others():
    assert documented("arcflow") == {f"arcflow.{name}" for name in arcflow.__all__ if name != "__version__"}
    assert documented("student") == {f"arcflow.student.{name}" for name in student.__all__}
    assert documented("path") == {"arcflow.path.step_grid"}
    kinds = {
        kind.__name__ for kind in typing.get_type_hints(config.Run).values() if hasattr(kind, "__dataclass_fields__")
    }
    assert documented("config") == {f"arcflow.config.{name}" for name in kinds | {"Run"}}


def test_the_page_of_what_is_stable_names_what_the_reference_shows():
    rows = dict(re.findall(r"^\| \[`([\w.]+)`\]\S+ \| (.*) \|$", read("docs/stability.md"), re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", rows["arcflow"])) == set(arcflow.__all__)
    assert set(re.findall(r"`(\w+)`", rows["arcflow.student"])) == set(student.__all__)
    for name, row in rows.items():
        module = importlib.import_module(name)
        assert all(hasattr(module, word) for word in re.findall(r"`(\w+)`", row) if name != "arcflow.recipes"), name


def test_the_reference_shows_every_command():
    commands = {found.name for kind in typing.get_args(cli.Command) for found in kind.__metadata__}
    shown = re.findall(r"^```help\narcflow (\w+)", read("docs/reference/commands.md"), re.MULTILINE)
    assert set(shown) == commands
