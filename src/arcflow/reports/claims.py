"""The paper's claims, each with a measurement of ours: whether it holds, by what numbers, and why.

Reads the files that other commands leave (see `FILES`) and writes one page. Nothing is typed in: a claim whose file is
not there is "not measured". A difference counts only if its interval over the trainings leaves out 0. Claims: arXiv
2602.09014, abstract and section 5.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from arcflow.comparison.results import verdict
from arcflow.student import layers
from arcflow.system import files

Holds = Literal["holds", "holds in part", "does not hold", "not measured"]

FILES = {
    "methods": "arcflow compare",
    "rank": "arcflow compare --study rank --calls 2",
    "shipped": "arcflow evaluate --count 1024",
    "ideal": "python -m benchmarks.ideal",
    "policies": "python -m benchmarks.policies",
}
"""What is read, and the command that makes it."""

KEPT = 0.95
"""Share of the teacher's diversity, or accuracy, from which it counts as kept."""

MENDED = "orthogonal"
"""Our variant of ArcFlow in the comparison of the methods."""

LARGE = {
    "FLUX.1-dev": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "Qwen-Image": ("QwenImageTransformer2DModel", {}),
}
"""The large models: their classes' own defaults, but for guidance."""

Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Finding:
    """What came out."""

    holds: Holds
    measured: str
    why: str = ""


Claim = Callable[[Results], Finding]


def two_calls(results: Results) -> Finding:
    """Two network calls draw what took the teacher 50."""
    ours, teacher = results["shipped"]["arcflow_2"], results["shipped"]["teacher_50"]
    euler = results["shipped"]["euler_4"]
    share = ours["accuracy"]["overall"] / teacher["accuracy"]["overall"]
    measured = (
        f"{ours['nfe']} calls instead of {teacher['nfe']}; accuracy {ours['accuracy']['overall']:.1%} of the teacher's "
        f"{teacher['accuracy']['overall']:.1%}, distance {ours['mse_to_teacher']:.3f} (Euler in 4 calls "
        f"{euler['mse_to_teacher']:.3f})"
    )
    why = f"The shipped student reaches {share:.1%} of the teacher's accuracy; {KEPT:.0%} would count as its quality."
    return Finding("holds" if share >= KEPT else "holds in part", measured, why)


def faster(results: Results) -> Finding:
    """About 40 times faster."""
    ours, teacher = results["shipped"]["arcflow_2"], results["shipped"]["teacher_50"]
    network = teacher["seconds"]["transformer"] / ours["seconds"]["transformer"]
    whole = teacher["seconds_per_image"] / ours["seconds_per_image"]
    measured = f"transformer {network:.0f} times, the whole pipeline {whole:.0f} times less time an image"
    why = (
        "Calls are 25 times fewer for FLUX.1 (50 to 2) and 50 times for Qwen-Image, whose teacher takes two a step for "
        "its guidance: 40 is between them. Text encoders and decoder stay, and bound what the pipeline gains."
    )
    return Finding("holds in part" if network < 40 else "holds", measured, why)


def few_parameters(results: Results) -> Finding:
    """Under 5 % of the parameters are trained."""
    shares = {name: trained_share(*model) for name, model in LARGE.items()}
    measured = ", ".join(f"{name} {share:.2%}" for name, share in shares.items())
    under = [share < 0.05 for share in shares.values()]
    holds: Holds = "holds" if all(under) else "holds in part" if any(under) else "does not hold"
    return Finding(holds, measured, "Counted on the networks at full size, LoRA of rank 256 and 16 modes as published.")


def trained_share(transformer: str, changes: dict[str, Any]) -> float:
    """Trained numbers over those of the base, from shapes alone."""
    import diffusers

    with torch.device("meta"):
        net = getattr(diffusers, transformer)(**changes)
    trained = sum(int(np.prod(shape)) for shape in layers.shapes(net, modes=16, rank=256).values())
    return trained / sum(p.numel() for p in net.parameters())


def ahead(results: Results) -> Finding:
    """At equal training, no method without a second network is nearer to the teacher or right more often."""
    rows, first = results["methods"]["rows"], results["methods"]["first"]
    rivals = {n: row["calls"]["2"] for n, row in rows.items() if n not in (first, MENDED) and not row["second_network"]}
    nearer = [rows[name]["title"] for name, means in rivals.items() if verdict(means, "distance") == "lower"]
    truer = [rows[name]["title"] for name, means in rivals.items() if verdict(means, "accuracy") == "higher"]
    ours = rows[first]["calls"]["2"]
    measured = (
        f"distance {_number(ours, 'distance')}, accuracy {ours['accuracy']['mean']:.1%}; "
        f"beyond noise nearer: {', '.join(nearer) or 'none'}; more often right: {', '.join(truer) or 'none'}"
    )
    holds: Holds = "does not hold" if nearer else "holds in part" if truer else "holds"
    return Finding(holds, measured, mended(rows))


