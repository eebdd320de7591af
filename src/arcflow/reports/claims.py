"""The paper's claims and those of the project's own objective, each with a measurement: whether it holds, and why.

The published form (`PUBLISHED`) and the project's own (`OWN`) are told apart: what one reaches is not the other's.

Reads the files that other commands leave (`claim_files.FILES`) and writes one page. Nothing is typed in: a claim whose
file is not there is "not measured". Claims: arXiv 2602.09014, abstract and section 5.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from arcflow import paper
from arcflow.reports import claim_deciders as deciders
from arcflow.reports.claim_deciders import COEFFICIENTS, Claim, Finding, NotMeasured
from arcflow.reports.claim_files import FILES, Results, read_results
from arcflow.reports.page import write_page
from arcflow.reports.table import Line, Table

Claims = dict[str, tuple[Claim, tuple[str, ...]]]
"""Each claim, what decides it, and the files that it needs."""

PUBLISHED: Claims = {
    f"{paper.STEPS} calls instead of {paper.TEACHER_STEPS}, quality near the teacher": (
        deciders.two_calls,
        ("shipped",),
    ),
    f"About {paper.SPEEDUP} times faster": (deciders.faster, ("shipped",)),
    f"Under {100 * paper.TRAINED:.0f} % of the parameters are trained": (deciders.few_parameters, ()),
    "Ahead of its rivals at 2 calls and equal training": (deciders.ahead, ("methods",)),
    "Momentum beats straight lines at 2 calls": (deciders.momentum_helps, ("methods",)),
    "The closed form beats sub-stepped policies in time at equal quality": (
        deciders.closed_form,
        ("methods", "policies"),
    ),
    f"Converges over {paper.SOONER:.0f} times faster than TwinFlow": (deciders.converges, ("methods",)),
    "A LoRA converges sooner than full fine-tuning": (deciders.sooner_than_full, ("rank",)),
    "Diversity is kept": (deciders.diverse, ("methods",)),
    "Weak at 1 call": (deciders.weak_at_one, ("methods",)),
    "The class of paths is rich enough": (deciders.ideal, ("ideal", "shipped")),
}
"""The paper's."""

OWN: Claims = {
    **{
        f"First or tied at {n} call{'s' * (n > 1)}, in distance and accuracy": (
            partial(deciders.first_or_tied, calls=n),
            ("methods",),
        )
        for n in (1, 2, 4, 8)
    },
    "First or tied at 2 calls on four times the budget": (partial(deciders.first_or_tied, calls=2), ("fourfold",)),
    f"One call keeps {deciders.KEPT_BY_ONE:.0%} of the teacher's accuracy": (deciders.one_call, ("one",)),
    "Its bends beat straight lines at 2 calls": (deciders.bends_help, ("methods",)),
    "Where the published form ends after a third of its forward passes": (deciders.fewer_passes, ("methods", "third")),
    "Its diversity is kept": (partial(deciders.diverse, name=COEFFICIENTS), ("methods",)),
    "Nearer than the published form on a second bench": (deciders.on_digits, ("digits",)),
}
"""Those of the project's own objective."""

CLAIMS = PUBLISHED | OWN


def findings(folder: Path) -> dict[str, Finding]:
    """All claims against the files in a folder."""
    results = read_results(folder)
    return {claim: _decided(decide, needs, results) for claim, (decide, needs) in CLAIMS.items()}


def _decided(decide: Claim, needs: Sequence[str], results: Results) -> Finding:
    lacking = [name for name in needs if getattr(results, name) is None]
    if lacking:
        return _missing(lacking)
    try:
        return decide(*(getattr(results, name) for name in needs))
    except NotMeasured as error:
        return Finding("not measured", str(error))


def _missing(names: Sequence[str]) -> Finding:
    return Finding("not measured", "; ".join(f"{name}.json comes from `{FILES[name]}`" for name in names))


BADGES = {"holds": "holds", "holds in part": "part", "does not hold": "not", "not measured": "none"}
"""How each verdict looks on the page."""


def write_claims(folder: Path, path: Path) -> Path:
    """The claims as Markdown, from the results in `folder`, and beside it as a page of HTML."""
    found, results = findings(folder), read_results(folder)
    there = {name: getattr(results, name) for name in FILES if getattr(results, name) is not None}
    sources = {f"{name}.json": content.about.command for name, content in there.items()}
    parts = [{claim: found[claim] for claim in claims} for claims in (PUBLISHED, OWN)]
    published, own = (_table(part).markdown() for part in parts)
    write_page(path, "claims.md", folder=folder.as_posix(), published=published, own=own, sources=sources)
    published, own = parts
    write_page(path.with_suffix(".html"), "claims.html", published=published, own=own, badges=BADGES, sources=sources)
    return path


def _table(found: dict[str, Finding]) -> Table:
    lines = [Line.of(claim, f"**{f.holds}**", f.measured, f.why) for claim, f in found.items()]
    return Table(["claim", "", "measured here", "why"], lines)
