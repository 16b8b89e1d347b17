"""Tuning without Ray: what is searched, what is refused, and which trial is the best."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from renee_ray.config.grammar import Layer
from renee_ray.config.overrides import dotted, make_config, parse_overrides, read_yaml
from renee_ray.config.schema import RunConfig
from renee_ray.config.tune import (
    TABLE,
    Choice,
    Interval,
    TuneConfig,
    Values,
    search_space,
    with_settings,
)
from renee_ray.errors import ConfigError
from renee_ray.report.tuning import write_tuning
from renee_ray.service.tune.search import Search, Trial, best_of, to_json

ROOT = Path(__file__).resolve().parents[1]
PLACES = "data=d", "output=o"


def searched(config: str, *overrides: str, label_texts: bool = True) -> dict[str, Values]:
    given = parse_overrides([*PLACES, *overrides], TuneConfig)
    made = make_config(TuneConfig, read_yaml(config, TuneConfig), given)
    return search_space(made, set(given.places), label_texts)


def test_the_table_is_about_the_recipe_and_what_is_given_is_not_searched() -> None:
    space = searched("quickstart", "encoder.dropout=0.1")
    rate = space["classifier.learning_rate"]
    assert isinstance(rate, Interval) and rate.log
    assert (rate.low, rate.high) == pytest.approx((2e-4, 3.2e-3))
    assert space["epochs"] == Interval(2, 8, True)
    assert space["batch_size"] == Choice((32, 64, 128))
    assert space["encoder.bag.dropout"] == Interval(0, 0.3, False)
    # Given; the transformer is frozen.
    assert not space.keys() & {"encoder.dropout", "encoder.learning_rate"}
    no_bag = searched("lf-amazontitles-131k", label_texts=False)
    assert "encoder.learning_rate" in no_bag
    assert not no_bag.keys() & {"encoder.bag.norm", "feed.augment", "evaluation.neighbour_weight"}


def test_every_configuration_has_its_own_settings_among_the_values() -> None:
    for name in ("quickstart", "lf-debian-40k", "lf-amazontitles-131k", "perl-bag"):
        layer = read_yaml(name)
        run = make_config(RunConfig, {"data": "d", "output": "o"}, layer)
        own = dict(dotted(run.model_dump()))
        for key, values in searched(name).items():
            assert values.nearest(own[key]) == own[key], (name, key)
            ends = values.values if isinstance(values, Choice) else (values.low, values.high)
            for end in ends:
                with_settings(run, {key: end}, name)


def test_a_space_of_ones_own() -> None:
    space = searched(
        "perl-bag", "table=false", "space.epochs=2..8", "space.classifier.learning_rate=1e-4..1e-2",
        "space.feed.filter_labels=[positive, negative]", "space.encoder.dropout=0..0.5",
    )  # fmt: skip
    assert space == {
        "epochs": Interval(2, 8, True),
        "classifier.learning_rate": Interval(1e-4, 1e-2, False),
        "feed.filter_labels": Choice(("positive", "negative")),
        "encoder.dropout": Interval(0, 0.5, False),
    }
    assert not space["encoder.dropout"].log  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("space.epochs=5", r"space\.epochs=5 is neither a range nor a list"),
        ("space.epochs=8..2", "neither a range nor a list"),
        ("space.epochs=2..x", "neither a range nor a list"),
        ("space.epochs=1.5..3", "neither a range nor a list"),
        ("space.epochs=[]", "neither a range nor a list"),
        ("space.encoder.dropout=0..1", r"encoder\.dropout=1\.0 in space\.encoder\.dropout"),
        ("space.classifier.precision=[fp32, fp33]", "fp33"),
        ("space.encoder.droput=0..0.1", "did you mean 'encoder.dropout'"),
        ("space.data=[a, b]", "data cannot be searched"),
        ("space.evaluation.metric=[P@1, P@5]", "cannot be searched"),
        ("table=false", "nothing is searched"),
        ("trials=-1", "trials=-1"),
        ("trails=3", "did you mean 'trials'"),
    ],
)
def test_what_cannot_be_searched_is_one_sentence(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        searched("perl-bag", override)


def test_docs_show_the_table() -> None:
    page = (ROOT / "docs" / "tuning.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `([\w.]+)` +\| ([^|]+?) +\|", page, re.MULTILINE)
    times = {False: "{:g} to {:g}", True: "{:g} to {:g} times"}
    assert shown == [(row.key, times[row.times].format(row.low, row.high)) for row in TABLE]


def test_the_best_is_the_first_of_the_finished_ones() -> None:
    states = [("finished", 40.0), ("stopped", 90.0), ("finished", 50.0), ("finished", 50.0)]
    trials = [Trial({}, state, value) for state, value in states]
    assert best_of(trials) == 2
    assert best_of([Trial({}, "failed"), Trial({}, "running", 99.0)]) is None


SPACE = {"a": Interval(1e-4, 1e-1, False), "b.c": Choice((1, 2)), "d": Interval(1, 9, True)}
OWN = {"a": 1e-3, "b.c": 2, "d": 3}


class Called:
    """A search, and how often it wrote its trials."""

    def __init__(self, trials: list[Trial], deadline: float = 0.0) -> None:
        self.saved, self.said = 0, []  # type: ignore[var-annotated]
        self.trials = trials
        self.search = Search(SPACE, trials, OWN, 7, self.save, self.said.append, deadline)

    def save(self) -> None:
        self.saved += 1

    def ended(self, trial_id: str, value: float, **more: Any) -> None:
        result = {"value": value, "epoch": 2.0, "progress": 100.0, "training_iteration": 2, **more}
        self.search.on_trial_complete(trial_id, result)


def test_a_search_that_goes_on_begins_with_what_was_cut_off() -> None:
    first = Called([])
    suggested = [first.search.suggest(str(i)) for i in range(5)]
    assert suggested[0] == {"number": 0, "settings": OWN}
    assert [each["number"] for each in suggested] == [0, 1, 2, 3, 4]
    result = {"value": 30.0, "epoch": 1.0, "progress": 50.0, "training_iteration": 1}
    first.search.on_trial_result("0", result)
    first.ended("0", 41.0, final=True)
    first.ended("1", 20.0)
    first.ended("2", 0.0, failed="too large")
    first.ended("3", 10.0, unfinished=True)
    states = ["finished", "stopped", "failed", "running", "running"]
    assert [trial.state for trial in first.trials] == states
    assert [each["value"] for each in first.trials[0].results] == [30.0, 41.0]
    assert first.trials[2].reason == "too large" and any("too large" in s for s in first.said)
    assert first.saved >= 9

    again = Called([Trial(**each) for each in to_json(first.trials)])
    suggested_again = [again.search.suggest(f"x{i}") for i in range(3)]
    assert suggested_again[:2] == suggested[3:]
    assert suggested_again[2]["number"] == 5
    assert suggested_again[2]["settings"] not in [each["settings"] for each in suggested]


def test_no_trial_begins_after_the_first_has_failed_or_time_is_up() -> None:
    called = Called([])
    called.search.suggest("0")
    called.ended("0", 0.0, failed="no room")
    assert called.search.suggest("1") == called.search.FINISHED
    assert Called([], deadline=1.0).search.suggest("0") == called.search.FINISHED


def test_later_trials_are_near_the_best() -> None:
    """That Optuna learns from what it is told: seeds alone would spread `a` over three decades."""

    def far(trials: list[Trial]) -> float:
        called = Called(trials)
        found = [called.search.suggest(str(i))["settings"]["a"] for i in range(12)]
        return sum(not 3e-3 < a < 3e-2 for a in found) / len(found)

    values = [10 ** (-4 + 3 * i / 39) for i in range(40)]
    known = [
        Trial({"a": a, "b.c": 1, "d": 5}, "finished", 90.0 if 5e-3 < a < 2e-2 else 10.0)
        for a in values
    ]
    assert far(known) < 0.5 < far([])


def test_the_page_is_self_contained_and_survives_trials_without_results(tmp_path: Path) -> None:
    results = [{"value": 30.0, "epoch": 1.0, "progress": 50.0}]
    trials = [
        Trial(OWN, "finished", 30.0, "", results),
        Trial({"a": 2e-3, "b.c": 1, "d": 4}, "failed", None, "<b>no</b>"),
    ]
    facts = {
        "best": 0, "metric": "P@1", "points": 300, "log": ["a"], "trials": to_json(trials),
        "space": {key: str(values) for key, values in SPACE.items()}, "yaml": "y", "report": "r",
    }  # fmt: skip
    write_tuning(str(tmp_path / "page.html"), facts)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Trial 0 is the best of 2" in page and "0.0001..0.1" in page
    assert (
        "<b>no</b>" not in page
        and "<script" not in page
        and "http://" not in page.replace("http://www.w3.org", "")
    )
    assert page.count("<circle") == len(SPACE)


def test_a_layer_of_the_command_line_keeps_the_space_in_one_piece() -> None:
    layer: Layer = parse_overrides(["space.encoder.bag.dim=[256, 512]", "trials=4"], TuneConfig)
    made = make_config(TuneConfig, {"data": "d", "output": "o"}, layer)
    assert made.space == {"encoder": {"bag": {"dim": [256, 512]}}} and made.trials == 4
    assert made.run == make_config(RunConfig, {"data": "d", "output": "o"})
