"""Published latencies: what is fitted and what is not, and that the results file is what the code gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.published import __main__ as published
from benchmarks.published import judge
from benchmarks.published.fit import baseline, median, pairs
from benchmarks.published.latency import Model
from benchmarks.published.machines import KINDS, PER, Constants, names
from benchmarks.published.split import may_fit, read

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "published.json"


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return read()


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text())["results"]


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


def test_a_third_may_be_fitted_and_always_the_same(rows: list[dict[str, Any]]) -> None:
    ids = [row["id"] for row in rows]
    assert len(set(ids)) == len(ids) == 304
    assert sum(map(may_fit, ids)) == 91  # by a hash of the id: a row never moves from the test to the fit
    assert 91 <= len(ids) / 3


def test_every_row_is_there_with_an_error_or_a_reason(rows: list[dict[str, Any]], results: dict[str, Any]) -> None:
    assert [r["id"] for r in results["rows"]] == [r["id"] for r in rows]
    for made, row in zip(results["rows"], rows, strict=True):
        assert made["published"] == float(row["seconds"]) and made["fitted"] == may_fit(row["id"])
        assert made["reason"] or made["error"] is not None


def test_constants_are_few_and_within_bounds(results: dict[str, Any]) -> None:
    most = {"device": 3, "link": 2, "stack": 1}
    found: dict[tuple[str, str], list[str]] = {}
    for where, which, kind, value in results["constants"]:
        assert KINDS[kind].low <= value <= KINDS[kind].high
        found.setdefault((where, which), []).append(kind)
    for (where, _), kinds in found.items():
        assert len(kinds) == len(set(kinds)) <= most[where] and set(kinds) <= set(PER[where])
    assert results["summary"]["constants"] == sum(map(len, found.values()))


def test_only_fitted_rows_decide_which_constants_there_are(
    rows: list[dict[str, Any]], results: dict[str, Any], model: Model
) -> None:
    fitted = [r for r in rows if may_fit(r["id"]) and not judge.reason(r, rows, model.known(r))]
    assert {tuple(c[:3]) for c in results["constants"]} == set(names(fitted))


def test_the_results_file_is_what_its_constants_predict(
    rows: list[dict[str, Any]], results: dict[str, Any], model: Model
) -> None:
    constants = Constants({(a, b, c): value for a, b, c, value in results["constants"]})
    again = published.rows_of(model, rows, constants)
    for made, stored in zip(again, results["rows"], strict=True):
        assert made["reason"] == stored["reason"]
        assert made["error"] == pytest.approx(stored["error"], abs=2e-3)  # constants are stored to four digits
    summary = published.summary(results["rows"])
    for name, value in summary.items():
        assert results["summary"][name] == pytest.approx(value)
    ranking = published.ranking(rows, results["rows"])
    assert ranking == results["ranking"]


def test_what_is_not_explained_does_not_depend_on_a_prediction(rows: list[dict[str, Any]]) -> None:
    """Criteria read rows: a row's own seconds matter only where another source measured the same."""
    for row in rows:
        why = judge.reason(row, rows, known=True)
        alone = judge.reason(row | {"seconds": "1"}, [], known=True)
        assert why == alone or why.startswith("contradicted by")


def test_medians_baselines_and_pairs() -> None:
    assert median([3, 1, 2]) == 2 and median([4, 1, 2, 3]) == 2.5
    names = ("source", "model", "width", "height", "frames", "steps", "calls", "dtype", "device", "stack", "lowering")
    same = dict.fromkeys((*names, "ranks", "scope"), "1")
    plans = {"a": "1", "b": "2", "c": "1.01"}
    a, b, c = (same | {"id": plan, "plan": plan, "seconds": seconds} for plan, seconds in plans.items())
    assert pairs([a, b, c], {"a": 1.0, "b": 3.0, "c": 4.0}) == [("a", "b", True), ("b", "c", False)]
    assert baseline([a, b], [a], lambda row: 2.0) == {"a": 1.0, "b": 1.0}
