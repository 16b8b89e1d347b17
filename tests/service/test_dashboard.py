"""grafana/renee_ray.json shows what the workers export, all of it and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ray.util.metrics import Counter

from renee_ray.service.observe.exported import METRICS, TAGS, Metric

DASHBOARD: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "grafana" / "renee_ray.json").read_text(encoding="utf-8")
)
SERIES = re.compile(r"(ray_renee_ray_\w+)(?:\{([^}]*)\})?")


def exported(metric: Metric) -> str:
    """The name at the endpoint."""
    return f"ray_renee_ray_{metric.name}" + ("_total" if metric.kind is Counter else "")


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_panels_name_exactly_the_metrics_that_are_exported() -> None:
    named = {name for text in expressions() for name, _ in SERIES.findall(text)}
    assert named == {exported(metric) for metric in METRICS}
    assert len(named) == len(METRICS)


def test_panels_select_and_group_by_tags_that_these_metrics_have() -> None:
    tags = {exported(metric): {*TAGS, *metric.tags} for metric in METRICS}
    for text in expressions():
        for name, selectors in SERIES.findall(text):
            assert set(re.findall(r"(\w+)(?:=~|!~|!=|=)\"", selectors)) <= tags[name], text
            assert 'run=~"$run"' in selectors, text
        grouped = re.findall(r"by \(([^)]*)\) \((?:\w+\()?(ray_renee_ray_\w+)", text)
        assert len(grouped) == text.count(" by (")
        for group, name in grouped:
            assert set(group.split(", ")) <= tags[name], text


def test_a_panel_has_a_title_a_place_and_a_legend() -> None:
    places = {(p["gridPos"]["x"], p["gridPos"]["y"]) for p in DASHBOARD["panels"]}
    assert len(places) == len({p["id"] for p in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert all(p["title"] and t["legendFormat"] for p in DASHBOARD["panels"] for t in p["targets"])


def test_the_list_of_runs_comes_from_a_metric_that_is_exported() -> None:
    runs = next(each for each in DASHBOARD["templating"]["list"] if each["name"] == "run")
    name = re.fullmatch(r"label_values\((\w+), run\)", runs["query"]["query"])
    assert name is not None and name[1] in {exported(metric) for metric in METRICS}
