"""How long a text each family of encoders can read, told from its tables and by reading one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf

from renee_ray.config.schema import EncoderConfig
from renee_ray.errors import ReneeError
from renee_ray.model.encoder import check_positions, max_positions

P = 20
SMALL = {
    "vocab_size": 30, "max_position_embeddings": P, "hidden_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 24,
}  # fmt: skip
TOKENS = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1,
          "eos_token_id": 2}  # fmt: skip
FAMILIES = {
    "bert": (hf.BertConfig(**SMALL), P),
    "roberta": (hf.RobertaConfig(**SMALL), P - 2),
    "roberta-pad-5": (hf.RobertaConfig(**SMALL, pad_token_id=5), P - 6),
    "xlm-roberta": (hf.XLMRobertaConfig(**SMALL), P - 2),
    "mpnet": (hf.MPNetConfig(**SMALL), P - 2),
    "albert": (hf.AlbertConfig(**SMALL, embedding_size=8), P),
    "distilbert": (
        hf.DistilBertConfig(
            vocab_size=30, max_position_embeddings=P, dim=16, n_layers=1, n_heads=2, hidden_dim=24
        ),
        P,
    ),
    "nystromformer": (hf.NystromformerConfig(**SMALL), P),
    "deberta-v2": (
        hf.DebertaV2Config(
            **SMALL, relative_attention=True, position_biased_input=False, position_buckets=8
        ),
        None,
    ),
    "modernbert": (hf.ModernBertConfig(**SMALL, **TOKENS), None),
    "qwen2": (hf.Qwen2Config(**SMALL, num_key_value_heads=2), None),
}


def reads(model: torch.nn.Module, length: int) -> bool:
    ids = torch.full((1, length), 7)
    try:
        with torch.inference_mode():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("family", FAMILIES)
def test_positions(family: str, tmp_path: Path) -> None:
    config, limit = FAMILIES[family]
    model = hf.AutoModel.from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(tmp_path)
    assert max_positions(str(tmp_path)) == limit
    assert reads(model, limit or 3 * P)
    encoder = EncoderConfig(name=str(tmp_path), max_length=128)
    check_positions(encoder, limit or 128)
    if limit is not None:
        assert not reads(model, limit + 1)
        with pytest.raises(ReneeError, match=rf"{limit} positions.*max_length=128.*=64"):
            check_positions(encoder, 64)
        check_positions(encoder.model_copy(update={"max_length": limit}), 64)


def test_an_encoder_decoder_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    hf.T5Config(vocab_size=30, d_model=16, d_ff=24, num_layers=1, num_heads=2).save_pretrained(
        tmp_path
    )
    with pytest.raises(ReneeError, match=r"encoder-decoder \(t5\), which embeds no"):
        check_positions(EncoderConfig(name=str(tmp_path)), 64)


@pytest.mark.parametrize(
    "config",
    [hf.CLIPConfig(), hf.OPTConfig(**{**SMALL, "ffn_dim": 24}, word_embed_proj_dim=8)],
    ids=["clip", "opt"],
)
def test_a_model_without_one_width_is_refused(config: hf.PretrainedConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ReneeError, match=r"no one width of its texts"):
        check_positions(EncoderConfig(name=str(tmp_path)), 64)
