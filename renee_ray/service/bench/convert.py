"""`renee-ray bench convert`: a conversion beside the bare tokenizer on the same texts.

The reference is `encode_batch_fast` of the tokenizers library on all cores, on the training texts
already in memory, and nothing else: no reading, no labels, no writing. It is timed once before
the conversion and once after it, since the machine's speed may drift.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from renee_ray.config.schema import ConvertConfig
from renee_ray.data.sources.own import Own, pieces
from renee_ray.data.sources.records import Source
from renee_ray.data.sources.source import find_source
from renee_ray.data.storage import absolute
from renee_ray.service.bench.memory import ResidentPeak
from renee_ray.service.cluster import ensure_ray
from renee_ray.service.convert.convert import convert

CHUNK = 16384


def bench_convert(src: str, config: ConvertConfig) -> dict[str, Any]:
    """Times a conversion of `src` to a temporary directory.

    Returns:
        rows, of the training set; convert_s, of a conversion with Ray running already;
        rows_per_second; tokenizer_rows_per_second, the mean of before and after;
        ratio_to_tokenizer; peak_process_gib, resident memory of the greatest process that is not
        Ray's raylet, shared pages included, and peak_process, its command.
    """
    src = absolute(src)
    before = _tokenizer_rate(src, config)
    ensure_ray()
    target = tempfile.mkdtemp(prefix="renee-ray-bench-")
    try:
        with ResidentPeak() as peak:
            start = time.perf_counter()
            manifest = convert(src, f"{target}/dataset", config)
            seconds = time.perf_counter() - start
    finally:
        shutil.rmtree(target, ignore_errors=True)
    after = _tokenizer_rate(src, config)
    rows = manifest.num_points("train") + manifest.num_points("validation")
    rate = (before + after) / 2
    return {
        "rows": rows,
        "convert_s": seconds,
        "rows_per_second": rows / seconds,
        "tokenizer_rows_per_second": rate,
        "ratio_to_tokenizer": rows / seconds / rate,
        "peak_process_gib": peak.greatest / 2**30,
        "peak_process": peak.command,
    }


def _tokenizer_rate(src: str, config: ConvertConfig) -> float:
    """Runs this module: the tokenizer's threads must not be set up in this process."""
    command = [sys.executable, "-m", __name__, src, config.tokenizer, str(config.max_length)]
    command.append(config.labels)
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(done.stdout)


def time_tokenizer(src: str, name: str, max_length: int, labels_are: str) -> float:
    """Returns rows a second of `encode_batch_fast` on the training texts of `src`."""
    from tokenizers import Tokenizer

    from renee_ray.data import tokenizer

    made = Tokenizer.from_str(tokenizer.load(name).serialised)
    made.no_padding()
    made.enable_truncation(max_length)
    texts = _texts(src, labels_are)
    start = time.perf_counter()
    for first in range(0, len(texts), CHUNK):
        made.encode_batch_fast(texts[first : first + CHUNK])
    return len(texts) / (time.perf_counter() - start)


def _texts(src: str, labels_are: str) -> list[str]:
    found = find_source(src, labels_are)
    if isinstance(found, Own):
        read = pieces(found, "train", found.splits["train"])
        return [text for _, _, rows in read for text in rows["text"].cast("string").to_pylist()]
    if not isinstance(found, Source):
        path = found.train.texts
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    return [
        text
        for block in found.train.blocks
        for records in found.train.read(block, ["text"])
        for text in records.columns["text"].to_pylist()
    ]


if __name__ == "__main__":
    print(time_tokenizer(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]))
