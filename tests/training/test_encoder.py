"""Pooling, dropout, initial weights and optimizer groups of the encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AttentionMaskInterface,
    AutoModel,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
)
from transformers.masking_utils import eager_mask, sdpa_mask

from renee_ray.config.schema import EncoderConfig
from renee_ray.data.models import resolve_model
from renee_ray.errors import ReneeError
from renee_ray.model.encoder import (
    Encoder,
    adamw,
    autocast_dtype,
    build_encoder,
    training_attention,
)
from renee_ray.rank.batch import Ragged, padded_tokens
from renee_ray.xfc.device import native_bf16, native_narrow

CPU = torch.device("cpu")
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
IDS = torch.tensor([[2, 5, 6, 7, 3], [2, 9, 3, 0, 0], [2, 3, 0, 0, 0]])
MASK = (IDS > 0).long()
SMALL = {"vocab_size": 30, "max_position_embeddings": 16}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Small models of two architectures, with random weights, as directories."""
    torch.manual_seed(0)
    made = {
        "bert": BertModel(
            BertConfig(
                hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
                **SMALL,
            )
        ),
        "distilbert": DistilBertModel(
            DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=24, **SMALL)
        ),
    }  # fmt: skip
    paths = {}
    for name, model in made.items():
        paths[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(paths[name])
    return paths


def settings(name: str, **changes: Any) -> EncoderConfig:
    return EncoderConfig(name=name, **{"autocast": "off", **changes})


def make(name: str, seed: int = 0, **changes: Any) -> Encoder:
    return build_encoder(settings(name, **changes), CPU, seed)


def test_minilm_pools_the_mean_of_its_tokens() -> None:
    encoder = make(MINILM).eval()
    with torch.inference_mode():
        found = encoder(IDS + 1000 * MASK, MASK)
        backbone = AutoModel.from_pretrained(resolve_model(MINILM), dtype=torch.float64).eval()
        hidden = backbone(input_ids=IDS + 1000 * MASK, attention_mask=MASK)[0]
        mask = MASK.unsqueeze(-1).double()
        wanted = (hidden * mask).sum(1) / mask.sum(1)
    assert encoder.dim == found.shape[1] == 384
    assert found.dtype == torch.float32
    assert float((found.double() - wanted).norm() / wanted.norm()) < 1e-5
    over_padding = hidden.mean(1)
    assert float((over_padding - wanted).norm() / wanted.norm()) > 1e-2


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_padding_changes_nothing(directories: dict[str, str], kind: str) -> None:
    encoder = make(directories[kind]).eval()
    alone = torch.cat([encoder(IDS[i : i + 1, :n], MASK[i : i + 1, :n]) for i, n in
                       enumerate(MASK.sum(1).tolist())])  # fmt: skip
    torch.testing.assert_close(encoder(IDS, MASK), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_the_mask_of_texts_without_padding_is_not_needed(
    directories: dict[str, str], kind: str, attention: str
) -> None:
    encoder = make(directories[kind], attention=attention).eval()
    encoder.grouped = False  # a group that is not padded has no mask either
    ids, mask = padded_tokens(Ragged.of_lists(IDS[:1].repeat(2, 1).tolist()), 0, CPU)
    seen: list[object] = []
    encoder.backbone.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["attention_mask"]), with_kwargs=True
    )
    assert mask.stride(1) == 0 and mask.tolist() == [[1] * 5] * 2
    assert torch.equal(encoder(ids, mask), encoder(ids, mask.contiguous()))
    assert seen[0] is None and isinstance(seen[1], torch.Tensor)
    assert padded_tokens(Ragged.of_lists([[1, 2], [3]]), 0, CPU)[1].tolist() == [[1, 1], [1, 0]]


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_groups_of_similar_length_change_no_embedding(
    directories: dict[str, str], kind: str
) -> None:
    """Each row stays in its place, and its gradient is the same."""
    rng = np.random.default_rng(1)
    lengths = [9, 1, 15, 4, 4, 16, 0, 9, 2, 15, 16, 3]
    rows = Ragged.of_lists([rng.integers(1, 30, n).tolist() for n in lengths])
    ids, mask = padded_tokens(rows, 0, CPU)
    encoder, shapes, found = make(directories[kind]).train(), [], []
    encoder.backbone.register_forward_pre_hook(
        lambda _, args, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    upstream = torch.randn(12, 16, generator=torch.Generator().manual_seed(3))
    for encoder.grouped in (True, False):
        embedded = encoder(ids, mask)
        embedded.backward(upstream)
        gradients = [p.grad for p in encoder.parameters()]
        found.append([embedded.detach(), *gradients])
        encoder.zero_grad()
    *grouped, whole = shapes
    assert whole == (12, 16) and len(grouped) > 1
    assert sum(n for n, _ in grouped) == 12 and sum(n * t for n, t in grouped) < 12 * 16 - 64
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model", ["ModernBert", "Llama"])
def test_masks_that_are_not_asked_about_are_those_of_transformers(
    model: str, attention: str, tmp_path: Path
) -> None:
    """Those of a window and causal ones too; before an encoder is built they are as released."""
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 24, "pad_token_id": 0, **SMALL}  # fmt: skip
    shape |= {"local_attention": 4, "global_attn_every_n_layers": 2} if "B" in model else {}
    torch.manual_seed(0)
    config = getattr(transformers, f"{model}Config")(**shape)
    getattr(transformers, f"{model}Model")(config).save_pretrained(tmp_path)
    encoder = make(str(tmp_path), attention=attention).eval()
    ids = torch.arange(1, 19).view(2, 9)
    mask = torch.ones_like(ids)
    for padding in (0, 3):
        mask[1, 9 - padding :] = 0
        found = encoder.backbone(input_ids=ids, attention_mask=mask)[0]
        with pytest.MonkeyPatch.context() as patch:
            for kind, make_mask in ("eager", eager_mask), ("sdpa", sdpa_mask):
                patch.setitem(AttentionMaskInterface._global_mapping, kind, make_mask)
            wanted = encoder.backbone(input_ids=ids, attention_mask=mask)[0]
        torch.testing.assert_close(found, wanted)


