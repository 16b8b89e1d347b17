"""The configurations of what trained runs do."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from renee_ray.config.schema import METRIC, Config, Name, Placed


class Chosen(Config):
    """Which checkpoint of a run is used."""

    checkpoint: Literal["best", "last"] = "best"
    """Checkpoint of the run: the best on the validation split, or the newest. An export has one."""


class Searched(Chosen):
    """How labels are found and scored."""

    search: Literal["exact", "index"] = "exact"
    """Scores every label, or those that an index of `renee-ray index RUN` finds."""
    index: str = ""
    """With search=index: its directory; empty: RUN-index."""
    tail: float | None = Field(None, ge=0)
    """tau of the logit adjustment; null: as `evaluation.tail` of the run."""
    neighbours: int | None = Field(None, ge=0)
    """Training points that vote; null: as `evaluation.neighbours` of the run."""
    neighbour_weight: float | None = Field(None, ge=0)
    """What a label gains that all neighbours have; null: as in the run."""

    @model_validator(mode="after")
    def _by_the_index(self) -> Self:
        if self.index and self.search == "exact":
            raise ValueError("index goes with search=index; add that, or leave index out")
        return self


class ScoreConfig(Searched, Placed):
    """`renee-ray evaluate RUN DATASET` and `renee-ray predict RUN SRC DST`"""

    split: Literal["test", "validation", "train"] = "test"
    """Points of the dataset that are scored; of raw texts, all are."""
    k: int = Field(100, ge=1)
    """Labels predicted for each point."""
    num_workers: int = Field(0, ge=0)
    """Ray Train workers; 0: as many as trained the run."""
    batch_size: int = Field(512, ge=1)
    """Points of a global batch."""
    allow: str = ""
    """File with the ids or names of labels, one a line, that alone are predicted."""
    deny: str = ""
    """File with labels, as `allow`, that are not predicted."""
    scores: Literal["logits", "probabilities", "calibrated"] = "logits"
    """predict: as the model has them; or their sigmoids, which `feed.targets` are, for BCE without
    votes and adjustment; or probabilities by the run's calibration."""
    calibrate: bool = False
    """evaluate: fit probabilities of scores on validation points; the run and exports keep it."""
    threshold: float | None = None
    """predict: leave out labels whose written score is below; null: none."""
    memory_gib_per_worker: float = Field(0.0, ge=0)
    """GiB that a worker may take for labels, which come in passes if they do not fit; 0: what is
    free on its node or GPU."""
    texts: bool = False
    """predict: add the labels' texts as column `label_texts`."""
    explain: bool = False
    """predict: add what transformer, bag and the rest each add to a score; the run needs a bag."""
    overwrite: bool = False
    """predict: replace predictions that are already at DST."""


class ExportConfig(Chosen):
    """`renee-ray export RUN DST`"""

    overwrite: bool = False
    """Replace an export that is already at DST."""


class IndexConfig(Chosen):
    """`renee-ray index MODEL`"""

    output: str = ""
    """Directory of the index; empty: MODEL-index, where `search=index` looks for it; symbolic links
    of MODEL are followed."""
    factory: str = ""
    """FAISS factory string of a range, as IVF1024,SQ8: a flat, HNSW or IVF index; empty: chosen by
    the number of labels of a range, or that of an index which is there."""
    ranges: int = Field(0, ge=0)
    """Label ranges, each with a file of its own and built by a task of its own; 0: those of an
    index which is there, and one for labels that were added since; else as many as a run has
    workers, or more so that none has more than 20,000,000 labels."""
    candidates: int = Field(0, ge=0)
    """Labels of each range that are scored again with the true weights, for each one asked for, and
    at least for 10; raised where no effort finds enough. 0: 30, or 1 of `Flat`, which is exact."""
    recall: float = Field(0.95, gt=0, le=1)
    """Share of the exact 10 best labels to find: the least search effort that does so is kept."""
    points: str = ""
    """Dataset whose validation points (training points where it has none) recall is measured on;
    empty: the one that a run was trained on. An export needs it."""
    sample: int = Field(1000, ge=1)
    """Points that recall is measured on."""
    overwrite: bool = False
    """Replace an index that is already at `output`; ranges whose labels are the same are kept."""


