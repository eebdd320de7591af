"""The command line: one frozen dataclass per command, from which tyro makes the options and their help.

    arcflow demo      distill the shipped small teacher, compare, write a report
    arcflow train     distill with a recipe: world, world-quick, flux, flux-24gb, qwen-image, ...
    arcflow recipes   what a training costs: card, memory, hours
    arcflow prompts   a list of diverse prompts to train on
    arcflow cache     embeddings of prompts on disk: make, verify
    arcflow serve     an images server in OpenAI's protocol, with a page
    arcflow sample    prompts to PNG files in a few steps
    arcflow evaluate  teacher, plain Euler and student side by side
    arcflow compare   few-step methods on one bench and one budget
    arcflow claims    the paper's claims against what came out
    arcflow export    an adapter in either layout, with a model card; on the Hub if wanted
    arcflow world     the built-in world: render, check, train and score its teacher
    arcflow doctor    what is installed, what is missing, how to get it
    arcflow completion  names of commands and options for the shell

Nothing heavy is imported before a command runs, so help is instant. What a user can put right is told in a sentence,
without a traceback (`python -X dev -m arcflow.cli ...` shows it). Exit codes: 1 for an error, 2 for a command line that
is none, 130 and 143 for Ctrl-C and SIGTERM.
"""

import contextlib
import difflib
import io
import os
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Annotated, Any, get_args

import tyro
from tyro.conf import OmitSubcommandPrefixes, subcommand

from arcflow import __version__
from arcflow.commands.cache import CacheCommand
from arcflow.commands.claims import Claims
from arcflow.commands.compare import Compare
from arcflow.commands.completion import Completion
from arcflow.commands.demo import Demo
from arcflow.commands.doctor import Doctor
from arcflow.commands.evaluate import Evaluate
from arcflow.commands.examples import examples
from arcflow.commands.export import Export
from arcflow.commands.given import completed
from arcflow.commands.prompts import PromptList
from arcflow.commands.recipes import Recipes
from arcflow.commands.sample import Sample
from arcflow.commands.screens import ALL, SUMMARY, screen
from arcflow.commands.serve import Serve
from arcflow.commands.spelling import foreign, modern
from arcflow.commands.train import Train
from arcflow.commands.world import World
from arcflow.system.errors import sentence
from arcflow.system.signals import end_with_parent

Command = (
    Annotated[Demo, subcommand("demo")]
    | Annotated[Train, subcommand("train")]
    | Annotated[Recipes, subcommand("recipes")]
    | Annotated[PromptList, subcommand("prompts")]
    | Annotated[CacheCommand, subcommand("cache")]
    | Annotated[Sample, subcommand("sample")]
    | Annotated[Serve, subcommand("serve")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Claims, subcommand("claims")]
    | Annotated[Export, subcommand("export")]
    | Annotated[World, subcommand("world")]
    | Annotated[Doctor, subcommand("doctor")]
    | Annotated[Completion, subcommand("completion")]
)


def subcommands(union: object) -> dict[str, type]:
    """The members of a union that are subcommands, by their names."""
    mark = type(subcommand())
    members = [one for one in get_args(union) if isinstance(getattr(one, "__metadata__", (None,))[0], mark)]
    return {one.__metadata__[0].name: one.__origin__ for one in members}


COMMANDS = subcommands(Command)
"""Every command by its name."""

CHOICES = {(): [*COMMANDS]} | {
    (name,): [*found]
    for name, command in COMMANDS.items()
    for one in fields(command)
    if (found := subcommands(one.type))
}
"""Commands and what may follow them, for `did_you_mean`."""


def did_you_mean(words: Sequence[str]) -> str | None:
    """A message when a command is misspelt; None when all of them are known."""
    for before, known in CHOICES.items():
        depth = len(before)
        if tuple(words[:depth]) != before or len(words) <= depth or words[depth].startswith("-"):
            continue
        word = words[depth]
        if word not in known:
            close = difflib.get_close_matches(word.replace("_", "-"), known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(known)}"
            return f"{' '.join(('arcflow', *before))}: no {word!r} here; {hint}"
    return None