def test_the_bottleneck_has_no_bias_and_computes_in_fp32(directories: dict[str, str]) -> None:
    wide = make(directories["bert"]).eval()
    encoder = make(directories["bert"], bottleneck=5).eval()
    assert encoder.bottleneck is not None
    assert encoder.bottleneck.bias is None
    assert encoder.dim == 5
    wanted = wide(IDS, MASK).double() @ encoder.bottleneck.weight.double().T
    torch.testing.assert_close(encoder(IDS, MASK).double(), wanted, rtol=1e-5, atol=1e-6)
    for autocast in ("bf16", "fp16"):
        low = make(directories["bert"], bottleneck=5, autocast=autocast).eval()
        assert low(IDS, MASK).dtype == torch.float32
        torch.testing.assert_close(low(IDS, MASK), encoder(IDS, MASK), rtol=0.05, atol=0.02)


def test_the_constant_is_zero_at_first_and_added_last(directories: dict[str, str]) -> None:
    encoder = make(directories["bert"], bottleneck=5).eval()
    assert not encoder.constant.any()
    before = encoder(IDS, MASK)
    encoder.constant.copy_(torch.arange(5.0))
    torch.testing.assert_close(encoder(IDS, MASK), before + torch.arange(5.0))
    assert "constant" in encoder.state_dict()
    assert "constant" not in dict(encoder.named_parameters())


def test_the_seed_decides_the_bottleneck(directories: dict[str, str]) -> None:
    def drawn(seed: int) -> torch.Tensor:
        layer = make(directories["bert"], seed, bottleneck=5).bottleneck
        assert layer is not None
        return layer.weight

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_vectors_are_not_decayed(directories: dict[str, str], kind: str) -> None:
    encoder = make(directories[kind], bottleneck=5)
    optimizer = adamw(encoder, settings(directories[kind], weight_decay=0.1))
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert len(decay) == len(list(encoder.parameters()))
    norms = 0
    for name, parameter in encoder.named_parameters():
        vector = name.endswith("bias") or "norm" in name.lower()
        norms += "norm" in name.lower()
        assert decay[id(parameter)] == (0.0 if vector else 0.1), name
    assert norms >= 10
    assert {group["eps"] for group in optimizer.param_groups} == {1e-6}


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
@pytest.mark.parametrize(("p", "expected"), [(0.0, 0.0), (None, 0.1), (0.3, 0.3)])
def test_internal_dropout(
    directories: dict[str, str], kind: str, p: float | None, expected: float
) -> None:
    encoder = make(directories[kind], internal_dropout=p)
    found = {module.p for module in encoder.modules() if isinstance(module, nn.Dropout)}
    assert found == {expected}
    encoder.train()
    same = torch.equal(encoder(IDS, MASK), encoder(IDS, MASK))
    assert same == (expected == 0)


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_every_parameter_has_a_gradient(directories: dict[str, str], kind: str) -> None:
    """DDP waits for each of them."""
    encoder = make(directories[kind], bottleneck=5)
    encoder(IDS, MASK).square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_gradient_checkpointing_gives_the_same_gradient(
    directories: dict[str, str], kind: str
) -> None:
    gradients = []
    for checkpointing in (False, True):
        encoder = make(directories[kind], gradient_checkpointing=checkpointing).train()
        assert encoder.backbone.is_gradient_checkpointing == checkpointing
        encoder(IDS, MASK).square().sum().backward()
        gradients.append([p.grad for p in encoder.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_attention_implementations_agree(directories: dict[str, str], kind: str) -> None:
    names, found = [], []
    for attention in ("auto", "sdpa", "eager"):
        encoder = make(directories[kind], attention=attention).train()
        names.append(encoder.backbone.config._attn_implementation)
        with training_attention(CPU):
            out = encoder(IDS, MASK)
            out.square().sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in encoder.parameters()])
        found.append((out.detach(), gradient))
    assert names == ["eager", "sdpa", "eager"]
    for each in found[1:]:
        torch.testing.assert_close(each, found[0], rtol=1e-4, atol=1e-5)


