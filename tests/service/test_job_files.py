"""What a submitted job takes along, and where its workers go: decided without a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from renee_ray.cli import main as cli
from renee_ray.config.overrides import make_config
from renee_ray.config.schema import RunConfig
from renee_ray.errors import ReneeError
from renee_ray.service.cluster.launch import check_placement, placement
from renee_ray.service.submit.job_files import (
    PACKAGE,
    PASSED_ON,
    check_shared,
    job_environment,
    looks_secret,
    pack,
    refuse_password,
)
from renee_ray.service.submit.submit import choose_address


def test_only_the_list_and_what_is_asked_for_is_passed_on() -> None:
    here = {
        "AWS_REGION": "eu-west-1", "AWS_SECRET_ACCESS_KEY": "s", "PATH": "/bin", "MINE": "1",
        "HF_TOKEN": "t",
    }  # fmt: skip
    found = job_environment(["MINE", "OTHER=a=b"], 45, here)
    assert found == {
        "RAY_JOB_STOP_SIGNAL": "SIGINT",
        "RAY_JOB_STOP_WAIT_TIME_S": "45",
        "AWS_REGION": "eu-west-1",
        "MINE": "1",
        "OTHER": "a=b",
    }
    assert not any(looks_secret(name) for name in PASSED_ON)


@pytest.mark.parametrize(
    "name",
    ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "HF_TOKEN", "DB_PASSWORD",
     "RAY_AUTH_TOKEN", "MyApiKey", "mysecret", "GOOGLE_APPLICATION_CREDENTIALS"],
)  # fmt: skip
def test_what_looks_like_a_secret_is_refused(name: str) -> None:
    with pytest.raises(ReneeError, match=f"--env {name} looks like a secret.*nodes instead") as e:
        job_environment([f"{name}=hunter2"], 60, {})
    assert "hunter2" not in str(e.value)


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS", "MONKEY_COUNT"])
def test_what_only_sounds_like_one_is_not(name: str) -> None:
    assert job_environment([f"{name}=1"], 60, {})[name] == "1"


def test_other_variables_that_are_refused() -> None:
    with pytest.raises(ReneeError, match="--env NOT_HERE is not set here"):
        job_environment(["NOT_HERE"], 60, {})
    with pytest.raises(ReneeError, match="no name of a variable"):
        job_environment(["A-B=1"], 60, {})
    with pytest.raises(ReneeError, match="AWS_ENDPOINT_URL has a URL with a password") as error:
        job_environment([], 60, {"AWS_ENDPOINT_URL": "http://me:hunter2@store:9000"})
    assert "hunter2" not in str(error.value)
    refuse_password("s3://bucket/a@b/c:d", "an argument")


def test_relative_paths_are_refused() -> None:
    check_shared({"data": "s3://bucket/set", "output": "/mnt/runs/a"})
    with pytest.raises(ReneeError, match="output='runs/a' is relative"):
        check_shared({"data": "s3://bucket/set", "output": "runs/a"})


def files_in(root: Path) -> set[str]:
    return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}


def test_all_of_the_running_package_goes_along(tmp_path: Path) -> None:
    pack(tmp_path / "code")
    cached = {name for name in files_in(PACKAGE) if "__pycache__" in name}
    packed = files_in(tmp_path / "code")
    assert packed == files_in(PACKAGE) - cached
    assert packed > {"__main__.py", "recipes/quickstart.yaml"}


def test_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert choose_address(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265/")
    assert choose_address(None) == "http://head:8265"
    assert choose_address("https://other") == "https://other", "what is given wins"
    with pytest.raises(ReneeError, match="'head:6379' is no URL of a job server"):
        choose_address("head:6379")


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (("train", "no-such.yaml"), 1, "cannot read no-such.yaml"),
        (("train", "quickstarts"), 1, "did you mean 'quickstart'"),
        (("train", "quickstart", "data=s3://b/d", "output=s3://b/o", "epoch=3"), 1,
         "did you mean 'epochs'"),
        (("train", "quickstart", "data=s3://b/d", "output=runs/o"), 1,
         "output='runs/o' is relative"),
        (("train", "quickstart", "data=s3://b/d"), 1, "lacks 'output'"),
        (("predict", "s3://b/r", "titles.txt", "s3://b/p"), 1, "SRC='titles.txt' is relative"),
        (("predict", "s3://b/r", "s3://b/d"), 2, "Missing argument 'DST'"),
        (("evaluate", "s3://b/r", "s3://k:s@b/d"), 1, "a URL with a password"),
        (("evaluate", "s3://b/r", "s3://AK:se/cret@b/d"), 1, "credentials"),
        (("train", "data=s3://b/d?secret_key=x", "output=s3://b/o"), 1, "credentials"),
        (("train", "data=s3://b/d", "output=runs/o"), 1, "output='runs/o' is relative"),
        (("train", "quickstart", "data=s3://b/d", "output=s3://b/o", "feed.targets=p"), 1,
         "feed.targets='p' is relative"),
        (("convert", "s3://b/r", "s3://b/d", "--josn"), 2, "No such option"),
        (("doctor", "storage=[s3://b/r,data]"), 1, "storage[1]='data' is relative"),
        (("serve", "s3://b/r"), 2, "is not one of"),
        (("--env", "HF_TOKEN", "export", "s3://b/r", "s3://b/e"), 1, "looks like a secret"),
        (("--address", "head:6379", "export", "s3://b/r", "s3://b/e"), 1, "is no URL"),
        (("--address", "http://127.0.0.1:9", "export", "s3://b/r", "s3://b/e"), 1,
         "no job server answers at http://127.0.0.1:9"),
    ],
)  # fmt: skip
def test_a_wrong_submission_is_one_sentence_at_once(
    arguments: tuple[str, ...], status: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["submit", *arguments]) == status
    said = capsys.readouterr()
    assert sentence in said.err and said.out == ""
    assert status == 2 or said.err.count("\n") == 1


def run_config(**keys: Any) -> RunConfig:
    return make_config(RunConfig, {"data": "d", "output": "o", **keys})


def node(cpus: int, gpus: int = 0, kind: str = "", alive: bool = True) -> dict[str, Any]:
    resources: dict[str, float] = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    return {
        "Alive": alive,
        "Resources": resources | ({f"accelerator_type:{kind}": 1} if kind else {}),
    }


def test_placement_is_what_ray_train_understands() -> None:
    from ray.train import ScalingConfig

    keys = {"placement_strategy": "SPREAD", "accelerator_type": "L4", "cpus_per_worker": 3}
    made = ScalingConfig(num_workers=2, use_gpu=True, **placement(run_config(**keys), True))
    assert made.placement_strategy == "SPREAD"
    assert made._resources_per_worker_not_none == {
        "CPU": 3, "GPU": 1, "accelerator_type:L4": 0.001,
    }  # fmt: skip
    for use_gpu, expected in ((False, {"CPU": 1}), (True, {"GPU": 1})):
        plain = placement(run_config(), use_gpu)
        made = ScalingConfig(num_workers=2, use_gpu=use_gpu, **plain)
        assert made._resources_per_worker_not_none == expected


@pytest.mark.parametrize(
    ("keys", "use_gpu", "nodes", "fits"),
    [
        ({}, False, [node(3)], True),
        ({"placement_strategy": "STRICT_SPREAD"}, False, [node(8)], False),
        ({"placement_strategy": "STRICT_SPREAD"}, False, [node(8), node(1)], True),
        ({"placement_strategy": "STRICT_SPREAD"}, False, [node(8), node(8, alive=False)], False),
        ({"placement_strategy": "STRICT_PACK"}, True, [node(8, 1), node(8, 1)], False),
        ({"placement_strategy": "STRICT_PACK"}, True, [node(8, 2), node(8)], True),
        ({"placement_strategy": "PACK"}, True, [node(0), node(8, 1), node(8, 1)], True),
        ({"accelerator_type": "L4"}, True, [node(8, 1, "L4"), node(8, 4, "H100")], False),
        ({"accelerator_type": "L4"}, True, [node(8, 2, "L4"), node(8, 4, "H100")], True),
        ({"cpus_per_worker": 4}, False, [node(8)], False),  # none left to read with
        ({"cpus_per_worker": 4}, False, [node(8), node(1)], True),
        ({"cpus_per_worker": 4}, False, [node(7), node(7)], True),
        ({"cpus_per_worker": 6}, False, [node(11), node(5)], False),
    ],
)
def test_what_cannot_be_placed_is_said(
    keys: dict[str, Any], use_gpu: bool, nodes: list[dict[str, Any]], fits: bool
) -> None:
    config = run_config(num_workers=2, **keys)
    if fits:
        check_placement(config, use_gpu, nodes)
    else:
        with pytest.raises(ReneeError, match=r"num_workers=2|cpus_per_worker=4"):
            check_placement(config, use_gpu, nodes)
