"""`arcflow prompts`: a list of diverse prompts, so that a first training needs no download."""

from dataclasses import dataclass
from pathlib import Path

from arcflow.config import check


@dataclass(frozen=True, kw_only=True)
class PromptList:
    """Write diverse prompts, made by a grammar, one a line: `train flux` reads prompts.txt. No two are alike."""

    count: int = 10_000
    """How many; docs/prompts.md says how many are enough."""
    seed: int = 0
    """The same seed gives the same list."""
    out: Path = Path("prompts.txt")
    """File to write; one that is there already is not overwritten."""

    def run(self) -> None:
        from arcflow.data.grammar import MOST, prompts
        from arcflow.system import files

        check(1 <= self.count <= MOST, "--count", self.count, f"1 to {MOST}", "take a public list for more")
        if self.out.exists():
            raise ValueError(f"{self.out} is there already: expected a new file; give another --out")
        files.write_text(self.out, "".join(f"{text}\n" for text in prompts(self.count, self.seed)))
        print(f"{self.count} prompts: {self.out}; train with --data.prompts {self.out}")
