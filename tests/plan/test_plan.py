"""Plans beside what the code really allocates, and beside published runs."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer
from torch import Tensor

from renee_ray.benchmarks.problem import make_problem
from renee_ray.cli.main import main
from renee_ray.config.overrides import make_config, read_recipe
from renee_ray.config.schema import EncoderConfig, RunConfig
from renee_ray.data.dataset import Dataset
from renee_ray.data.models import resolve_model
from renee_ray.machine import V1, V2, limit_bytes
from renee_ray.model.encoder import build_encoder
from renee_ray.plan import devices
from renee_ray.plan.devices import GIB, GPUS, find_device
from renee_ray.plan.encoder import Transformer, find_transformer
from renee_ray.plan.memory import STATES, Worker, Workload
from renee_ray.plan.plan import find_workload, helpful, make_plan, needed
from renee_ray.plan.time import network_bytes, step_seconds, steps_of_epoch
from renee_ray.service.train import train as train_module
from renee_ray.xfc.labels import LabelRange
from renee_ray.xfc.shard import GRADIENT_BYTES, Shard, buffer_bytes
from renee_ray.xfc.softmax import Reductions
from renee_ray.xfc.weights.storages import SGD, STORAGES, Weights
from tests.pairwise import pairwise
from tests.test_machine import plant
from tests.xfc.memory import peak_bytes

from .conftest import DIM, LABELS

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A plan of a worker on one core; threads share its labels in lanes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def configured(sample: str, **changes: Any) -> RunConfig:
    own = {"data": f"{sample}/data", "output": "o", "threads": 1}
    return make_config(RunConfig, own, {"encoder": {"name": f"{sample}/encoder"}}, changes)


def worker(sample: str, num_workers: int = 1, **changes: Any) -> Worker:
    config = configured(sample, **changes)
    workload = find_workload(config, None, None, None, None)
    transformer = find_transformer(config.encoder, None)
    return Worker(config, find_device("cpu"), transformer, workload, num_workers)


@pytest.mark.parametrize(
    ("precision", "momentum", "num_workers", "batch", "average"),
    pairwise(tuple(STORAGES), (0.0, 0.9), (1, 2, 3), (8, 96), (0.0, 0.5)),
)
def test_states_and_buffers_are_those_that_are_allocated(
    sample: str, precision: str, momentum: float, num_workers: int, batch: int, average: float
) -> None:
    settings = {"precision": precision, "momentum": momentum}
    planned = worker(sample, num_workers, classifier=settings, batch_size=batch, average=average)
    memory = planned.memory()
    owned = LabelRange.of_rank(LABELS, num_workers, num_workers - 1)
    weights = Weights(precision, len(owned), DIM, momentum > 0, CPU, averaged=average > 0)
    shard = Shard(owned, weights)
    assert sum(memory[name] for name in ("weights", "momentum", "averages")) == weights.nbytes()
    (lane,) = shard.lanes(batch)
    size = max(stop - start for start, stop in lane)
    each = buffer_bytes(batch, weights, shard.operations)
    assert memory["chunk of labels"] >= size * each
    assert memory["chunk of labels"] <= (size + 64) * each
    assert memory["embeddings"] >= GRADIENT_BYTES * batch * DIM
    encoder = build_encoder(planned.config.encoder, CPU, 0)
    held = sum(p.numel() for p in encoder.parameters())
    assert memory["encoder parameters"] == 4 * held
    assert sum(memory[f"encoder {what}"] for what in ("gradients", "moments")) == 12 * held
    assert memory["encoder averages"] == 4 * held * (average > 0)


def test_a_softmax_has_a_chunks_logits_in_fp32_besides(sample: str) -> None:
    """Whatever the storage; and on a CPU all of a step's buffers are within what is planned."""
    batch, chunk = 96, 512
    problem, scratch, on_gpu = make_problem(LABELS, DIM, batch, CPU), dict[str, int](), {}
    for objective, softmax in ("bce", None), ("softmax", Reductions()):
        settings: dict[str, Any] = {"objective": objective, "chunk": chunk, "momentum": 0}
        settings["precision"] = "fp32"
        planned = worker(sample, classifier=settings, batch_size=batch)
        memory, shard = planned.memory(), problem.shard("fp32", 0, chunk)
        step = partial(shard.step, problem.embeddings, problem.positives(), SGD(0.1, 0))
        peak = peak_bytes(partial(step, softmax=softmax), CPU)
        scratch[objective] = shard.weights.scratch.nbytes()
        assert scratch[objective] < peak < memory["chunk of labels"] + memory["embeddings"]
        settings["precision"] = "bf16_sr"
        narrow = configured(sample, classifier=settings, batch_size=batch)
        replaced = replace(planned, config=narrow, device=GPUS["h100"])
        on_gpu[objective] = replaced.memory()["chunk of labels"]
    assert scratch["softmax"] - scratch["bce"] == 4 * batch * chunk
    assert on_gpu["softmax"] - on_gpu["bce"] == 4 * batch * chunk


