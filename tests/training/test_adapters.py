"""Low-rank adapters against merged weights; any number of ranks; checkpoints without the base."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModel, LlamaConfig, LlamaModel

from renee_ray.checkpoint.registry import Checkpoints
from renee_ray.checkpoint.resume import resume
from renee_ray.checkpoint.state import CheckpointError, State, set_moments
from renee_ray.checkpoint.writer import CheckpointWriter
from renee_ray.config.overrides import make_config
from renee_ray.config.schema import EncoderConfig, RunConfig
from renee_ray.errors import ReneeError
from renee_ray.model.encoder import Encoder, adamw, build_encoder, check_positions
from renee_ray.model.model import Model, build_model
from renee_ray.rank.batch import Batch, Position, Ragged
from renee_ray.rank.collectives import Ranks
from renee_ray.training.loop import Trainer
from renee_ray.training.schedule import Schedule
from tests.training.gloo import on_ranks

CPU = torch.device("cpu")
IDS = torch.tensor([[1, 5, 6, 7], [1, 9, 0, 0], [1, 8, 3, 0]])
MASK = (IDS > 0).long()
LABELS, STEPS, BATCH, RANK, ALPHA = 7, 4, 5, 3, 6
LORA = {"rank": RANK, "alpha": ALPHA, "targets": ["q_proj", "down_proj"]}


def base(path: Path, seed: int = 0) -> str:
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=30, num_key_value_heads=1, intermediate_size=24, **shape)
    LlamaModel(config).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def name(tmp_path_factory: pytest.TempPathFactory) -> str:
    return base(tmp_path_factory.mktemp("llama"))


def config_of(name: str, **lora: Any) -> RunConfig:
    encoder = {"name": name, "autocast": "off", "pooling": "last", "bottleneck": 4,
               "learning_rate": 1e-2, "lora": {**LORA, **lora}}  # fmt: skip
    classifier = {"precision": "fp32", "learning_rate": 0.1}
    return make_config(RunConfig, {
        "data": "d", "output": "o", "epochs": 1, "loss_every": 0, "encoder": encoder,
        "classifier": classifier,
    })  # fmt: skip


def make(name: str, **lora: Any) -> Encoder:
    return build_encoder(config_of(name, **lora).encoder, CPU, 0)


def randomised(encoder: Encoder) -> dict[str, Tensor]:
    """Gives each B, which is 0 at first, values; returns all adapters by name."""
    generator = torch.Generator().manual_seed(4)
    found = {k: p for k, p in encoder.named_parameters() if "lora" in k}
    for key, parameter in found.items():
        if "lora_B" in key:
            parameter.data.normal_(generator=generator)
    return found


def test_an_adapted_transformer_equals_the_merged_one(name: str) -> None:
    encoder = make(name).eval()
    plain = build_encoder(
        config_of(name).encoder.model_copy(update={"lora": EncoderConfig().lora}), CPU, 0
    ).eval()
    assert plain.bottleneck is not None and encoder.bottleneck is not None
    plain.bottleneck.load_state_dict(encoder.bottleneck.state_dict())
    torch.testing.assert_close(encoder(IDS, MASK), plain(IDS, MASK))
    adapters = randomised(encoder)
    assert len(adapters) == 2 * 2 * 2, "q_proj and down_proj of two layers, A and B"
    for key, b in adapters.items():
        if "lora_B" in key:
            a = adapters[key.replace("lora_B", "lora_A")]
            layer = key.split("model.layers.")[1].split(".lora_B")[0]
            weight = plain.backbone.get_submodule(f"layers.{layer}").weight
            weight.data += ALPHA / RANK * (b.detach() @ a.detach())
    assert (encoder(IDS, MASK) - plain(IDS, MASK)).abs().max() < 1e-4
    assert (encoder(IDS, MASK) - make(name).eval()(IDS, MASK)).abs().max() > 1e-2


def test_only_adapters_and_bottleneck_are_optimised(name: str) -> None:
    encoder = make(name)
    given = [p for group in adamw(encoder, EncoderConfig()).param_groups for p in group["params"]]
    names = {key for key, p in encoder.named_parameters() if any(p is each for each in given)}
    assert {key for key in names if "lora" not in key} == {"bottleneck.weight"}
    assert names == {key for key, p in encoder.named_parameters() if p.requires_grad}
    every = make(name, targets="auto")
    adapted = [key for key, _ in every.named_parameters() if "lora_A" in key]
    assert len(adapted) == 2 * 7, "q, k, v, o, gate, up and down of both layers"


def batch_of(ranks: Ranks, number: int) -> Batch:
    generator = torch.Generator().manual_seed(number)
    count = BATCH if number < STEPS - 1 else 1  # in the last batch a rank has no row
    lengths = torch.randint(1, 6, (count,), generator=generator).tolist()
    rows = [torch.randint(1, 30, (n,), generator=generator).tolist() for n in lengths]
    labels = [[(number + i) % LABELS] for i in range(count)]
    first, stop = (count * r // ranks.num_ranks for r in (ranks.rank, ranks.rank + 1))
    lists = rows[first:stop], labels[first:stop], [[]] * (stop - first)
    points = torch.arange(first, stop).numpy()
    return Batch(Position(0, number), points, *map(Ragged.of_lists, lists), 0)


def trainer_of(ranks: Ranks, name: str, steps: int, run: str = "") -> tuple[Trainer, Any]:
    config = config_of(name)

    def build(checkpoint: object) -> Model:
        model = build_model(config, LABELS, ranks, CPU)
        randomised(model.encoder)  # a first step of A beside B = 0 would be one of rounding errors
        model.shard.initialise_normal(0.5, 1)
        return model

    writer = CheckpointWriter(Checkpoints(run), ranks, 2, "P@1").start() if run else None
    model, checkpoint, moments = (
        resume(Checkpoints(run), ranks, build) if run else (build(None), None, {})
    )
    state = checkpoint.state if checkpoint else State()

    def save(metrics: dict[str, float]) -> None:
        if writer is not None:
            writer.save(state, model.encoder, trainer.optimizer, model.shard, {})

    trainer = Trainer(
        config, model, ranks, CPU, Schedule((STEPS,), 0, 0), None, lambda record: None, save, state
    )
    trainer.wish = lambda: 3 if state.step == steps - 1 else 0
    if checkpoint:
        set_moments(model.encoder, trainer.optimizer, moments)
    return trainer, writer


def batches(trainer: Trainer) -> Any:
    first = trainer.state.position.batch
    return (batch_of(trainer.ranks, number) for number in range(first, STEPS))


def trained(ranks: Ranks, name: str) -> dict[str, Tensor]:
    trainer, _ = trainer_of(ranks, name, STEPS)
    before = {k: p.detach().clone() for k, p in trainer.model.encoder.named_parameters()}
    wrapped = trainer._step.encoder
    if isinstance(wrapped, DistributedDataParallel):
        reduced = {id(p) for p in wrapped._module_parameters}
        frozen = [p for p in trainer.model.encoder.parameters() if not p.requires_grad]
        assert frozen and not any(id(p) in reduced for p in frozen)
    trainer.run(batches(trainer))
    state = dict(trainer.model.encoder.named_parameters())
    for key, parameter in state.items():
        assert torch.equal(before[key], parameter) == (not parameter.requires_grad), key
    weight = trainer.model.shard.weights.weight.read(0, len(trainer.model.shard.owned)).clone()
    return {"weight": weight, **{k: p.detach().clone() for k, p in state.items()}}


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_any_number_of_ranks_trains_the_same_adapters(name: str, num_ranks: int) -> None:
    wanted, found = trained(Ranks(), name), on_ranks(num_ranks, trained, name)
    whole = {**found[0], "weight": torch.cat([each["weight"] for each in found])}
    for key, tensor in wanted.items():
        assert (whole[key] - tensor).norm() < 1e-3 * tensor.norm(), key
        assert key == "weight" or torch.equal(found[-1][key], found[0][key]), key


def test_a_resumed_run_equals_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    whole, _ = trainer_of(Ranks(), name, STEPS)
    whole.run(batches(whole))
    run = str(tmp_path / "cut")
    first, writer = trainer_of(Ranks(), name, 2, run)
    first.run(batches(first))
    assert writer.wait() and first.state.step == 2
    second, writer = trainer_of(Ranks(), name, STEPS, run)
    assert second.state.step == 2
    second.run(batches(second))
    for key, tensor in whole.model.encoder.state_dict().items():
        assert torch.equal(second.model.encoder.state_dict()[key], tensor), key
    assert writer.wait()
    newest = Checkpoints(run).newest()
    assert newest is not None
    held = load_file(Path(newest.path) / "encoder.safetensors")
    assert {key for key in held if "lora" not in key} == {
        "bottleneck.weight", "constant", "frozen_crc32"
    }  # fmt: skip


def test_a_checkpoint_refuses_another_base(name: str, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    first, writer = trainer_of(Ranks(), name, 1, run)
    first.run(batches(first))
    assert writer.wait()
    newest = Checkpoints(run).newest()
    assert newest is not None
    newest.load_encoder(make(name))
    other = base(tmp_path / "other", seed=9)
    with pytest.raises(CheckpointError, match=r"other frozen weights"):
        newest.load_encoder(make(other))
    with pytest.raises(CheckpointError, match=r"another encoder"):
        newest.load_encoder(make(name, targets="auto"))
    plain = config_of(name).encoder.model_copy(update={"lora": EncoderConfig().lora})
    with pytest.raises(CheckpointError, match=r"another encoder"):
        newest.load_encoder(build_encoder(plain, CPU, 0))


def test_what_does_not_fit_is_refused_before_training(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_positions(config_of(name).encoder, 32)
    with pytest.raises(ReneeError, match=r"encoder\.lora\.targets.*nowhere"):
        check_positions(config_of(name, targets=["nowhere"]).encoder, 32)
    with pytest.raises(ReneeError, match=r"encoder\.lora\.targets.*the name q_prj"):
        check_positions(config_of(name, targets=["v_proj", "q_prj"]).encoder, 32)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ReneeError, match=r"renee_ray\[lora\]"):
        check_positions(config_of(name).encoder, 32)


def test_peft_reads_and_merges_what_was_trained(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    encoder: Any = make(name).eval()
    randomised(encoder)
    encoder.backbone.save_pretrained(tmp_path)
    assert not [file for file in tmp_path.iterdir() if file.suffix not in (".safetensors", ".json",
                                                                           ".md")]  # fmt: skip
    loaded = PeftModel.from_pretrained(AutoModel.from_pretrained(name), tmp_path).eval()
    with torch.inference_mode():
        wanted = encoder.backbone(input_ids=IDS, attention_mask=MASK)[0][MASK == 1]
        found = loaded(input_ids=IDS, attention_mask=MASK)[0][MASK == 1]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
