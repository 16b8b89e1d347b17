"""Tuning without Ray: what is searched, what is refused, and which trial is the best."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from renee_ray.config.overrides import dotted, make_config, parse_overrides, read_yaml
from renee_ray.config.schema import RunConfig
from renee_ray.config.tune import TABLE, TuneConfig, Values, search_space, with_settings
from renee_ray.errors import ConfigError, ReneeError
from renee_ray.report.tuning import tuning_text, write_tuning
from renee_ray.service.run.directory import RunDirectory
from renee_ray.service.tune import (
    Journal,
    Trial,
    TrialRun,
    best_of,
    parallel_trials,
    sampler,
    shown_values,
)

ROOT = Path(__file__).resolve().parents[1]
PLACES = {"data": "d", "output": "o"}


def searched(config: str, *overrides: str, label_texts: bool = True) -> dict[str, Values]:
    given = parse_overrides(overrides)
    made = make_config(TuneConfig, PLACES, read_yaml(config), given)
    return search_space(made, set(given.places), label_texts)


def test_the_table_is_about_the_recipe_and_what_is_given_is_not_searched() -> None:
    space = searched("quickstart", "encoder.dropout=0.1")
    assert space["classifier.learning_rate"] == pytest.approx((2e-4, 3.2e-3))
    assert space["epochs"] == (2, 8) and isinstance(space["epochs"][0], int)
    assert space["batch_size"] == [32, 64, 128]
    small = PLACES | {"batch_size": 4, "feed": {"streams": 1}, "num_workers": 3}
    found = search_space(make_config(TuneConfig, small), set(), True)
    assert found["batch_size"] == [4, 8], "each worker needs a row"
    assert space["encoder.bag.dropout"] == (0, 0.3)
    # Given; the transformer is frozen.
    assert not space.keys() & {"encoder.dropout", "encoder.learning_rate"}
    no_bag = searched("lf-amazontitles-131k", label_texts=False)
    assert "encoder.learning_rate" in no_bag
    assert not no_bag.keys() & {"encoder.bag.norm", "feed.augment", "evaluation.neighbour_weight"}


def test_every_end_of_the_table_is_a_setting_that_can_be_trained_with() -> None:
    for name in ("quickstart", "lf-debian-40k", "lf-amazontitles-131k", "perl-bag"):
        run = make_config(RunConfig, PLACES, read_yaml(name))
        own = dict(dotted(run.model_dump()))
        for key, values in searched(name).items():
            assert min(values) <= own[key] <= max(values), (name, key)
            for end in values:
                with_settings(run, {key: end}, name)


def test_a_space_of_ones_own() -> None:
    space = searched(
        "perl-bag", "table=false", "space.epochs=2..8", "space.classifier.learning_rate=1e-4..1e-2",
        "space.feed.filter_labels=[positive, negative]", "space.encoder.bag.dim=[256, 512]",
    )  # fmt: skip
    assert space == {
        "epochs": (2, 8),
        "classifier.learning_rate": (1e-4, 1e-2),
        "feed.filter_labels": ["positive", "negative"],
        "encoder.bag.dim": [256, 512],
    }
    shown = ["2..8", "0.0001..0.01", "[positive, negative]", "[256, 512]"]
    assert [shown_values(values) for values in space.values()] == shown


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("space.epochs=5", r"space\.epochs=5 is neither a range nor a list"),
        ("space.epochs=8..2", "neither a range nor a list"),
        ("space.epochs=2..x", "neither a range nor a list"),
        ("space.epochs=1.5..3", "neither a range nor a list"),
        ("space.epochs=[]", "neither a range nor a list"),
        ("space.batch_size=64..256", r"multiples of feed\.streams=8; give a list"),
        ("space.encoder.dropout=0..1", r"encoder\.dropout=1\.0 in space\.encoder\.dropout"),
        ("space.classifier.precision=[fp32, fp33]", "fp33"),
        ("space.encoder.droput=0..0.1", "did you mean 'encoder.dropout'"),
        ("space.data=[a, b]", "data cannot be searched"),
        ("space.evaluation.metric=[P@1, P@5]", "cannot be searched"),
        ("space.evaluation.tails=[0.1, 0.2]", "tails cannot be searched"),
        ("evaluation.tails=[0.1, 0.2]", r"evaluation\.tails out"),
        ("table=false", "nothing is searched"),
        ("trials=0", "trials='0'"),
        ("trails=3", "did you mean 'trials'"),
    ],
)
def test_what_cannot_be_searched_is_one_sentence(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        searched("perl-bag", override)


@pytest.mark.parametrize(
    ("overrides", "gpu", "have", "room"),
    [
        ("num_workers=2", False, {"CPU": 7}, 2),  # two workers and a reader each
        ("num_workers=2 cpus_per_worker=3", False, {"CPU": 15}, 2),
        ("num_workers=[1,4]", False, {"CPU": 3}, 1),
        ("num_workers=2", True, {"CPU": 16, "GPU": 8}, 4),
        ("num_workers=2 cpus_per_worker=4", True, {"CPU": 16, "GPU": 8}, 1),
    ],
)
def test_trials_are_as_many_as_have_room(
    overrides: str, gpu: bool, have: dict[str, float], room: int
) -> None:
    def counted(parallel: int) -> int:
        given = parse_overrides([*overrides.split(), f"parallel={parallel}"])
        return parallel_trials(make_config(TuneConfig, PLACES, given), gpu, have)

    assert counted(0) == counted(room) == room and counted(1) == 1
    with pytest.raises(ReneeError, match=f"parallel={room + 1}.*room for {room};"):
        counted(room + 1)


def test_without_optuna_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['optuna'] = None; import renee_ray.service.tune"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'renee_ray[tune]'" in done.stderr.splitlines()[-1]


def test_docs_show_the_table() -> None:
    page = (ROOT / "docs" / "tuning.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `([\w.]+)` +\| ([^|]+?) +\|", page, re.MULTILINE)
    ends = [(key, f"{low:g} to {high:g}{' times' * t}") for key, (low, high, t) in TABLE.items()]
    assert shown == ends


def ended(state: str, value: float | None = None, reason: str = "") -> Trial:
    return {"settings": OWN, "state": state, "value": value, "reason": reason, "results": []}


def test_the_best_is_the_first_of_the_finished_ones() -> None:
    states = [("finished", 40.0), ("stopped", 90.0), ("finished", 50.0), ("finished", 50.0)]
    assert best_of([ended(*each) for each in states], 100) == 2
    with pytest.raises(ReneeError, match="no room"):
        best_of([ended("running", 99.0), ended("failed", None, "no room")], 100)
    with pytest.raises(ReneeError, match="more hours"):
        best_of([ended("stopped", 99.0)], 100)


def test_the_settings_as_given_stay_unless_another_trial_is_ahead_by_a_standard_error() -> None:
    trials = [ended("finished", 46.34), ended("finished", 48.17)]
    assert best_of(trials, 328) == 0, "the standard error is 2.76"
    assert best_of(trials, 800) == 1, "1.77"
    assert best_of([ended("failed"), *trials], 328) == 2, "there is nothing to stay with"


SPACE: dict[str, Values] = {
    "classifier.learning_rate": (1e-4, 1e-1), "batch_size": [64, 128], "epochs": (1, 9),
}  # fmt: skip
OWN = {"classifier.learning_rate": 1e-3, "batch_size": 128, "epochs": 3}
BASE = with_settings(make_config(RunConfig, PLACES), OWN, "test")
IDENTITY = {"seed": 0, "space": {"epochs": "1..9"}}


class Begun(SimpleNamespace):
    """What Tune tells of a trial."""

    def __str__(self) -> str:
        return str(self.name)


def begin(journal: Journal, settings: dict[str, Any]) -> Begun:
    trial = Begun(config=settings, last_result={})
    trial.name = journal.name(trial)
    return trial


def tell(journal: Journal, trial: Begun, value: float, **more: Any) -> None:
    trial.last_result = {"value": value, "epoch": 1.0, "progress": 50.0, **more}
    journal.on_trial_result(trial, trial.last_result)


def test_a_search_that_goes_on_begins_with_what_was_cut_off(tmp_path: Path) -> None:
    directory, said = RunDirectory(str(tmp_path)), list[str]()
    journal = Journal(directory, IDENTITY, said.append)
    search = sampler(SPACE, BASE, journal)
    suggested = [search.suggest(str(i)) for i in range(4)]
    assert suggested[0] == OWN
    trials = [begin(journal, settings) for settings in suggested]
    assert [str(trial) for trial in trials] == [f"trial-00{i}" for i in range(4)]
    tell(journal, trials[0], 30.0)
    tell(journal, trials[0], 40.0)
    tell(journal, trials[0], 41.0, final=True)
    journal.on_trial_complete(trials[0])
    tell(journal, trials[1], 20.0)
    journal.on_trial_complete(trials[1])
    tell(journal, trials[2], 0.0, failed="too large")
    journal.on_trial_complete(trials[2])
    tell(journal, trials[3], 10.0)

    again = Journal(directory, IDENTITY, said.append)
    assert again.trials == journal.trials
    states = ["finished", "stopped", "failed", "running"]
    assert [trial["state"] for trial in again.trials] == states
    assert [each["value"] for each in again.trials[0]["results"]] == [30.0, 41.0]
    assert again.trials[2]["reason"] == "too large" and any("too large" in each for each in said)
    search = sampler(SPACE, BASE, again)
    first, second = search.suggest("a"), search.suggest("b")
    assert first == suggested[3] and second not in suggested
    assert [str(begin(again, settings)) for settings in (first, second)] == [
        "trial-003",
        "trial-004",
    ]
    with pytest.raises(ReneeError, match="is a search with seed=0 and not 1"):
        Journal(directory, IDENTITY | {"seed": 1}, said.append)


def test_a_search_over_lists_goes_on(tmp_path: Path) -> None:
    """JSON knows no tuples, which choices are."""
    directory, said = RunDirectory(str(tmp_path)), list[str]()
    journal = Journal(directory, IDENTITY, said.append)
    space: dict[str, Values] = {"encoder.lora.targets": [("q_proj", "v_proj"), "auto"]}
    for finished in (True, False):
        trial = begin(journal, {"encoder.lora.targets": ("q_proj", "v_proj")})
        tell(journal, trial, 30.0, final=finished)
        if finished:
            journal.on_trial_complete(trial)
    search = sampler(space, BASE, Journal(directory, IDENTITY, said.append))
    assert search.suggest("a") == {"encoder.lora.targets": ("q_proj", "v_proj")}


def test_later_trials_are_near_the_best(tmp_path: Path) -> None:
    """That Optuna learns from what it is told: seeds alone spread the rate over three decades."""

    def far(trials: list[Trial]) -> float:
        journal = Journal(RunDirectory(str(tmp_path)), {}, print)
        journal.trials = trials
        search = sampler(SPACE, BASE, journal)
        rates = [search.suggest(str(i))["classifier.learning_rate"] for i in range(12)]
        return sum(not 3e-3 < rate < 3e-2 for rate in rates) / len(rates)

    known = []
    for i in range(40):
        rate = 10 ** (-4 + 3 * i / 39)
        trial = ended("finished", 90.0 if 5e-3 < rate < 2e-2 else 10.0)
        known.append(trial | {"settings": OWN | {"classifier.learning_rate": rate}})
    assert far(known) < 0.5 < far([])


def test_the_page_is_self_contained_and_survives_trials_without_results(tmp_path: Path) -> None:
    results = [{"value": 30.0, "epoch": 1.0, "progress": 50.0}]
    trials = [ended("finished", 30.0) | {"results": results}, ended("failed", None, "<b>no</b>")]
    facts = {
        "best": 0, "metric": "P@1", "points": 300, "trials": trials,
        "space": {key: shown_values(values) for key, values in SPACE.items()},
    }  # fmt: skip
    write_tuning(str(tmp_path / "page.html"), facts)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Trial 0 of 2 is the best" in page and "0.0001..0.1" in page and "[64, 128]" in page
    assert "<b>no</b>" not in page and page.count("<script") == 1
    assert not re.search(r"(src|href)=\"http", page)
    assert page.count("<circle") == len(SPACE) + 1, "and one of the curve"


def test_the_page_shows_settings_that_have_no_order(tmp_path: Path) -> None:
    results = [{"value": 30.0, "epoch": 1.0, "progress": 50.0}]
    values = [None, [64, 128], 5, 0.25, "auto", True]
    trials = [
        ended("finished", 30.0) | {"settings": {"any": value}, "results": results}
        for value in values
    ]
    facts = {
        "best": 0, "metric": "P@1", "points": 300, "trials": trials, "space": {"any": "[...]"},
    }  # fmt: skip
    write_tuning(str(tmp_path / "page.html"), facts)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    axis = re.findall(r'y="142"[^>]*>([^<]*)<', page)
    assert axis == ["0.25", "[64, 128]"], "numbers first, the others by their text"


def test_paths_and_values_are_no_markup() -> None:
    trial = ended("finished", 1.0) | {"settings": {"encoder.name": "models/[v2]/x"}}
    facts = {"yaml": "/home/me/[/exp]/best.yaml", "metric": "P@1", "trials": [trial], "best": 0}
    console = Console(record=True, width=200)
    console.print(tuning_text(facts))
    shown = console.export_text()
    assert "/home/me/[/exp]/best.yaml" in shown and "models/[v2]/x" in shown


def test_a_trial_that_cannot_be_configured_says_why() -> None:
    class Alone(TrialRun):
        def setup(self, config: dict[str, Any], base: Any = None) -> None:
            super().setup(config, BASE.model_dump(exclude_unset=True))

    result = Alone({"epochs": -1}).step()
    assert result["done"] and "epochs=-1" in result["failed"]


def test_a_configuration_of_a_run_is_what_is_left_without_the_keys_of_the_search() -> None:
    layer = parse_overrides(["space.encoder.bag.dim=[256, 512]", "trials=4"])
    made = make_config(TuneConfig, PLACES, layer)
    assert made.space == {"encoder": {"bag": {"dim": ["256", "512"]}}} and made.trials == 4
    assert made.run == make_config(RunConfig, PLACES)