def parsed(words: Sequence[str]) -> Any:
    """The command that a line asks for. Only the one that is named reads its options, so that hints are about it."""
    name = words[0] if words else ""
    said, shown = io.StringIO(), io.StringIO()
    asked = "--help" in words or "-h" in words
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(shown if asked else sys.stdout):
            if name in COMMANDS:
                kind, rest = COMMANDS[name], words[1:]
                return tyro.cli(kind, prog=f"arcflow {name}", args=rest, config=(OmitSubcommandPrefixes,))
            return tyro.cli(Command, prog="arcflow", description=SUMMARY, args=words, config=(OmitSubcommandPrefixes,))
    except SystemExit as stop:
        print(plainly(shown.getvalue()), end="")
        if stop.code == 0 and asked and (lines := examples(name if name in COMMANDS else "")):
            print(f"\n{lines}", end="")
        print(in_options(said.getvalue(), name), end="", file=sys.stderr)
        raise


def plainly(text: str) -> str:
    """The parser's help without what only a programmer reads: `{None}|INT` is INT, and nothing is no default."""
    usage, rest = text.partition("\n\n")[::2]
    boxed = re.sub(r"\{None\}\|(\S+)", lambda found: found[1] + " " * 7, rest)
    boxed = boxed.replace("[STR [STR ...]]", "STR STR ...    ").replace("[INT [INT ...]]", "INT INT ...    ")
    boxed = boxed.replace("(default: )", " " * 11)
    return re.sub(r"\{None\}\|", "", usage) + ("\n\n" + boxed if rest else "")


def in_options(text: str, command: str) -> str:
    """What the parser says, in the user's spelling; a wrong value is one line without a box."""
    if "Value error" not in text:
        return text
    plain = re.sub(r"\x1b\[[0-9;]*m|[\u2500-\u257f|]|^\+-.*$|-{3,}", "", text, flags=re.MULTILINE)
    lines = [line.strip() for line in plain.splitlines()]
    kept = " ".join(line for line in lines if line and "helptext" not in line and line != "Value error")
    said = re.sub(r"^Error parsing \S+: ", "", kept)
    said = re.sub(r"^(\w+(?:\.\w+)*) = ", lambda found: f"--{found[1].replace('_', '-')} = ", said)
    said = re.sub(r"set model\.lora to False", "say --model.no-lora", said)
    words = r"(?<![\w.-])((?:model|distill|data|optim)\.\w+)"
    said = re.sub(words, lambda found: f"--{found[1].replace('_', '-')}", said)
    return f"arcflow {command}: {said}\nAll options: arcflow {command} --help-all\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; an error that a user can mend is one line, without a traceback."""
    end_with_parent()
    words = list(sys.argv[1:] if argv is None else argv)
    if words == ["--version"]:
        print(f"arcflow {__version__}")
        return
    words, old = modern(words)
    try:
        words, more = completed(words)
    except ValueError as error:
        print(f"arcflow: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    for name in old + more:
        print(f"arcflow {words[0]}: {name}", file=sys.stderr)
    if message := did_you_mean(words) or foreign(words):
        print(message, file=sys.stderr)
        raise SystemExit(2)
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # what they warn of at every start, no user can act on
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    if shown := screen(words, COMMANDS):
        print(shown, end="")
        raise SystemExit(0)
    words = ["--help" if word == ALL else word for word in words]
    try:
        command = parsed(words)
        if isinstance(command, Completion):
            parsed(["--tyro-print-completion", command.shell])
        command.run()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read what is printed has had enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + 13) from None
    except KeyboardInterrupt as error:
        if sys.flags.dev_mode:
            raise
        print("arcflow: interrupted", file=sys.stderr)
        raise SystemExit(getattr(error, "code", 128 + signal.SIGINT)) from None
    except Exception as error:
        said = None if sys.flags.dev_mode else sentence(error)
        if said is None:
            raise
        print("arcflow:", said, file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
