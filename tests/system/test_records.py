"""Records: what is written is what is read, and what does not fit is named."""

import json
from dataclasses import dataclass

import pytest

from arcflow.system import records


@dataclass(frozen=True, kw_only=True)
class Spot:
    value: float
    low: float | None
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Hole:
    why: str


@dataclass(frozen=True, kw_only=True)
class Found:
    names: list[str]
    spots: dict[int, Spot | Hole]
    curve: list[tuple[int, float]]
    ends: tuple[int, ...] = ()


FOUND = Found(
    names=["a"],
    spots={1: Spot(value=0.5, low=None), 12: Spot(value=1.0, low=0.5, note="x"), 2: Hole(why="too few")},
    curve=[(1, 0.5)],
    ends=(3, 1, 2),
)
STORED = {
    "names": ["a"],
    "spots": {"1": {"value": 0.5, "low": None}, "12": {"value": 1.0, "low": 0.5, "note": "x"}, "2": {"why": "too few"}},
    "curve": [[1, 0.5]],
    "ends": [3, 1, 2],
}


def test_a_record_goes_to_its_file_and_back(tmp_path):
    records.write(tmp_path / "deep" / "found.json", FOUND)
    assert (tmp_path / "deep" / "found.json").read_text() == json.dumps(STORED, indent=2) + "\n"
    assert records.read(Found, tmp_path / "deep" / "found.json") == FOUND


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"name": []}, r"unknown keys \['name'\], missing keys \[\]; expected names, spots, curve"),
        ({"names": "a"}, r"x: names is 'a'; expected list\[str\]"),
        ({"names": [1]}, r"names.0 is 1; expected str"),
        ({"spots": {"1": {"value": 1.0, "high": 1}}}, r"spots.1: unknown keys \['high'\], missing keys \['low'\]"),
        ({"spots": {"1": {"wy": "too few"}}}, r"spots.1: unknown keys \['wy'\], missing keys \['why'\]"),
        ({"spots": {"01": {"why": ""}}}, "spots.01 is no whole number"),
        ({"spots": {"1": 3}}, "spots.1 is 3; expected an object with value, low, note"),
        ({"spots": {"1": {"value": True, "low": None}}}, "spots.1.value is True; expected float"),
        ({"ends": [1, "2"]}, "ends.1 is '2'; expected int"),
        ({"curve": [[1, 0.5, 2]]}, "curve.0 is .* expected tuple"),
    ],
)
def test_what_does_not_fit_is_named(change, told):
    with pytest.raises(ValueError, match=told):
        records.record(Found, STORED | change, "x: ")


def test_a_whole_number_is_a_number():
    assert records.record(Spot, {"value": 1, "low": 0}) == Spot(value=1.0, low=0.0)


def test_a_file_that_is_no_json_is_named(tmp_path):
    (tmp_path / "found.json").write_text("{")
    with pytest.raises(ValueError, match=r"found.json is no JSON .*make the file again"):
        records.read(Found, tmp_path / "found.json")