def scrambled(directory: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    state = make(directory).backbone.state_dict()
    return {n: torch.randn(t.shape, generator=generator) if t.is_floating_point() else t
            for n, t in state.items()}  # fmt: skip


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "encoder.transformer.", "a.b.c.0.auto_model."])
def test_initial_weights_with_prefixes(
    directories: dict[str, str], tmp_path: Path, kind: str, suffix: str, prefix: str
) -> None:
    wanted = scrambled(directories[kind])
    state = {prefix + name: tensor.clone() for name, tensor in wanted.items()}
    state["classifier.weight"] = torch.zeros(3, 3)
    path = str(tmp_path / f"weights.{suffix}")
    if suffix == "pt":
        torch.save({"state_dict": state} if prefix else state, path)
    else:
        save_file(state, path)
    found = make(directories[kind], weights=path).backbone.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert not torch.equal(found[next(iter(found))], make(directories[kind]).backbone.state_dict()[
        next(iter(found))])  # fmt: skip


class Code:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("kind", ["code", "missing", "empty", "text", "misfit", "list"])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_weights_that_cannot_be_used(
    directories: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str,
    suffix: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"weights.{suffix}"
    if kind == "code":
        torch.save({"a": Code()}, path)
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("no weights\n" * 100)
    elif kind == "list":
        torch.save([torch.zeros(3)], path)
    elif kind == "misfit":
        state = {"x.weight": torch.zeros(2, 2)}
        torch.save(state, path) if suffix == "pt" else save_file(state, path)
    with pytest.raises(ReneeError) as caught:
        make(directories["bert"], weights=str(path))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ReneeError, match=r"encoder.name='.*' cannot be loaded") as caught:
        make(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_autocast_dtype() -> None:
    assert autocast_dtype("off", *native_narrow(CPU)) is None
    assert autocast_dtype("bf16", *native_narrow(CPU)) == torch.bfloat16
    assert autocast_dtype("fp16", *native_narrow(CPU)) == torch.float16
    native = torch.bfloat16 if native_bf16(CPU) else None
    assert autocast_dtype("auto", *native_narrow(CPU)) == native


@pytest.mark.slow
def test_a_compiled_encoder_equals_itself_uncompiled(directories: dict[str, str]) -> None:
    """Embeddings and gradients, at several lengths: dynamic shapes, compiled once or twice."""
    found = {}
    for compiled in (False, True):
        torch._dynamo.reset()
        config = EncoderConfig(name=directories["bert"], compile=compiled, autocast="off")
        encoder = build_encoder(config, CPU, seed=0)
        outputs = []
        for rows, width in ((3, 8), (5, 16), (2, 8)):
            generator = torch.Generator().manual_seed(width)
            ids = torch.randint(1, 20, (rows, width), generator=generator)
            mask = (torch.arange(width) < torch.arange(4, 4 + rows)[:, None]).long()
            outputs.append(encoder(ids, mask))
        torch.cat(outputs).square().sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in encoder.parameters()])
        found[compiled] = (torch.cat(outputs).detach(), gradient)
    for plain, other in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1, "nothing was compiled"


@pytest.mark.slow
def test_few_graphs_are_compiled_whatever_the_lengths(directories: dict[str, str]) -> None:
    """Rows and tokens are symbols: what is compiled anew is only a batch of one row."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = EncoderConfig(name=directories["bert"], compile=True, autocast="off")
    encoder = build_encoder(config, CPU, seed=0)
    compiled = []
    for rows, width in ((5, 8), (7, 16), (64, 8), (3, 16), (2, 8), (63, 16), (1, 8), (1, 16)):
        ids, mask = torch.ones(2, rows, width, dtype=torch.int64)
        encoder(ids, mask).sum().backward()
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert compiled[0] >= 1, "nothing was compiled"
    assert compiled[5] == compiled[0], "a length or a number of rows was compiled anew"
    assert compiled[-1] <= 2 * compiled[0]
