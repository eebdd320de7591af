"""What the site shows beside docs/: the README as its first page, the changelog, what a page links to, help texts.

Documents link to files as they lie in the repository, so that they can be read there. On the site every such file has a
place of its own, and the links lead to it."""

import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]

PLACES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
"""Files of the repository that are pages of the site under another name."""

LINK = re.compile(r"(\]\()([^)\s]+)(\))")

HELP = re.compile(r"^```help\n(arcflow[^\n]*)\n```$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The files of docs/, and all that they link to."""
    waiting = [*PLACES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    seen = set[str]()
    while waiting:
        source = waiting.pop()
        if source in seen:
            continue
        seen.add(source)
        if place(source) not in files.src_uris:
            files.append(File.generated(config, place(source), abs_src_path=str(ROOT / source)))
        if source.endswith(".md"):
            text = (ROOT / source).read_text("utf-8")
            linked = [beside(source, target) for _, target, _ in LINK.findall(text) if within(target)]
            waiting += [one for one in linked if (ROOT / one).is_file()]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with its links as the site needs them, and with the help texts it asks for."""
    own = page.file.src_uri
    source = next((name for name, uri in PLACES.items() if uri == own), None)
    if source is None:
        source = f"docs/{own}" if (ROOT / "docs" / own).exists() else own

    def moved(match: re.Match[str]) -> str:
        before, target, after = match.groups()
        if not within(target) or not (ROOT / beside(source, target)).is_file():
            return match[0]  # mkdocs says what is wrong with it
        path, mark, anchor = target.partition("#")
        there = posixpath.relpath(place(beside(source, path)), posixpath.dirname(own) or ".")
        return f"{before}{there}{mark}{anchor}{after}"

    return HELP.sub(told, LINK.sub(moved, markdown))


def within(target: str) -> bool:
    """Whether a link leads to another file of the repository."""
    return not urlsplit(target).scheme and not target.startswith("#")


def beside(source: str, target: str) -> str:
    """The file that a link means, from the root of the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target.partition("#")[0]))


def place(source: str) -> str:
    """Where a file of the repository is on the site."""
    return PLACES.get(source, source.removeprefix("docs/"))


def told(match: re.Match[str]) -> str:
    """What a command says of itself, as a block.

    Raises:
        PluginError: there is no such command.
    """
    words = match[1].split()[1:]
    run = subprocess.run(
        [sys.executable, "-m", "arcflow.cli", *words, "--help-all"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100", "NO_COLOR": "1"},
    )
    if run.returncode:
        raise PluginError(f"{match[1]} --help-all: {run.stderr.strip()}")
    return f"```text\n$ {match[1]} --help-all\n{run.stdout.rstrip()}\n```"