class CompareConfig(Chosen):
    """`renee-ray compare RUN RUN ...`"""

    data: str = ""
    """Dataset whose points are predicted; empty: that of the first run."""
    output: Name = "comparison"
    """Local directory for the page and for the predictions of runs."""
    split: Literal["test", "validation"] = "test"
    """Points that are compared."""
    num_workers: int = Field(0, ge=0)
    """Workers that predict; 0: as many as trained the run."""
    seed: int = Field(0, ge=0)
    """Seed of the bootstrap samples."""


NonNegative = Annotated[float, Field(ge=0)]


class FuseConfig(Config):
    """`renee-ray fuse PRED PRED ... DST`"""

    weights: tuple[NonNegative, ...] = ()
    """A weight for each directory of predictions, as [0.7, 0.3]; empty: equal ones, or tuned."""
    tune: tuple[Name, ...] = ()
    """The same models' predictions for the validation split, by which weights are chosen."""
    data: str = ""
    """With `tune`: the dataset of these validation points."""
    metric: str = Field("nDCG@5", pattern=METRIC)
    """With `tune`: what the weights are to raise."""
    k: int = Field(100, ge=1)
    """Labels of each point."""
    overwrite: bool = False
    """Replace predictions that are already at DST."""

    @model_validator(mode="after")
    def _either(self) -> FuseConfig:
        if self.weights and self.tune:
            raise ValueError("weights and tune exclude each other; leave one out")
        if self.data and not self.tune:
            raise ValueError("data goes with tune; add that, or leave data out")
        return self


TOKEN = "RENEE_RAY_SERVE_TOKEN"
"""The environment variable that holds the secret which requests must bear."""


class ServeConfig(Searched):
    """`renee-ray serve MODEL`"""

    host: Name = "127.0.0.1"
    """Address to listen on: by default this machine alone; 0.0.0.0: all networks it is in."""
    port: int = Field(8000, ge=0, lt=2**16)
    """TCP port; 0: any free one."""
    num_shards: int = Field(0, ge=0)
    """Processes with a range of labels each; 0: as many as trained the run, 1 for an export."""
    num_encoders: int = Field(1, ge=1)
    """Processes that embed texts and merge the shards' answers; more if these are slower."""
    threads: int = Field(0, ge=0)
    """Torch threads of a process on CPU; 0: the cores of the machine divided among the shards."""
    gpus_per_process: float = Field(0.0, ge=0, le=1)
    """GPUs for each shard and each encoder: 1, or a fraction if they share; 0: CPUs only."""
    max_k: int = Field(100, ge=1)
    """Labels that a request may ask for, for each text."""
    max_texts: int = Field(256, ge=1)
    """Texts of a request."""
    max_text_chars: int = Field(20000, ge=1)
    """Characters of a text."""
    max_body_bytes: int = Field(4 << 20, ge=1)
    """Bytes of a request's body."""
    max_batch_size: int = Field(512, ge=1)
    """Texts, of several requests together, that are scored at once."""
    batch_wait_ms: float = Field(5.0, ge=0)
    """Milliseconds for which a batch that is not full waits for further requests."""
    max_waiting: int = Field(64, ge=1)
    """Requests that are read or scored at a time; further ones are answered 429."""
    timeout_s: float = Field(30.0, gt=0)
    """Seconds for a request's head, and then for its body and its answer, for which a request may
    set fewer by its header X-Timeout-Ms."""

    @model_validator(mode="after")
    def _request_fits_batch(self) -> ServeConfig:
        if self.max_texts > self.max_batch_size:
            raise ValueError(
                f"max_texts {self.max_texts} exceeds max_batch_size {self.max_batch_size}; "
                f"raise max_batch_size"
            )
        return self