@pytest.mark.parametrize(
    "own",
    [{"frozen": True, "bottleneck": 3}, {"lora": {"rank": 2}, "bottleneck": 3}, {"frozen": True}],
    ids=["frozen", "lora", "no bottleneck"],
)
def test_of_a_frozen_transformer_the_parameters_alone_are_held(
    sample: str, own: dict[str, Any]
) -> None:
    planned = worker(sample, 2, encoder=own, batch_size=1024)
    encoder = build_encoder(planned.config.encoder, CPU, 0)
    trained = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    memory, everything = planned.memory(), sum(p.numel() for p in encoder.parameters())
    assert memory["encoder parameters"] == memory["encoder gradients"] == 4 * trained
    assert memory["encoder moments"] == 8 * trained
    assert memory["frozen parameters"] == 4 * (everything - trained) > 0
    states = memory["weights"] + memory["momentum"] + 4 * (everything - trained) + 16 * trained
    assert needed(planned, STATES) == 2 * states
    assert memory["checkpoint copy"] == states - 4 * everything, (
        "a checkpoint leaves out what is frozen"
    )
    assert network_bytes(planned)["gradient of the encoder"] == 4 * trained
    full = worker(sample, 2, batch_size=1024)
    shares = {"encoder": 0 if "frozen" in own else 2 / 3, "AdamW": trained / everything}
    for piece, share in shares.items():
        seconds = step_seconds(planned)[piece]
        assert seconds == pytest.approx(share * step_seconds(full)[piece], rel=0.1)
    plan = make_plan(planned.config, planned.workload, planned.transformer, planned.device, 2)
    once = plan.run_hours / plan.epoch_hours > planned.config.epochs + 1e-6
    assert once == ("frozen" in own), "the first epoch embeds"
    assert (memory["activations"] < full.memory()["activations"]) == ("frozen" in own)


@pytest.mark.parametrize(
    # Without data, torch keeps two more copies of attention's probabilities where they are dropped.
    ("dropout", "autocast", "most"),
    [(0.0, "off", 1.02), (0.0, "bf16", 1.02), (0.1, "bf16", 1.12)],
)
def test_activations_are_those_that_a_forward_keeps(
    sample: str, dropout: float, autocast: str, most: float
) -> None:
    own = {"internal_dropout": dropout, "autocast": autocast, "name": f"{sample}/encoder"}
    planned = worker(sample, encoder=own)
    rows, tokens = 7, 18
    encoder = build_encoder(planned.config.encoder, CPU, 0)
    backbone = encoder.backbone
    assert backbone is not None
    parameters = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.ones(rows, tokens, dtype=torch.int64)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", encoder.autocast, enabled=encoder.autocast is not None),
    ):
        hidden = backbone(input_ids=ids, attention_mask=None)[0]
    assert hidden.requires_grad
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    planned_bytes = planned.transformer.activations(
        rows, tokens, "eager", planned.autocast, "cpu", False
    )
    assert 0.98 * found < planned_bytes < most * found
    more = planned.transformer.activations(
        rows + 1, tokens, "eager", planned.autocast, "cpu", False
    )
    assert more > most * found, "the tolerance tells rows apart"