def mended(rows: dict[str, Any]) -> str:
    """What the same method reaches with functions of time that are independent over the step."""
    if MENDED not in rows:
        return ""
    means = rows[MENDED]["calls"]["2"]
    return (
        f"Sixteen exponentials are nearly the same function over a step, which an optimizer feels: four of them, made "
        f"orthogonal over it, reach {_number(means, 'distance')} and {means['accuracy']['mean']:.1%}."
    )


def bends(results: Results) -> Finding:
    """Momentum beats straight lines at 2 calls."""
    return _against(results, "linear", "The same network, objective and budget; only the path of a call is straight.")


def _against(results: Results, other: str, why: str, calls: str = "2") -> Finding:
    rows = results["methods"]["rows"]
    ours, theirs = rows[results["methods"]["first"]]["calls"][calls], rows[other]["calls"][calls]
    apart = verdict(theirs, "distance")
    holds: Holds = "holds" if apart == "higher" else "does not hold"
    more = f"; within noise ({len(ours['distance']['seeds'])} trainings)" if apart == "same" else ""
    measured = (
        f"distance {_number(ours, 'distance')} against {_number(theirs, 'distance')}, accuracy "
        f"{ours['accuracy']['mean']:.1%} against {theirs['accuracy']['mean']:.1%}{more}"
    )
    return Finding(holds, measured, why)


def _number(means: dict[str, Any], what: str) -> str:
    value = means[what]
    if value["low"] is None:
        return f"{value['mean']:.4f}"
    return f"{value['mean']:.4f} [{value['low']:.4f}, {value['high']:.4f}]"


def closed_form(results: Results) -> Finding:
    """The closed form beats sub-stepped policies in time at equal quality."""
    times = results["policies"]
    quality = [_against(results, name, "") for name in ("piflow_gm", "piflow_dx")]
    measured = (
        f"a step at FLUX size takes {times['gm']['ratio']:.0f} (GMFlow) and {times['dx']['ratio']:.0f} times (DX) "
        f"ours; quality: {quality[0].measured} (GMFlow), {quality[1].measured} (DX)"
    )
    faster_step = min(times["gm"]["ratio"], times["dx"]["ratio"]) > 1
    rows = results["methods"]["rows"]
    as_good = all(verdict(rows[name]["calls"]["2"], "distance") != "lower" for name in ("piflow_gm", "piflow_dx"))
    holds: Holds = "holds" if faster_step and as_good else "holds in part" if faster_step else "does not hold"
    return Finding(holds, measured, "The step is a small part of a call on a large network in either case.")


def converges(results: Results) -> Finding:
    """It converges over four times faster than TwinFlow at equal training."""
    return _sooner(results["methods"]["rows"], "arcflow", "twinflow")


def sooner_than_full(results: Results) -> Finding:
    """A LoRA and a head converge faster than training every weight."""
    return _sooner(results["rank"]["rows"], "arcflow", "full", factor=1.0)


def _sooner(rows: dict[str, Any], name: str, other: str, factor: float = 4.0) -> Finding:
    ours, theirs = (rows[entrant]["calls"]["2"] for entrant in (name, other))
    end = theirs["curve"][-1]
    reached = [spent for spent, distance in ours["curve"] if distance <= end[1]]
    if not reached:
        best = min(distance for _, distance in ours["curve"])
        measured = f"it ends at {best:.4f}, the other at {end[1]:.4f} on the same budget"
        return Finding("does not hold", measured)
    ratio = end[0] / reached[0]
    measured = (
        f"after {reached[0]:,.0f} of {end[0]:,.0f} forward-equivalents it is where the other is at the end "
        f"({end[1]:.4f}): " + (f"at least {ratio:.1f} times sooner" if ratio > 1 else "no sooner")
    )
    holds: Holds = "does not hold" if ratio == 1 else "holds" if ratio >= factor else "holds in part"
    return Finding(holds, measured, "Measured at a few points of the budget.")


def diverse(results: Results) -> Finding:
    """Diversity is kept."""
    rows = results["methods"]["rows"]
    ours = rows["arcflow"]["calls"]["2"]["diversity"]
    others = ", ".join(
        f"{rows[n]['title']} {rows[n]['calls']['2']['diversity']['mean']:.2f}" for n in rows if n != "arcflow"
    )
    measured = f"{ours['mean']:.3f} of the teacher's, at 2 calls (others: {others})"
    return Finding("holds" if ours["mean"] >= KEPT else "does not hold", measured, "1 is the teacher's own.")


