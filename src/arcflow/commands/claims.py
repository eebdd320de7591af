"""`arcflow claims`: what of the paper holds."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional


@dataclass(frozen=True, kw_only=True)
class Claims:
    """Write the page of the paper's claims from results that lie in a folder."""

    folder: Positional[Path] = Path("out/compare")
    """Folder with methods.json, rank.json and what else there is."""
    out: Path = Path("out/claims.md")
    """The page as Markdown; as HTML it lies beside it."""

    def run(self) -> None:
        from arcflow.reports.claims import findings, write_claims

        if not self.folder.is_dir():
            raise ValueError(f"no folder {self.folder}: expected the results of `arcflow compare`; run that first")
        for claim, finding in findings(self.folder).items():
            print(f"{finding.holds:<16}{claim}: {finding.measured}")
        print(f"claims: {write_claims(self.folder, self.out)}")