@pytest.mark.parametrize("family", [hf.ModernBertConfig, hf.LongformerConfig])
def test_activations_of_what_does_not_run_without_data(
    family: type[hf.PretrainedConfig], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Both look at numbers: the first where it draws its weights, the second in its forward."""
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    family(vocab_size=30, intermediate_size=24, pad_token_id=0, bos_token_id=1, eos_token_id=2,
           **size).save_pretrained(tmp_path)  # fmt: skip
    found = find_transformer(EncoderConfig(name=str(tmp_path)), None)
    few, many = (found.activations(rows, 16, "eager", None, "cpu", False) for rows in (4, 8))
    assert 4 * 16 * 16 * 4 < few < many
    assert ("as those of a BERT" in caplog.text) == (family is hf.LongformerConfig)


def test_centroids_are_counted_beyond_what_comes_after_them(sample: str) -> None:
    def memory(centroid: float) -> dict[str, int]:
        settings = {"init": "label_text", "init_centroid": centroid, "momentum": 0}
        found = worker(sample, 2, classifier=settings | {"precision": "bf16_sr"}, batch_size=16)
        many = replace(found.workload, labels=10**8)
        return replace(found.without_copy(), workload=many).memory()

    assert memory(0)["first weights"] == 0
    found = memory(1)
    later = "encoder gradients", "encoder moments", "activations", "chunk of labels", "embeddings"
    replaced = sum(found[name] for name in (*later, "rows of the bag", "allocator"))
    assert found["first weights"] == 2 * found["weights"] - replaced > 0


def test_fewest_devices_and_what_would_help(sample: str) -> None:
    base = worker(sample, 2, classifier={"precision": "fp32"}, batch_size=64)

    def one(count: int) -> int:
        memory = replace(base, num_workers=count).memory()
        return sum(memory.values()) - memory["checkpoint copy"]

    small = replace(base.device, memory=(one(4) + one(5)) // 2)
    workload, transformer = base.workload, base.transformer
    plan = make_plan(base.config, workload, transformer, small, 2)
    assert plan.fewest_devices == 5 and not plan.fits
    none = make_plan(base.config, workload, transformer, replace(small, memory=1), 2)
    assert none.fewest_devices is None
    large = Workload(10**6, 1000, 9, 18)
    plan = make_plan(base.config, large, transformer, small, 2)
    changes = {name: (saved, added) for name, saved, added in plan.changes}
    half = sum(Worker(base.config, small, transformer, large, 4).memory().values())
    assert changes["num_workers=4"][0] == plan.total_bytes - half
    narrow = configured(sample, classifier={"precision": "fp8_sr"}, batch_size=64)
    cut = sum(Worker(narrow, small, transformer, large, 2).memory().values())
    assert changes["classifier.precision=fp8_sr"][0] == plan.total_bytes - cut
    assert [saved for saved, _ in changes.values()] == sorted(
        (saved for saved, _ in changes.values()), reverse=True
    )
    assert plan.epoch_steps == math.ceil(1000 / 64)


def test_what_would_help_a_refused_run_lowers_what_refused_it(sample: str) -> None:
    of_states = partial(needed, components=STATES)
    wide = worker(sample, 2, classifier={"precision": "fp32"})
    base = replace(wide, workload=Workload(10**6, 1000, 9, 18))
    found = {name: saved for name, saved, _ in helpful(base, of_states)}
    assert set(found) == {
        "classifier.precision=bf16_sr", "classifier.precision=fp8_sr", "classifier.momentum=0"
    }  # fmt: skip
    assert found["classifier.momentum=0"] == 2 * base.memory()["momentum"]
    averaging = replace(base, config=configured(sample, classifier={"momentum": 0}, average=0.5))
    averages = averaging.memory()["averages"] + averaging.memory()["encoder averages"]
    assert ("average=0", 2 * averages) in {each[:2] for each in helpful(averaging, of_states)}
    least = worker(sample, 2, classifier={"precision": "fp8_sr", "momentum": 0})
    on_gpu = replace(least, device=GPUS["h100"], workload=base.workload)
    assert [name for name, *_ in helpful(on_gpu, of_states)] == ["num_workers=4"]


def test_a_softmax_multiplies_once_more(sample: str) -> None:
    binary, softmax = (
        step_seconds(worker(sample, classifier={"objective": each}, batch_size=4096))["classifier"]
        for each in ("bce", "softmax")
    )
    assert softmax == pytest.approx(4 / 3 * binary, rel=0.05)


def test_texts_of_points_and_a_prompt_are_counted(sample: str) -> None:
    manifest = Dataset.open(f"{sample}/data").manifest
    own = replace(manifest, has_label_texts=True, other_texts=(100,))
    base = configured(sample, feed={"augment": 1.0})
    workload = Workload.of_manifest(own, base.encoder)
    for filtered, texts in ("positive", 100), ("negative", LABELS):
        config = configured(sample, feed={"augment": 1.0, "filter_labels": filtered})
        planned = Worker(config, find_device("cpu"), Transformer(), workload, 1)
        assert steps_of_epoch(planned) == math.ceil((4000 + texts) / 256)
    config = configured(sample, feed={"augment": 1.0})
    many = find_workload(config, None, 10_000, None, None)
    planned = Worker(config, find_device("cpu"), Transformer(), many, 1)
    assert steps_of_epoch(planned) == math.ceil((4000 + 10_000 * many.has_label_texts) / 256)
    two = replace(workload, label_parts=2)  # of which an epoch streams one, at least
    config = configured(sample, feed={"augment": 0.2, "filter_labels": "negative"})
    planned = Worker(config, find_device("cpu"), Transformer(), two, 1)
    assert steps_of_epoch(planned) == math.ceil((4000 + LABELS / 2) / 256)


def test_the_tokens_of_a_prompt_are_those_of_the_encoders_tokenizer(sample: str) -> None:
    prompt, name = "bought together with this book:", "sentence-transformers/all-MiniLM-L6-v2"
    tokenizer = Tokenizer.from_file(f"{resolve_model(name)}/tokenizer.json")
    tokenizer.no_padding()
    more = len(tokenizer.encode(prompt, add_special_tokens=False).ids)
    manifest = Dataset.open(f"{sample}/data").manifest
    counts = manifest.statistics["train"]
    longest = counts["tokens_max"]
    for limit in (longest + more, longest + 1):
        encoder = {"name": name, "prompt": prompt, "max_length": limit}
        found = Workload.of_manifest(manifest, configured(sample, encoder=encoder).encoder)
        assert found.tokens == min(counts["tokens_mean"] + more, limit)
        assert found.longest == limit
    assert more > 1


def planned_recipe(name: str, device: str, num_workers: int) -> Any:
    layer, about = read_recipe(name)
    config = make_config(RunConfig, {"data": "-", "output": "-"}, layer)
    workload = find_workload(config, about, None, None, None)
    assert about is not None
    transformer = find_transformer(config.encoder, about.encoder)
    return make_plan(config, workload, transformer, GPUS[device], num_workers)


def test_the_120_million_labels_of_the_paper() -> None:
    plan = planned_recipe("q2bp-120m", "v100", 16)
    assert plan.fits and plan.precision == "fp16"
    assert plan.epoch_steps == math.ceil(370e6 / 512)
    assert 13.5 / 2 < plan.epoch_hours < 13.5 * 2


@pytest.mark.parametrize(("suffix", "gib"), [("", 10.39), ("-fp8", 6.6)])
def test_amazon_3m_on_one_gpu(suffix: str, gib: float) -> None:
    """ELMO's encoder is bf16 or fp8 throughout, and its figures leave out what CUDA takes."""
    plan = planned_recipe(f"elmo-amazon-3m{suffix}", "h100", 1)
    assert plan.fits and gib < plan.total_bytes / GIB < 1.7 * gib


def test_a_plan_is_printed(sample: str, capsys: pytest.CaptureFixture[str]) -> None:
    yaml = Path(sample, "r.yaml")
    yaml.write_text(f"encoder: {{name: {sample}/encoder}}\n")
    command = ["plan", str(yaml), "--labels", "5000000", "--device", "v100", "--devices", "3"]
    assert main([*command, "--points", "1000", "--tokens", "7", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["num_workers"] == 3 and plan["total_bytes"] == sum(plan["memory"].values())
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "fits" in shown and "give --points" in shown and "num_workers=6" in shown
    assert main(["plan", str(yaml), "--device", "v100"]) == 1
    assert "give data=DATASET or --labels" in capsys.readouterr().err
    assert main([*command[:-4], "--device", "v101"]) == 1
    assert "--device 'v101' is unknown" in capsys.readouterr().err
    assert main([*command, "--calibrate"]) == 1
    assert "--calibrate measures this machine" in capsys.readouterr().err
    assert main(["plan", str(yaml), f"data={sample}/data", "--device", "cpu", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["epoch_steps"] == math.ceil(4000 / 256) and not plan["calibrated"]


def test_the_shape_of_a_recipe_is_of_its_own_encoder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "elmo-amazon-3m", "--device", "h100", "--json"]) == 0
    capsys.readouterr()
    command = ["plan", "elmo-amazon-3m", "encoder.name=no/such-model", "--device", "h100"]
    assert main(command) == 1
    assert "no/such-model" in capsys.readouterr().err


def test_rates_are_measured(sample: str, capsys: pytest.CaptureFixture[str]) -> None:
    yaml = Path(sample, "r.yaml")
    command = ["plan", str(yaml), f"data={sample}/data", "num_workers=1", "--calibrate", "--json"]
    assert main(command) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["calibrated"] and min(plan["step"][n] for n in ("encoder", "classifier")) > 0


@pytest.mark.slow
def test_what_exceeds_a_real_group_is_refused(sample: str, tmp_path: Path) -> None:
    """Where this user may limit the memory of a group of processes of its own."""
    if limit_bytes() < 8 * GIB:
        pytest.skip("the run must fit the machine")
    with memory_group(2 * GIB) as group:
        yaml = tmp_path / "bag.yaml"
        yaml.write_text("encoder: {name: none, bag: {dim: 512, buckets: 2097152}}\n")
        command = [
            sys.executable, "-m", "renee_ray", "train", str(yaml), f"data={sample}/data",
            f"output={tmp_path}/run", "num_workers=1", "use_gpu=no",
        ]  # fmt: skip
        joined = ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(group), *command]
        environment = {key: v for key, v in os.environ.items() if key != "RAY_ADDRESS"}
        ended = subprocess.run(joined, capture_output=True, text=True, env=environment)
    assert ended.returncode == 1
    assert "alone take 4.0 GiB and this machine has 2.0 GiB" in ended.stderr
    assert not (tmp_path / "run").exists()


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """Yields a group of processes below this one's own, whose memory is limited; or skips."""
    lines = [each.split(":", 2) for each in Path("/proc/self/cgroup").read_text().splitlines()]
    paths = {controllers: path.lstrip("/") for _, controllers, path in lines}
    for (mount, file, *_), controllers in (V1, "memory"), (V2, ""):
        group = Path("/", mount, paths.get(controllers, ""), f"renee-ray-test-{os.getpid()}")
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            with contextlib.suppress(OSError):
                (group / file).write_text(str(limit))
            if (group / file).read_text().strip() == str(limit):
                yield group
                return
        finally:
            group.rmdir()
    pytest.skip("this user may make no group of processes")


@pytest.mark.parametrize(("own", "limit"), [("0::/a", "v2"), ("4:memory:/a", "v1")])
def test_what_exceeds_the_container_is_refused_before_ray(
    sample: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], own: str, limit: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    reached: list[object] = []
    monkeypatch.setattr(train_module, "_train", lambda *given: reached.append(given) or {})
    mount = (V2 if limit == "v2" else V1)[0]
    states = needed(worker(sample, 2), STATES)
    monkeypatch.setattr(devices, "limit_bytes", partial(limit_bytes, tmp_path))
    yaml = tmp_path / "r.yaml"
    yaml.write_text(f"encoder: {{name: {sample}/encoder}}\nnum_workers: 2\nuse_gpu: no\n")
    command = ["train", str(yaml), f"data={sample}/data", f"output={tmp_path}/run"]
    plant(tmp_path, own, {f"{mount}/a": (states - 1, 10, 0)})
    assert main(command) == 1
    told = capsys.readouterr().err
    assert "weights, momentum, averages and encoder alone take" in told and "--force" in told
    assert "encoder moments" in told and "GiB" in told
    assert "saves" not in told and "a change above" not in told, "none would help"
    assert not reached and not (tmp_path / "run").exists()
    assert main([*command, "--force"]) == 0 and len(reached) == 1
    plant(tmp_path, own, {f"{mount}/a": (states, 10, 0)})
    assert main(command) == 0 and len(reached) == 2, "what may fit is not refused"


def test_the_device_of_a_cluster_is_what_ray_says_of_its_nodes() -> None:
    small, large = {"memory": 3e9, "object_store_memory": 1e9, "CPU": 4}, {"memory": 7e9}
    of_cpus = devices.cluster_device([small, large], False)
    assert of_cpus is not None and (of_cpus.kind, of_cpus.memory) == ("cpu", 11 * 10**9)
    kinds = [{"accelerator_type:L4": 1.0, "GPU": 8.0}, {"accelerator_type:A100": 1.0}, small]
    assert devices.cluster_device(kinds, True) == GPUS["a100"]
    assert devices.cluster_device([{"accelerator_type:MI300": 1.0}], True) is None


def test_no_transformer_has_no_states() -> None:
    config = make_config(RunConfig, {"data": "-", "output": "-"}, read_recipe("perl-bag")[0])
    found = find_transformer(config.encoder, None)
    assert found == Transformer()
    memory = Worker(config, GPUS["l4"], found, Workload(2416, 2428, 20, 64), 1).memory()
    assert memory["encoder parameters"] == memory["activations"] == 0
    assert memory["bag"] == 65536 * (4 * 512 + 8)