def weak_at_one(results: Results) -> Finding:
    """One call is weak, the open problem the authors name."""
    calls = results["methods"]["rows"]["arcflow"]["calls"]
    one, two = calls["1"], calls["2"]
    best = min(
        (row for row in results["methods"]["rows"].values() if "1" in row["calls"] and not row["second_network"]),
        key=lambda row: row["calls"]["1"]["distance"]["mean"],
    )
    measured = (
        f"trained for 1 call: distance {_number(one, 'distance')}, accuracy {one['accuracy']['mean']:.1%}; for 2: "
        f"{_number(two, 'distance')}, {two['accuracy']['mean']:.1%}. Nearest at 1 call: {best['title']}, "
        f"{_number(best['calls']['1'], 'distance')}"
    )
    weaker = one["distance"]["low"] is None or one["distance"]["low"] > two["distance"]["high"]
    return Finding("holds" if weaker else "does not hold", measured)


def ideal(results: Results) -> Finding:
    """K modes can follow the teacher's path, were it not for the network."""
    bound, ours = results["ideal"]["calls"]["2"], results["shipped"]["arcflow_2"]["mse_to_teacher"]
    modes = ", ".join(f"K = {k} {end:.1g}" for k, end in bound["modes"].items())
    measured = f"mixtures fitted to single paths end at {modes} in 2 calls; the shipped student at {ours:.3f}"
    why = "What is missing is what the network has not learned; even an ideal straight line is far closer than it."
    line = bound["modes"]["1"]
    return Finding("holds" if bound["modes"]["16"] < ours else "does not hold", measured, why if line < ours else "")


CLAIMS: dict[str, tuple[Claim, tuple[str, ...]]] = {
    "2 calls instead of 50, quality near the teacher": (two_calls, ("shipped",)),
    "About 40 times faster": (faster, ("shipped",)),
    "Under 5 % of the parameters are trained": (few_parameters, ()),
    "Ahead of its rivals at 2 calls and equal training": (ahead, ("methods",)),
    "Momentum beats straight lines at 2 calls": (bends, ("methods",)),
    "The closed form beats sub-stepped policies in time at equal quality": (closed_form, ("methods", "policies")),
    "Converges over 4 times faster than TwinFlow": (converges, ("methods",)),
    "A LoRA converges sooner than full fine-tuning": (sooner_than_full, ("rank",)),
    "Diversity is kept": (diverse, ("methods",)),
    "Weak at 1 call": (weak_at_one, ("methods",)),
    "The class of paths is rich enough": (ideal, ("ideal", "shipped")),
}
"""Each claim, what decides it, and the files that it needs."""


def findings(folder: Path) -> dict[str, Finding]:
    """All claims against the files in a folder."""
    results = {
        name: json.loads(path.read_text("utf-8")) for name in FILES if (path := folder / f"{name}.json").is_file()
    }
    found = {}
    for claim, (decide, needs) in CLAIMS.items():
        lacking = [name for name in needs if name not in results]
        found[claim] = _missing(lacking) if lacking else _decided(decide, results)
    return found


def _decided(decide: Claim, results: Results) -> Finding:
    try:
        return decide(results)
    except KeyError as error:  # a comparison of some entrants or calls only
        return Finding("not measured", f"the results have no {error.args[0]!r}")


def _missing(names: Sequence[str]) -> Finding:
    return Finding("not measured", "; ".join(f"{name}.json comes from `{FILES[name]}`" for name in names))


def write_claims(folder: Path, path: Path) -> Path:
    """The page, from the results in `folder`."""
    found = findings(folder)
    lines = [
        "# The claims",
        "",
        f"Written by `arcflow claims {folder.as_posix()}` from the results there. The bench is the small FLUX that",
        "comes with the package ([the world](world.md)), unless another model is named; [what they mean](metrics.md).",
        "A difference is called one only if its 95 % interval over the trainings leaves out 0.",
        "",
        "| claim | | measured here | why |",
        "|---|---|---|---|",
        *(f"| {claim} | **{f.holds}** | {f.measured} | {f.why} |" for claim, f in found.items()),
        "",
    ]
    for name in FILES:
        source = folder / f"{name}.json"
        if source.is_file():
            made = json.loads(source.read_text("utf-8")).get("about", {}).get("command", FILES[name])
            lines.append(f"* `{name}.json`: `{made}`")
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, "\n".join(lines) + "\n")
    return path
