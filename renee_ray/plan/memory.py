"""The memory of one worker's device by component, in bytes.

Ledger, for a global batch of B rows, of which a worker has b, T tokens, and a worker of R with n
labels of dimension D:

    weights, momentum    [n, D]        xfc/weights/storages.py
    averages             [n, D], and fp32 of what is trained of the encoder (training/averages.py)
    encoder              parameters, gradients and two moments of AdamW, fp32, of what is trained:
                         the transformer, or the adapters of one that is frozen; the bottleneck
    frozen parameters    fp32, of a transformer that is not trained itself
    remembered texts     what finds the embedding of each in a file (model/remembered.py)
    bag                  [buckets, D'] fp32; of a step the rows read, their gradients and copies
    activations          what the encoder's forward keeps for b rows, or for a micro-batch, of T;
                         of a transformer without adapters that is frozen: one layer's, for its
                         rows of an evaluation's batch, in which all points are embedded, or for
                         a batch of label texts
    chunk                buffers of a chunk of labels on each lane (xfc/shard.py, xfc/device.py)
    embeddings           [B, D]        E gathered, padded and cut, and dE of each lane
    checkpoint copy      in host memory, which on a CPU is the same
    first weights        centroids, fp32 [n, D], beyond what comes when they are gone: gradients,
                         moments, a step's memory and the copy (model/initialise.py)

Gradients and activations are there at different times where no DDP keeps buckets: the backward
frees the latter as it makes the former. So with one worker the greater of them counts. On a CPU
the gradient of the token vectors is there in both (model/token_gradient.py). A frozen transformer
embeds all texts before the first checkpoint copies the bag, so there too the greater counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from renee_ray.config.schema import EncoderConfig, RunConfig
from renee_ray.data.dataset import Manifest
from renee_ray.model.encoder import attention_of, autocast_dtype
from renee_ray.model.initialise import TEXT_BATCH
from renee_ray.model.prompt import Prompt
from renee_ray.plan.devices import Device, cores
from renee_ray.plan.encoder import Transformer
from renee_ray.xfc.device import choose_precision
from renee_ray.xfc.labels import split_range
from renee_ray.xfc.lanes import lane_count
from renee_ray.xfc.shard import GRADIENT_BYTES, default_chunk, label_bytes
from renee_ray.xfc.weights.storages import STORAGES, stored_bytes

ALLOCATOR_SHARE = 0.1
"""Share of what comes and goes that an allocator holds besides: an assumption."""
HEAP_SHARE = 0.9
"""Share of activations that the heap of a CPU holds besides that: their sizes differ from batch to
batch, and oneDNN keeps kernels for some. 440 MiB for 241 of all-MiniLM-L6-v2 (docs/log.md)."""
REMEMBERED_BYTES = 100
"""What a worker keeps of a text whose embedding it has in a file."""
BAG_ROWS = 6
"""Arrays of a step with a row for each n-gram: vectors, gradient, coalesced, of all ranks, summed,
and multiplied by the rates (model/bag.py)."""
GATHERED_ROWS, RANK_ROWS = 3, 2
"""Arrays while they are gathered, on one rank and for each: own, times the scale, padded; received,
and put together (BagOptimizer.reduce). With several ranks these are more."""
COPIED = (
    "weights", "momentum", "averages", "encoder parameters", "encoder moments", "encoder averages",
    "bag",
)  # fmt: skip
"""Components that the first worker saves; the others save what the classifier has of them."""
STATES = (*COPIED, "encoder gradients", "frozen parameters")
"""Components that are there whatever a batch is like."""


@dataclass(frozen=True)
class Workload:
    """What a plan knows of a dataset. points: of an epoch without label texts; None: unknown.

    tokens: mean of a point; longest: tokens of the longest point; both with a prompt's.
    other_texts: labels that are no points; None: unknown. label_parts: files of label texts, of
    which an epoch streams a whole number; 0: unknown.
    """

    labels: int
    points: int | None
    tokens: float
    longest: int
    has_label_texts: bool = True
    other_texts: int | None = None
    label_parts: int = 0

    @classmethod
    def of_manifest(cls, manifest: Manifest, encoder: EncoderConfig) -> Workload:
        counts = manifest.statistics.get("train", {})
        prompt = len(Prompt(encoder).tokens) if encoder.prompt else 0
        longest = counts.get("tokens_max", manifest.max_length)
        tokens = min(encoder.max_length, counts.get("tokens_mean", longest) + prompt)
        return cls(
            manifest.num_labels, manifest.num_points("train"), tokens,
            min(encoder.max_length, longest + prompt), manifest.has_label_texts,
            sum(manifest.other_texts), len(manifest.splits["labels"]),
        )  # fmt: skip


@dataclass(frozen=True)
class Worker:
    """A worker that a run is planned for: the one with the most labels and rows.

    compute: dtype of the classifier's products; dim: D; batch: B; rows: b.
    """

    config: RunConfig
    device: Device
    transformer: Transformer
    workload: Workload
    num_workers: int

    @property
    def precision(self) -> str:
        device = self.device
        return choose_precision(self.config.classifier.precision, device.bf16, device.fp16)

    @property
    def compute(self) -> torch.dtype:
        own = STORAGES[self.precision].compute
        native = self.device.bf16 if own == torch.bfloat16 else self.device.fp16
        return own if native else torch.float32

    @property
    def kernels(self) -> bool:
        """Whether the classifier runs on Triton's kernels."""
        return self.device.kind == "cuda" and self.device.bf16 and self.compute != torch.float32

    @property
    def autocast(self) -> torch.dtype | None:
        """Dtype of the encoder's products."""
        return autocast_dtype(self.config.encoder.autocast, self.device.bf16, self.device.fp16)

    @property
    def dim(self) -> int:
        encoder = self.config.encoder
        return (encoder.bottleneck or self.transformer.hidden) + encoder.bag.dim

    @property
    def labels(self) -> int:
        start, stop = split_range(self.workload.labels, self.num_workers, self.num_workers - 1)
        return stop - start

    @property
    def batch(self) -> int:
        return self.config.batch_size

    @property
    def rows(self) -> int:
        return -(-self.batch // self.num_workers)

    @property
    def ngrams(self) -> int:
        """N-grams of this worker's rows, at most as many as there are buckets."""
        bag = self.config.encoder.bag
        return min(bag.buckets, self.rows * bag.ngrams * round(self.workload.tokens))

    @property
    def threads(self) -> int:
        return self.config.threads or max(1, cores() // self.num_workers)

    @property
    def parameters(self) -> int:
        """Parameters that AdamW trains."""
        encoder, own = self.config.encoder, self.transformer
        trained = own.parameters if encoder.trains_transformer else own.adapters
        return trained + encoder.bottleneck * own.hidden

    def without_copy(self) -> Worker:
        """Returns the worker as it is where memory is short."""
        alone = self.config.checkpoint.model_copy(update={"background": False})
        return replace(self, config=self.config.model_copy(update={"checkpoint": alone}))

    def memory(self) -> dict[str, int]:
        """Returns the bytes of each component. Some, such as momentum, may be 0."""
        weight, velocity = stored_bytes(self.precision)
        numbers, encoder, kind = self.labels * self.dim, self.config.encoder, self.device.kind
        averaged = self.parameters + encoder.bag.dim * encoder.bag.buckets
        states = {
            "weights": weight * numbers,
            "momentum": velocity * numbers if self.config.classifier.momentum else 0,
            "averages": velocity * numbers * (self.config.average > 0),
            "encoder averages": 4 * averaged * (self.config.average > 0),
            "encoder parameters": 4 * self.parameters,
            "encoder gradients": 4 * self.parameters,
            "encoder moments": 8 * self.parameters,
            "frozen parameters": 4 * self.transformer.parameters * (not encoder.trains_transformer),
            "remembered texts": REMEMBERED_BYTES * (self.workload.points or 0) * encoder.frozen,
            "bag": (4 * encoder.bag.dim + 8) * encoder.bag.buckets if encoder.bag.dim else 0,
        }
        chunk, embeddings = self._classifier()
        passing = {
            "activations": self._activations(),
            "rows of the bag": 4 * self._bag_rows() * encoder.bag.dim * self.ngrams,
            "chunk of labels": chunk,
            "embeddings": embeddings,
        }
        if self.num_workers == 1:
            freed = states["encoder gradients"]
            if kind == "cpu" and not encoder.compile and encoder.trains_transformer:
                freed -= 4 * (self.transformer.parameters - self.transformer.multiplied)
            passing["activations"] = max(0, passing["activations"] - freed)
        background = self.config.checkpoint.background
        copied = background * sum(states[name] for name in COPIED)
        if encoder.frozen and kind == "cpu":
            copied_later = states["bag"] + states["encoder averages"]
            before = passing["activations"] - background * copied_later
            passing["activations"] = max(0, before)
        heap = HEAP_SHARE * passing["activations"] * (kind == "cpu")
        later = {
            "checkpoint copy": copied if kind == "cpu" else 0,
            "allocator": int(ALLOCATOR_SHARE * sum(passing.values()) + heap),
        }
        settings = self.config.classifier
        centroids = settings.init == "label_text" and settings.init_centroid > 0
        replaced = states["encoder gradients"] + states["encoder moments"] + sum(passing.values())
        first = max(0, 4 * numbers * centroids - replaced - sum(later.values()))
        last = {"first weights": first, "framework": self.device.framework}
        return states | passing | later | last

    def _activations(self) -> int:
        encoder = self.config.encoder
        attention = attention_of(encoder.attention, self.device.kind)
        rows = min(self.rows, encoder.micro_batch or self.rows)
        if encoder.frozen:
            rows = max(TEXT_BATCH, -(-self.config.evaluation.batch_size // self.num_workers))
        kept = self.transformer.activations(
            rows, self.workload.longest, attention, self.autocast, self.device.kind,
            encoder.gradient_checkpointing,
        )  # fmt: skip
        return kept // max(1, self.transformer.layers) if encoder.frozen else kept

    def _bag_rows(self) -> int:
        """Returns the arrays that there are at once with a row for each of `ngrams`."""
        return max(BAG_ROWS, GATHERED_ROWS + RANK_ROWS * self.num_workers)

    def _classifier(self) -> tuple[int, int]:
        """Returns the bytes of the chunks and of E and dE, of all lanes."""
        kind, item = self.device.kind, self.compute.itemsize
        aliased = STORAGES[self.precision].weight.aliased
        expanded = kind == "cuda" and not self.kernels and not aliased
        softmax = self.config.classifier.objective == "softmax"
        each = label_bytes(self.batch, self.dim, item, self.kernels, expanded, softmax)
        chunk = self.config.classifier.chunk or default_chunk(each, kind)
        own = GRADIENT_BYTES * self.batch * self.dim
        lanes = lane_count(self.labels, own, torch.device(kind), self.threads)
        cells = self.batch * self.dim
        embeddings = (4 + item) * cells + (12 * cells if self.num_workers > 1 else 0)
        return lanes * each * min(chunk, -(-self.labels // lanes)), embeddings + lanes * own
