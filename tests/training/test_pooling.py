"""Pooling, prompts, norms and frozen transformers, against loops over rows without padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaModel

from renee_ray.config.overrides import make_config
from renee_ray.config.schema import EncoderConfig, RunConfig
from renee_ray.data.models import resolve_model
from renee_ray.errors import ConfigError, ReneeError
from renee_ray.model.adapters import FROZEN, load_trained, trained_state
from renee_ray.model.encoder import Encoder, build_encoder, check_positions, pool
from renee_ray.model.model import Model, build_model
from renee_ray.model.token_gradient import TokenGradient
from renee_ray.rank.batch import Batch, Position, Ragged, padded_tokens
from renee_ray.rank.collectives import Ranks
from renee_ray.rank.rounds import Rounds
from renee_ray.training.loop import Trainer
from renee_ray.training.schedule import Schedule
from tests.training.gloo import on_ranks

CPU = torch.device("cpu")
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 24}  # fmt: skip
ROWS = [[1, 5, 6, 7, 8, 2], [1, 9, 2], [1, 2], [1, 11, 12, 13, 2]]
LABELS, PROMPT = 5, "search query:"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A random encoder with MiniLM's vocabulary and a random decoder, as directories."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(EncoderConfig().name))
    made = {
        "bert": BertModel(BertConfig(vocab_size=len(tokenizer), **SHAPE)),
        "llama": LlamaModel(LlamaConfig(vocab_size=30, num_key_value_heads=1, **SHAPE)),
    }
    paths = {}
    for name, model in made.items():
        paths[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(paths[name])
    tokenizer.save_pretrained(paths["bert"])
    return paths


def make(name: str, **changes: Any) -> Encoder:
    return build_encoder(EncoderConfig(name=name, **{"autocast": "off", **changes}), CPU, 0)


def embed(encoder: Encoder, rows: list[list[int]]) -> Tensor:
    return encoder(*padded_tokens(Ragged.of_lists(rows), 0, CPU))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mean", "cls", "last"])
def test_padding_on_either_side_is_not_pooled(kind: str, dtype: torch.dtype) -> None:
    hidden = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    spans = [(0, 6), (0, 2), (3, 6), (2, 3)]
    mask = torch.tensor([[int(a <= t < b) for t in range(6)] for a, b in spans])
    values = hidden.float().numpy().astype(np.float64)
    rows = [values[i, a:b] for i, (a, b) in enumerate(spans)]
    wanted = {"mean": [r.mean(0) for r in rows], "cls": [r[0] for r in rows],
              "last": [r[-1] for r in rows]}[kind]  # fmt: skip
    found = pool(hidden, mask, kind)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), np.stack(wanted), rtol=1e-5, atol=1e-6)
    everything = pool(hidden, torch.ones(1, 1, dtype=torch.int64).expand(4, 6), kind)
    assert torch.equal(everything, pool(hidden, torch.ones(4, 6, dtype=torch.int64), kind))


@pytest.mark.parametrize("kind", ["mean", "cls", "last"])
def test_a_decoder_embeds_each_row_as_if_alone(models: dict[str, str], kind: str) -> None:
    encoder = make(models["llama"], pooling=kind).eval()
    with torch.inference_mode():
        alone = [encoder.backbone(torch.tensor([row]))[0][0] for row in ROWS]
        pick = {"mean": lambda h: h.mean(0), "cls": lambda h: h[0], "last": lambda h: h[-1]}[kind]
        torch.testing.assert_close(
            embed(encoder, ROWS), torch.stack([pick(h) for h in alone]), rtol=1e-4, atol=1e-5
        )
    embed(encoder, ROWS).square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


def test_a_prompt_stands_behind_the_first_special_token(models: dict[str, str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models["bert"])
    texts = ["perl module", "a", "the longest of all these texts is cut somewhere"]
    plain = [tokenizer(text)["input_ids"] for text in texts]
    wanted = [tokenizer(f"{PROMPT} {text}", truncation=True, max_length=10)["input_ids"]
              for text in texts]  # fmt: skip
    prompted = make(models["bert"], prompt=PROMPT, max_length=10).eval()
    bare = make(models["bert"]).eval()
    with torch.inference_mode():
        for rows, given in ((wanted, plain), (wanted[:1] * 2, plain[:1] * 2)):
            torch.testing.assert_close(embed(prompted, given), embed(bare, rows))
            assert not torch.allclose(embed(bare, given), embed(bare, rows), atol=1e-3)
    assert "prompt.tokens" not in prompted.state_dict()


def test_prompts_that_leave_no_room_are_refused(models: dict[str, str]) -> None:
    config = EncoderConfig(name=models["bert"], prompt=PROMPT, max_length=512)
    check_positions(config, 509)
    with pytest.raises(ReneeError, match=r"510|512"):
        check_positions(config.model_copy(update={"max_length": 513}), 510)
    for changes in ({"max_length": 6}, {"prompt": " "}):
        with pytest.raises(ReneeError, match=r"encoder\.prompt"):
            check_positions(config.model_copy(update=changes), 128)


def test_the_tokens_of_a_prompt_have_a_gradient(models: dict[str, str]) -> None:
    rows = Ragged.of_lists([[101, *row, 102] for row in ROWS])
    none = Ragged.of_lists([[]] * len(rows))
    batch = Batch(Position(), np.arange(len(rows)), rows, none, none, 0)
    gradients = []
    for sparse in (False, True):
        encoder = make(models["bert"], prompt=PROMPT)
        tokens = TokenGradient(encoder, Ranks()) if sparse else None
        encoder(*batch.tokens(CPU)).square().sum().backward()
        if tokens is not None:
            tokens.reduce(batch.distinct_tokens())
        gradients.append(encoder.backbone.get_input_embeddings().weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0])
    assert gradients[0][make(models["bert"], prompt=PROMPT).prompt.tokens].norm() > 0


def test_normalised_embeddings_have_the_norm_scale(models: dict[str, str]) -> None:
    plain = embed(make(models["bert"]).eval(), ROWS)
    encoder = make(models["bert"], normalise=True, scale=7.0).eval()
    encoder.constant.fill_(0.5)
    wanted = torch.stack([7.0 * row / row.square().sum().sqrt() for row in plain]) + 0.5
    torch.testing.assert_close(embed(encoder, ROWS), wanted)
    torch.testing.assert_close(embed(make(models["bert"], scale=3.0).eval(), ROWS), 3 * plain)


def run_config(name: str, **encoder: Any) -> RunConfig:
    bag = {"dim": 3, "buckets": 17, "norm": 1.0}
    return make_config(RunConfig, {
        "data": "d", "output": "o", "epochs": 3, "loss_every": 0,
        "encoder": {"name": name, "autocast": "off", "learning_rate": 0.0, "bag": bag, **encoder},
        "classifier": {"precision": "fp32", "learning_rate": 0.1},
    })  # fmt: skip


def batch_of(ranks: Ranks, epoch: int, number: int) -> Batch:
    """Three of the four rows, others in each batch; the last rank has none."""
    order = np.roll(np.arange(len(ROWS)), epoch + number)[:3]
    mine = order[ranks.rank :: ranks.num_ranks] if ranks.num_ranks < 3 else order[ranks.rank :: 2]
    mine = mine if ranks.rank < 2 else mine[:0]
    lists = [ROWS[i] for i in mine], [[i, LABELS - 1] for i in mine], [[] for _ in mine]
    return Batch(Position(epoch, number), mine, *map(Ragged.of_lists, lists), 0)


def test_a_frozen_transformer_is_never_in_training(models: dict[str, str]) -> None:
    for frozen in (False, True):
        encoder = build_encoder(run_config(models["llama"], frozen=frozen).encoder, CPU, 0).train()
        assert encoder.backbone is not None and encoder.training
        assert {module.training for module in encoder.backbone.modules()} == {not frozen}


def trained(ranks: Ranks, name: str, frozen: bool, **encoder: Any) -> dict[str, Tensor]:
    """The tensors of a model after three epochs of two steps; texts that its transformer read."""
    config = run_config(name, frozen=frozen, **encoder)
    model: Model = build_model(config, LABELS, ranks, CPU)
    model.shard.initialise_normal(0.3, 1)
    assert model.encoder.bag is not None
    model.encoder.bag.idf.fill_(1.0)
    read = torch.zeros((), dtype=torch.int64)

    def count(module: object, arguments: object, given: dict[str, Tensor]) -> None:
        read.add_(len(given["input_ids"]))

    model.encoder.backbone.register_forward_pre_hook(count, with_kwargs=True)
    trainer = Trainer(config, model, ranks, CPU, Schedule((2, 2, 2), 0, 0), None,
                      lambda record: None, lambda metrics: None)  # fmt: skip
    if model.encoder.remembered is not None:
        lists = ROWS[ranks.rank :: ranks.num_ranks], [], []
        rows = Batch(Position(), np.arange(len(lists[0])), *map(Ragged.of_lists, lists), 0)
        model.encoder.remembered.embed_all([rows], CPU, Rounds(ranks, "embeddings"))
    trainer.run(batch_of(ranks, epoch, number) for epoch in range(3) for number in range(2))
    weight = model.shard.weights.weight.read(0, len(model.shard.owned)).clone()
    state = {key: value.clone() for key, value in model.encoder.state_dict().items()}
    return {"weight": weight, "read": read, **state}


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_frozen_transformer_trains_as_one_with_learning_rate_0(
    models: dict[str, str], num_ranks: int
) -> None:
    found, wanted = (
        on_ranks(num_ranks, trained, models["llama"], frozen) if num_ranks > 1
        else [trained(Ranks(), models["llama"], frozen)]
        for frozen in (True, False)
    )  # fmt: skip
    for own, other in zip(found, wanted, strict=True):
        for name in own.keys() - {"read"}:
            torch.testing.assert_close(own[name], other[name], rtol=1e-4, atol=1e-5)
    rows = [sum(max(1, len(batch_of(Ranks(rank, num_ranks), epoch, number)))
            for epoch in range(3) for number in range(2)) for rank in range(num_ranks)]  # fmt: skip
    assert [int(each["read"]) for each in wanted] == rows
    blank = max(0, num_ranks - 2)  # read by the rank that has no rows
    assert sum(int(each["read"]) for each in found) == len(ROWS) + blank < sum(rows)


def test_a_frozen_transformer_alone_has_no_gradient(models: dict[str, str]) -> None:
    nothing = {"dim": 0}
    config = run_config(models["llama"], frozen=True, bag=nothing)
    model = build_model(config, LABELS, Ranks(), CPU)
    trainer = Trainer(config, model, Ranks(), CPU, Schedule((2,), 0, 0), None,
                      lambda record: None, lambda metrics: None)  # fmt: skip
    trainer.run(batch_of(Ranks(), 0, number) for number in range(2))
    assert trainer.state.step == 2 and trainer.state.skipped == 0
    assert model.shard.weights.weight.read(0, LABELS).abs().sum() > 0
    held = trained_state(model.encoder)
    assert set(held) == {"constant", FROZEN}
    held["constant"] = torch.ones(16)
    scoring = build_encoder(config.encoder, CPU, config.seed).eval()
    load_trained(scoring, held)
    assert scoring.remembered is None
    torch.testing.assert_close(embed(scoring, ROWS), embed(make(models["llama"]).eval(), ROWS) + 1)


@pytest.mark.parametrize(
    ("encoder", "feed"),
    [({"frozen": True}, {"token_dropout": 0.1}),
     ({"frozen": True, "internal_dropout": 0.1}, {}),
     ({"frozen": True, "gradient_checkpointing": True}, {}),
     ({"frozen": True, "lora": {"rank": 2}}, {}),
     ({"lora": {"rank": 2}, "weights": "w.safetensors"}, {}),
     ({"name": "none", "bag": {"dim": 4}, "pooling": "last"}, {}),
     ({"name": "none", "bag": {"dim": 4}, "lora": {"rank": 2}}, {}),
     ({"name": "none", "bag": {"dim": 4}, "prompt": "a"}, {})],
)  # fmt: skip
def test_settings_that_exclude_each_other(encoder: Any, feed: Any) -> None:
    with pytest.raises(ConfigError, match="leave"):
        make_config(RunConfig, {"data": "d", "output": "o", "encoder": encoder, "feed": feed})


def test_texts_are_told_apart_by_order_and_length(models: dict[str, str]) -> None:
    config = run_config(models["llama"], frozen=True, bag={"dim": 0})
    encoder = build_model(config, LABELS, Ranks(), CPU).encoder
    rows = [[1, 5, 6], [1, 6, 5], [1, 5], [1, 5, 6, 0], [1, 5, 6]]
    wanted = torch.cat([embed(make(models["llama"]).eval(), [row]) for row in rows])
    for _ in range(2):
        torch.testing.assert_close(embed(encoder, rows), wanted.detach(), rtol=1e-4, atol=1e-5)
    assert encoder.remembered is not None and not embed(encoder, rows).requires_grad
