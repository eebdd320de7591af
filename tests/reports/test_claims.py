"""The page of claims says what the results say, and nothing where there are none."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from arcflow.comparison.results import Apart, Comparison, ComparisonAbout, EntrantRow, Mean, Means, SeedMean
from arcflow.metrics.intervals import seed_difference, seed_interval
from arcflow.reports.claim_deciders import LARGE, trained_share
from arcflow.reports.claim_files import FILES, KINDS, read_results
from arcflow.reports.claims import CLAIMS, findings, write_claims
from arcflow.system import records

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def alone(value):
    return SeedMean(mean=value, low=None, high=None, seeds=[value])


def means(distances, accuracy=0.8, diversity=1.0, curve=()):
    around = SeedMean(**seed_interval(distances)._asdict(), seeds=list(distances))
    more = {"skills": {}, "curve": list(curve), "broken": 0, "pictures": [], "less_first": Apart()}
    return Means(distance=around, accuracy=alone(accuracy), diversity=alone(diversity), **more)


def comparison(ours, *doubled, **others):
    """Results of `arcflow compare` at one and two calls, from distances of the trainings; those of `doubled` have a
    second network."""
    about = {"versions": {}, "python": "3", "device": "x", "threads": 1, "command": "arcflow compare --budget 7"}
    sizes = {"budget": 7, "seeds": 3, "count": 4, "batch": 1, "prompts": 1}
    calls = {"arcflow": {1: means([0.5, 0.51]), 2: ours}} | {name: {2: theirs} for name, theirs in others.items()}

    def apart(n, m):
        first = calls["arcflow"][n].distance.seeds
        return replace(m, less_first=Apart(distance=Mean(**seed_difference(m.distance.seeds, first)._asdict())))

    titles = {name: "ArcFlow" if name == "arcflow" else name for name in calls}
    rows = {
        name: EntrantRow(
            title=titles[name],
            trained=1,
            calls={n: apart(n, m) for n, m in of.items()},
            second_network=name in doubled,
        )
        for name, of in calls.items()
    }
    return Comparison(rows=rows, first="arcflow", about=ComparisonAbout(**about, **sizes))


def found(folder, name, results):
    records.write(folder / f"{name}.json", results)
    return findings(folder)


AHEAD = "Ahead of its rivals at 2 calls and equal training"
BENDS, SOONER = "Momentum beats straight lines at 2 calls", "Converges over 4 times faster than TwinFlow"


@pytest.mark.parametrize(
    ("straight", "holds"),
    [([0.20, 0.21, 0.22], "holds"), ([0.10, 0.11, 0.12], "does not hold"), ([0.05, 0.05, 0.06], "does not hold")],
)
def test_a_claim_of_being_better_holds_only_outside_the_noise(tmp_path, straight, holds):
    results = comparison(means([0.10, 0.11, 0.12]), linear=means(straight))
    assert found(tmp_path, "methods", results)[BENDS].holds == holds


def test_ahead_of_its_rivals_leaves_out_second_networks_and_its_own_variant(tmp_path):
    near, far = means([0.05, 0.05, 0.06]), means([0.20, 0.21, 0.22])
    rivals = {"dmd": near, "orthogonal": near, "linear": far}
    results = comparison(means([0.10, 0.11, 0.12]), "dmd", **rivals)
    finding = found(tmp_path, "methods", results)[AHEAD]
    assert finding.holds == "holds" and "nearer: none" in finding.measured
    level = found(tmp_path, "methods", comparison(means([0.10, 0.11, 0.12]), linear=means([0.11, 0.12, 0.11])))[AHEAD]
    assert level.holds == "holds in part" and "as near within noise: linear" in level.measured
    assert "made orthogonal over it, reach 0.0533" in finding.why
    results = comparison(means([0.10, 0.11, 0.12]), **rivals)
    finding = found(tmp_path, "methods", results)[AHEAD]
    assert finding.holds == "does not hold" and "nearer: dmd" in finding.measured


@pytest.mark.parametrize(
    ("others", "holds"),
    [
        ({"linear": [0.11, 0.12, 0.11]}, "holds"),
        ({"linear": [0.05, 0.05, 0.06]}, "holds in part"),
        ({"arcflow": [0.05, 0.05, 0.06]}, "holds in part"),
    ],
)
def test_the_own_objective_is_first_or_tied_if_none_is_better_by_more_than_noise(tmp_path, others, holds):
    published = means(others.pop("arcflow", [0.20, 0.21, 0.22]))
    rivals = {name: means(distances) for name, distances in others.items()}
    results = comparison(published, coefficients=means([0.10, 0.11, 0.12]), **rivals)
    assert found(tmp_path, "methods", results)["First or tied at 2 calls, in distance and accuracy"].holds == holds


@pytest.mark.parametrize(
    ("reached", "holds"),
    [([0.09, 0.10, 0.11], "holds"), ([0.12, 0.13, 0.11], "holds in part"), ([0.20, 0.21, 0.22], "does not hold")],
)
def test_fewer_passes_are_told_from_trainings_of_that_budget(tmp_path, reached, holds):
    records.write(tmp_path / "third.json", comparison(means([0.3, 0.31, 0.32]), coefficients=means(reached)))
    finding = found(tmp_path, "methods", comparison(means([0.11, 0.12, 0.10])))
    assert finding["Where the published form ends after a third of its forward passes"].holds == holds


@pytest.mark.parametrize(
    ("reached", "holds"), [(20, "holds"), (50, "holds in part"), (100, "does not hold"), (None, "does not hold")]
)
def test_sooner_is_told_from_the_curves(tmp_path, reached, holds):
    curve = [(spent, 0.1 if reached and spent >= reached else 0.4) for spent in (10.0, 20.0, 50.0, 100.0)]
    twin = means([0.2, 0.21], curve=[(10.0, 0.5), (100.0, 0.2)])
    finding = found(tmp_path, "methods", comparison(means([0.1, 0.11], curve=curve), twinflow=twin))[SOONER]
    assert finding.holds == holds
    told = {100: "no sooner", None: "ends at 0.4000"}.get(reached, f"at least {100 / (reached or 1):.1f} times sooner")
    assert told in finding.measured


def test_what_was_not_run_is_not_measured_and_says_what_makes_it(tmp_path):
    everything = findings(tmp_path)
    for claim, (_, needs) in CLAIMS.items():
        assert (everything[claim].holds == "not measured") == bool(needs)
        assert all(f"`{FILES[name]}`" in everything[claim].measured for name in needs)
    partial = found(tmp_path, "methods", comparison(means([0.1, 0.11])))
    assert partial[BENDS].measured == "the results have no 'linear'"
    four = comparison(means([0.1, 0.11]))
    moved = replace(four.rows["arcflow"], calls={4: four.rows["arcflow"].calls[2]})
    partial = found(tmp_path, "methods", replace(four, rows={"arcflow": moved}))
    assert partial[BENDS].measured == "the results have 'arcflow' at no 2 calls"


@pytest.mark.parametrize("name", FILES)
def test_a_misspelt_key_is_named_and_not_taken_for_a_missing_measurement(tmp_path, name):
    text = (RESULTS / f"{name}.json").read_text("utf-8")
    key = {"shipped": "mse_to_teacher", "one": "mse_to_teacher", "ideal": "euler", "policies": "ratio"}.get(
        name, "distance"
    )
    (tmp_path / f"{name}.json").write_text(text.replace(f'"{key}"', f'"{key}s"', 1))
    with pytest.raises(ValueError, match=rf"{name}.json: .*unknown keys \['{key}s'\], missing keys \['{key}'\]"):
        findings(tmp_path)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_results_are_read_and_written_back_to_the_byte(tmp_path, path):
    from benchmarks import families, serving

    others = {"demo": KINDS["shipped"], "serving": serving.Measured, "families": families.Measured}
    kind = KINDS.get(path.stem, others.get(path.stem, Comparison))
    records.write(tmp_path / path.name, records.read(kind, path))
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_what_is_read_is_what_was_measured():
    results, stored = read_results(RESULTS), json.loads((RESULTS / "methods.json").read_text("utf-8"))
    assert (
        results.methods.rows["twinflow"].calls[2].distance.mean
        == stored["rows"]["twinflow"]["calls"]["2"]["distance"]["mean"]
    )


def test_the_trained_share_is_that_of_the_published_adapters():
    assert trained_share(LARGE["FLUX.1-dev"]) == pytest.approx(652_405_884 / 11_901_408_320)


def test_the_page_names_the_commands_behind_it(tmp_path):
    records.write(tmp_path / "methods.json", comparison(means([0.1, 0.11]), linear=means([0.3, 0.31])))
    page = write_claims(tmp_path, tmp_path / "deep" / "claims.md").read_text()
    assert f"| {BENDS} | **holds** | distance 0.1050" in page
    assert list(CLAIMS) == sorted(CLAIMS, key=page.index)
    assert page.index("## The published form") < page.index(BENDS) < page.index("## The project's own objective")
    assert "* `methods.json`: `arcflow compare --budget 7`" in page
