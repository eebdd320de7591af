"""The page of claims says what the results say, and nothing where there are none."""

import json

import pytest

from arcflow.metrics.intervals import seed_difference, seed_interval
from arcflow.reports.claims import CLAIMS, FILES, findings, trained_share, write_claims


def means(distances, accuracy=0.8, diversity=1.0, curve=()):
    around = dict(seed_interval(distances)._asdict(), seeds=list(distances))
    same = {"mean": accuracy, "low": None, "high": None, "seeds": [accuracy]}
    spread = {"mean": diversity, "low": None, "high": None, "seeds": [diversity]}
    return {"distance": around, "accuracy": same, "diversity": spread, "curve": list(curve), "skills": {}, "broken": 0}


def comparison(ours, **others):
    """Results of `arcflow compare` at one and two calls, from distances of the trainings."""
    rows = {"arcflow": {"title": "ArcFlow", "second_network": False, "calls": {"1": means([0.5, 0.51]), "2": ours}}}
    for name, theirs in others.items():
        rows[name] = {"title": name, "second_network": False, "calls": {"2": theirs}}
    for row in rows.values():
        for calls, m in row["calls"].items():
            first = rows["arcflow"]["calls"][calls]["distance"]["seeds"]
            m["less_first"] = {"distance": seed_difference(m["distance"]["seeds"], first)._asdict()}
    return {"rows": rows, "first": "arcflow", "about": {"command": "arcflow compare --budget 7"}}


def found(folder, name, results):
    (folder / f"{name}.json").write_text(json.dumps(results))
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
    results = comparison(means([0.10, 0.11, 0.12]), dmd=near, orthogonal=near, linear=far)
    results["rows"]["dmd"]["second_network"] = True
    finding = found(tmp_path, "methods", results)[AHEAD]
    assert finding.holds == "holds" and "nearer: none" in finding.measured
    assert "made orthogonal over it, reach 0.0533" in finding.why
    results["rows"]["dmd"]["second_network"] = False
    finding = found(tmp_path, "methods", results)[AHEAD]
    assert finding.holds == "does not hold" and "nearer: dmd" in finding.measured


@pytest.mark.parametrize(
    ("reached", "holds"), [(20, "holds"), (50, "holds in part"), (100, "does not hold"), (None, "does not hold")]
)
def test_sooner_is_told_from_the_curves(tmp_path, reached, holds):
    curve = [[spent, 0.1 if reached and spent >= reached else 0.4] for spent in (10, 20, 50, 100)]
    twin = means([0.2, 0.21], curve=[[10, 0.5], [100, 0.2]])
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


def test_the_trained_share_is_that_of_the_published_adapters():
    assert trained_share("FluxTransformer2DModel", {"guidance_embeds": True}) == pytest.approx(
        652_405_884 / 11_901_408_320
    )


def test_the_page_names_the_commands_behind_it(tmp_path):
    (tmp_path / "methods.json").write_text(json.dumps(comparison(means([0.1, 0.11]), linear=means([0.3, 0.31]))))
    page = write_claims(tmp_path, tmp_path / "deep" / "claims.md").read_text()
    assert f"| {BENDS} | **holds** | distance 0.1050" in page
    assert "* `methods.json`: `arcflow compare --budget 7`" in page
