"""Commands of the released code, translated: all eleven, and the flags one by one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from renee_ray.cli.main import main
from renee_ray.config.from_renee import translate
from renee_ray.config.overrides import make_config, read_recipe, read_yaml
from renee_ray.config.schema import RunConfig
from renee_ray.errors import ConfigError

ROBERTA = "sentence-transformers/all-roberta-large-v1"
DISTIL = "sentence-transformers/msmarco-distilbert-base-v4"
PARA = "sentence-transformers/paraphrase-distilroberta-base-v2"
COMMANDS = [
    ("AmazonTitles-670K", 60, 16, 0.001, 5e-5, 10000, 32, ROBERTA, 0.8, 0.001, 0.001, False),
    ("Amazon-670K", 70, 16, 0.01, 4e-5, 10000, 512, "roberta-large", 0.8, 0.001, 0.001, False),
    ("AmazonTitles-3M", 70, 16, 0.005, 5e-5, 10000, 32, "roberta-large", 0.75, 0.002, None, False),
    ("Amazon-3M", 60, 16, 0.01, 4e-5, 10000, 256, "roberta-large", 0.75, 0.001, 0.001, False),
    ("Wiki-500K", 100, 128, 0.002, 1e-4, 5000, 256, PARA, 0.75, 0.001, 0.001, False),
    ("LF-AmazonTitles-131K-Aug", 100, 32, 0.05, 1e-5, 5000, 32, DISTIL, 0.85, 1e-4, 0.01, True),
    (
        "LF-Wikipedia-500K-Aug",
        100,
        128,
        0.002,
        1e-4,
        5000,
        256,
        PARA,
        0.7,
        0.001,
        0.01,
        False,
    ),
    ("LF-AmazonTitles-1.3M-Aug", 100, 64, 0.01, 1e-6, 15000, 32, DISTIL, 0.7, 1e-4, 0.01, True),
    (
        "LF-WikiSeeAlso-320K-Aug",
        100,
        128,
        0.1,
        2e-4,
        5000,
        128,
        PARA,
        0.75,
        1e-4,
        1e-3,
        False,
    ),
    ("LF-Amazon-131K-Aug", 100, 32, 0.05, 1e-4, 5000, 128, DISTIL, 0.75, 1e-4, 0.01, False),
    ("LF-Amazon-131K-Aug", 100, 32, 0.05, 1e-5, 5000, 128, DISTIL, 0.85, 1e-4, 0.01, True),
]
"""(--data-dir, epochs, batch, lr1, lr2, warmup, maxlen, tf, dropout, wd1, wd2, NGAME)"""


def command_of(row: tuple) -> str:
    name, epochs, batch, lr1, lr2, warmup, maxlen, tf, dropout, wd1, wd2, ngame = row
    first = "--wd1 .001 " if wd2 is None else ""  # twice, in the released list: the second wins
    return (
        f"python main.py \\\n--epochs {epochs} \\\n--batch-size {batch} --lr1 {lr1} --lr2 {lr2} "
        f"--warmup {warmup} --data-dir xc/Datasets/{name} --maxlen {maxlen} --tf {tf} "
        f"--dropout {dropout} {first}--wd1 {wd1} "
        + (f"--wd2 {wd2} " if wd2 is not None else "")
        + ("--use-ngame-encoder ngame/state_dict.pt " if ngame else "")
        + "--noloss --fp16xfc --compile"
    )


@pytest.mark.parametrize("row", COMMANDS, ids=[f"{row[0]}-{row[8]}" for row in COMMANDS])
def test_the_released_commands(
    row: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, epochs, batch, lr1, lr2, warmup, maxlen, tf, dropout, wd1, wd2, ngame = row
    output = tmp_path / "made.yaml"
    assert main(["from-renee", command_of(row), f"output={output}"]) == 0
    assert f"batch_size={16 * batch} is global" in capsys.readouterr().err
    assert main(["from-renee", command_of(row), f"output={output}"]) == 1
    assert "is there already" in capsys.readouterr().err
    config = translate(command_of(row)).config
    assert make_config(RunConfig, read_yaml(str(output))) == config
    flags = command_of(row)[command_of(row).index("--") :]
    assert main(["from-renee", flags]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown == yaml.safe_load(output.read_text())
    encoder, classifier = config.encoder, config.classifier
    assert (config.epochs, config.batch_size, config.num_workers) == (epochs, 16 * batch, 16)
    assert (encoder.name, encoder.max_length, encoder.dropout) == (tf, maxlen, dropout)
    assert (encoder.learning_rate, encoder.weight_decay) == (lr2, 0.01 if wd2 is None else wd2)
    assert (classifier.learning_rate, classifier.weight_decay) == (lr1, wd1)
    assert (classifier.precision, classifier.momentum, classifier.init) == ("fp16", 0.9, "normal")
    assert (config.loss_every, encoder.compile, encoder.gradient) == (0, True, "mean")
    assert encoder.weights == ("ngame/state_dict.pt" if ngame else "")
    augmented = name.endswith("-Aug")
    about = read_recipe(name.removesuffix("-Aug").lower())[1]
    assert about is not None and about.points
    points, labels = about.points, about.labels
    steps = epochs * math.ceil((points + labels * augmented) / (16 * batch))
    assert config.warmup == pytest.approx(warmup / steps, rel=1e-3)
    assert config.feed.augment == float(augmented)


BASE = "--data-dir x/LF-Amazon-131K"


def test_defaults_and_the_other_flags() -> None:
    config = translate(BASE, gpus=2).config
    assert (config.batch_size, config.epochs, config.seed, config.warmup) == (16, 50, 42, 0.152)
    assert (config.encoder.name, config.encoder.dropout) == ("distilbert-base-uncased", 0.5)
    assert (config.classifier.precision, config.encoder.autocast) == ("fp32", "fp16")
    assert (config.loss_every, config.classifier.weight_decay) == (100, 0.01)
    flags = (
        "--fp32encoder --bottleneck-dims 64 --mo 0 --accum 4 --custom-cuda --pre-tok --infer "
        "--checkpoint-resume c --world-size 2 --rank 1 --dist-url tcp://h:1 --expname e --seed 7"
    )
    made = translate(f"{BASE} {flags}")
    config, notes = made.config, "\n".join(made.notes)
    assert (config.encoder.autocast, config.encoder.bottleneck) == ("off", 64)
    assert (config.classifier.momentum, config.seed, config.output) == (0.0, 7, "runs/e")
    for flag in ("--accum", "--custom-cuda", "--pre-tok", "--infer", "--rank", "--checkpoint"):
        assert flag in notes
    assert "--accum" not in "\n".join(translate(BASE).notes)
    one = translate(f"{BASE} --device 0 --use-ngame-encoder").config
    assert (one.num_workers, one.batch_size) == (1, 8)
    assert one.encoder.weights == "ngame_pretrained_models/LF-Amazon-131K/state_dict.pt"
    assert "before its warm-up" in "\n".join(translate(f"{BASE} --epochs 1").notes)


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (f"{BASE} --lr3 1", "lr3"),
        (f"{BASE} --lr1 fast", "lr1.*fast"),
        (f"{BASE} 12", "'12' is no flag"),
        (f"{BASE} --dropout 2", "dropout=2"),
        ("--data-dir mine", "size of 'mine' is not known.*data=DATASET"),
        (f"{BASE} --batch-size 0", "--batch-size 0.*at least 1"),
        (f"{BASE} --epochs -1", "--epochs -1.*at least 1"),
        (f"{BASE} 'open", "no shell command"),
    ],
)
def test_what_cannot_be_translated(command: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        _ = translate(command).config
