"""A decoder with adapters and a prompt, by the real commands: trained, resumed, exported."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pyarrow.dataset as pads
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, LlamaConfig, LlamaModel

from renee_ray.checkpoint.registry import Checkpoints
from renee_ray.cli.main import main
from renee_ray.config.schema import EncoderConfig
from renee_ray.data.dataset import Dataset
from renee_ray.data.models import resolve_model

from .conftest import RECIPE, TESTS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]
K, SCALE, PROMPT, LENGTH = 20, 5.0, "a perl package:", 14


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("decoder")
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(EncoderConfig().name))
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), intermediate_size=48, **shape)
    LlamaModel(config).save_pretrained(path)
    return str(path)


def embedded(
    path: Path, decoder: str, texts: list[str], run: dict[str, object], *, by_peft: bool
) -> torch.Tensor:
    """As the sentence in export.json says, with the merged model or base and adapter."""
    sentence = str(run["score"])
    pattern = r"tokens\[:(\d+)\] \+ (\[.*?\]) \+ tokens\[(\d+):"
    before, tokens, after = re.findall(pattern, sentence)[0]
    assert before == after and "last of encoder(tokens)" in sentence and "e / |e|" in sentence
    assert f"e = {SCALE} * e" in sentence
    prompt, at = json.loads(tokens), int(before)
    model = AutoModel.from_pretrained(decoder if by_peft else path / "encoder")
    model = PeftModel.from_pretrained(model, path / "adapter") if by_peft else model
    tokenizer = AutoTokenizer.from_pretrained(path / "encoder")
    head = load_file(path / "head.safetensors")
    rows = []
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=run["max_length"])["input_ids"]
        ids = ids[:at] + prompt + ids[at:]
        assert len(ids) <= LENGTH
        with torch.inference_mode():
            last = model.eval()(torch.tensor([ids])).last_hidden_state[0, -1]
            rows.append(SCALE * last / last.norm() + head["constant"])
    return torch.stack(rows)


def test_a_decoder_with_adapters_trains_resumes_and_is_exported(
    dataset: str, source: Path, decoder: str, tmp_path: Path
) -> None:
    config, run = tmp_path / "lora.yaml", str(tmp_path / "run")
    encoder = {
        "name": decoder, "max_length": LENGTH, "pooling": "last", "prompt": PROMPT,
        "normalise": True, "scale": SCALE, "autocast": "off", "learning_rate": 1e-2,
        "lora": {"rank": 4, "dropout": 0.1},
    }  # fmt: skip
    recipe = {**RECIPE, "encoder": encoder, "data": dataset, "output": run, "epochs": 1}
    recipe["num_workers"] = 1  # of others: tests/training/test_adapters.py
    config.write_text(yaml.safe_dump(recipe))
    assert main(["train", str(config)]) == 0
    newest = Checkpoints(run).newest()
    assert newest is not None
    weights, step = load_file(Path(newest.path) / "encoder.safetensors"), newest.state.step
    assert not any("base_layer" in key or "embed_tokens" in key for key in weights)
    trained = [tensor.norm() for key, tensor in weights.items() if "lora_B" in key]
    assert len(trained) == 14 and min(trained) > 0
    # As if the run had been killed while it wrote its last checkpoint.
    shutil.rmtree(newest.path)
    assert main(["train", str(config)]) == 0
    newest = Checkpoints(run).newest()
    assert newest is not None and newest.state.step == step
    for key, tensor in load_file(Path(newest.path) / "encoder.safetensors").items():
        torch.testing.assert_close(tensor, weights[key], rtol=1e-3, atol=1e-4, msg=key)

    assert main(["export", run, str(tmp_path / "e"), "checkpoint=last"]) == 0
    content = json.loads((tmp_path / "e" / "export.json").read_text())
    base = json.loads((tmp_path / "e" / "adapter" / "adapter_config.json").read_text())
    assert base["base_model_name_or_path"] == decoder and content["pooling"] == "last"
    arguments = ["predict", run, dataset, str(tmp_path / "p"), f"k={K}", "checkpoint=last"]
    assert main([*arguments, "num_workers=1"]) == 0
    parts = sorted(map(str, (tmp_path / "p").glob("part-*.parquet")))
    found = {row["point_id"]: row for row in pads.dataset(parts).to_table().to_pylist()}
    files = sorted((tmp_path / "e").glob("classifier-*"))
    weight = torch.cat([load_file(file)["weight"] for file in files])
    texts = (source / "tst_X.txt").read_text().splitlines()[:20]
    filters = {
        row["point_id"]: row["filter_labels"]
        for row in Dataset.open(dataset).read_rows("test", 0, TESTS).to_pylist()
    }
    for by_peft in (False, True):
        rows = embedded(tmp_path / "e", decoder, texts, content, by_peft=by_peft)
        for point, scores in enumerate(rows @ weight.T):
            scores[filters[point]] = -torch.inf
            best = scores.topk(K).values.tolist()
            assert found[point]["scores"] == pytest.approx(best, abs=2e-3)
