"""`arcflow completion`: names of commands and options for the shell."""

from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Print a script with which the shell completes commands and options. bash: `source <(arcflow completion bash)`;
    zsh: `arcflow completion zsh > ~/.zfunc/_arcflow`."""

    shell: Positional[Literal["bash", "zsh", "tcsh"]]
    """The shell."""

    def run(self) -> None:
        """Whatever makes the command line prints it: `cli.main` hands the shell's name to its parser."""
        raise AssertionError("the command line answers this itself")
