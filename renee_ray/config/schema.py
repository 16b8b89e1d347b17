"""The configurations: frozen, validated when they are made, each key with its meaning below it.

overrides.py turns what is wrong into a `ConfigError`: one sentence that names the key, the value,
where it stands and the remedy.
"""

from __future__ import annotations

from json import dumps
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    model_validator,
)


def named(text: str) -> str:
    """Returns a path or a name. Refuses an empty one, such as a shell variable that is not set."""
    if not text.strip():
        raise ValueError("it is empty; give a path or a name")
    return text


Name = Annotated[str, AfterValidator(named)]


class Config(BaseModel):
    """Base of every configuration: immutable, and unknown keys are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class ConvertConfig(Config):
    """`renee-ray convert SRC DST`"""

    tokenizer: Name = "sentence-transformers/all-MiniLM-L6-v2"
    """Hugging Face name or directory of the tokenizer (a fast one)."""
    max_length: int = Field(128, ge=4)
    """Tokens kept of each text, special tokens included; training may cut further."""
    validation: float = Field(0.02, ge=0, lt=1)
    """Share of the training points held out for choosing a model, by a seeded hash of the id."""
    test: float = Field(0.1, ge=0, lt=1)
    """Share of the training points held out as the test split where the source has none."""
    text: str = ""
    """Own data: the column that is the text, or several as title+content; empty: guessed."""
    labels: Name = "auto"
    """Own data: the column of the labels, as tags; or what numbers in it are: ids, or (multi-hot) a
    0 or 1 for every label. auto: guessed; numbers are ids in Parquet, names in CSV."""
    separator: str = ""
    """Own data: between the labels of a row, as | or ;. none: one label; empty: guessed."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the global shuffle and of the validation split."""
    part_rows: int = Field(0, ge=0)
    """Rows of a part file; 0: 2,048, or so many that no split has more than about 1,000 files."""
    propensity_a: float = Field(0.55, gt=0)
    """A of the propensity model (Jain et al., KDD 2016)."""
    propensity_b: float = Field(1.5, gt=0)
    """B of the propensity model."""
    overwrite: bool = False
    """Replace a dataset that is already at DST."""


NO_TRANSFORMER = "none"


class BagConfig(Config):
    """Lexical features: hashed n-grams of tokens, each bucket with a trained vector."""

    dim: int = Field(0, ge=0)
    """Columns of the embedding beside the transformer's; 0: no bag."""
    ngrams: int = Field(2, ge=1, le=8)
    """Longest n-gram; all shorter ones are taken too."""
    buckets: int = Field(2**18, ge=2, le=2**31)
    """Vectors, which n-grams are hashed to. Each worker holds all of them: 4 * dim bytes each."""
    norm: float = Field(1.0, gt=0)
    """Expected norm of the bag's part of an embedding before training, and before `scale`."""
    learning_rate: float = Field(3e-3, ge=0)
    """Peak learning rate of row-wise Adagrad."""
    decay: float = Field(1.0, gt=0, le=1)
    """What is kept of Adagrad's sum of squares at each step that trains a vector. Below 1, vectors
    that are trained often go on moving: by learning_rate * sqrt(1 - decay) and more."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of a training point's n-grams that an epoch drops; each epoch drops others."""


class LoraConfig(Config):
    """Low-rank adapters (LoRA) in a transformer whose own weights stay as they are."""

    rank: int = Field(0, ge=0, le=4096)
    """Rank of the adapters, 16 for example, which need renee_ray[lora]; 0: no adapters."""
    alpha: int = Field(16, ge=1)
    """What an adapter adds is multiplied by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before an adapter; each worker draws its own masks."""
    targets: Literal["auto"] | tuple[Name, ...] = "auto"
    """Names of the linear layers that have an adapter, as [q_proj, v_proj]; auto: all."""


class EncoderConfig(Config):
    """The text encoder, trained data-parallel."""

    name: Name = "sentence-transformers/all-MiniLM-L6-v2"
    """Hugging Face name or directory of the encoder; none: no transformer, a bag alone."""
    bag: BagConfig = BagConfig()
    lora: LoraConfig = LoraConfig()
    frozen: bool = False
    """Leaves the transformer as it is. Each worker keeps the embeddings of the texts it has met in
    a file in TMPDIR, 4 bytes a dimension, so that later epochs need no transformer."""
    pooling: Literal["mean", "cls", "last"] = "mean"
    """The embedding of a text: the mean of its tokens, its first, or its last, which alone has
    seen all others in a decoder."""
    prompt: str = ""
    """Text put before every text that the transformer reads; a bag does not see it."""
    normalise: bool = False
    """Scales every embedding to norm 1, before `scale`."""
    scale: float = Field(1.0, gt=0)
    """Factor of every embedding, before the constant of `classifier.init=label_text` is added."""
    weights: str = ""
    """File of initial weights: safetensors or a torch state_dict, as NGAME's M1; empty: none."""
    max_length: int = Field(32, ge=4)
    """Tokens of a text that the encoder reads, with its prompt; longer rows are cut."""
    bottleneck: int = Field(0, ge=0)
    """Width of a bias-free linear layer after pooling; 0: none."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the embedding; its mask depends on seed, step and place in the global batch."""
    internal_dropout: float | None = Field(0.0, ge=0, lt=1)
    """Dropout inside the encoder; null: as the model's own configuration says."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """Attention implementation; auto: `eager` on CPU, whose training is faster there, else `sdpa`.
    On CPU `sdpa` trains through its math kernel, since the fused one's backward is slow."""
    autocast: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """Autocast of the encoder; auto: bf16 where the device multiplies it natively, else fp16 on a
    GPU and none on a CPU. fp16 has a dynamic loss scale."""
    compile: bool = False
    """Runs the encoder through torch.compile; training rows are then padded to a multiple of 8
    tokens. Rows and tokens are symbols: one graph for any batch, another for a single row, each
    once more without gradient."""
    micro_batch: int = Field(0, ge=0)
    """Rows of a worker that the encoder works on at once; 0: all. Its memory is then bounded
    whatever the batch_size, for a second forward pass of all micro-batches but one."""
    gradient_checkpointing: bool = False
    """Recomputes activations in the backward: less memory, a third more time."""
    learning_rate: float = Field(1e-4, ge=0)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled decay of AdamW; never on biases and normalisation weights."""
    clip_norm: float = Field(0.0, ge=0)
    """Largest norm of the encoder's gradient, of the loss summed over the batch; 0: no clipping."""
    gradient: Literal["sum", "mean"] = "sum"
    """Across workers: `sum` keeps the trajectory when num_workers changes; `mean` divides by
    num_workers as the released reference does."""

    @model_validator(mode="after")
    def _keys_go_together(self) -> EncoderConfig:
        if self.name == NO_TRANSFORMER and not self.bag.dim:
            raise ValueError(
                "name none leaves nothing that embeds a text without a bag; "
                "set encoder.bag.dim, to 512 for example"
            )
        none = "bottleneck compile frozen gradient_checkpointing lora pooling prompt weights"
        for applies, keys, reason in (
            (self.name == NO_TRANSFORMER, none, "needs a transformer, and name is none"),
            (self.frozen, "gradient_checkpointing internal_dropout lora", "excludes frozen=true"),
            (not self.lora.rank, "lora", "has no effect with rank 0"),
            # Checkpoints hold what is trained, and refer to `name` for the rest.
            (
                self.frozen or self.lora.rank,
                "weights",
                "does not go with frozen weights",
            ),
        ):
            for key in keys.split():
                usual = type(self).model_fields[key].default
                if applies and getattr(self, key) != usual:
                    off = "" if key == "lora" else f" or set it to {dumps(usual)}"
                    raise ValueError(f"{key} {reason}; leave it out{off}")
        return self

    @property
    def trains_transformer(self) -> bool:
        """Whether the weights of the transformer itself are trained."""
        return self.name != NO_TRANSFORMER and not (self.frozen or self.lora.rank)


class ClassifierConfig(Config):
    """The fully connected classifier (XFC), one shard of labels per worker."""

    precision: Literal["auto", "fp32", "bf16_split", "bf16_sr", "fp16", "fp8_sr"] = "auto"
    """Storage of the weights. fp32; bf16_split: fp32 as two halves of 16 bits; bf16_sr and fp8_sr:
    2 and 1 bytes, rounded stochastically; fp16: an fp32 master and an fp16 copy; auto: bf16_sr
    where the first worker's device multiplies bf16, else fp16 on a GPU and fp32 on a CPU. All but
    fp32 multiply in bf16 or fp16 where the device does so natively; fp8_sr's logits in e4m3."""
    objective: Literal["bce", "softmax"] = "bce"
    """What is minimised, summed over the points: binary cross-entropy with every label, or the
    decoupled softmax, in which each positive competes with all negatives of its point."""
    init: Literal["normal", "label_text"] = "label_text"
    """First weights: N(0, init_std), or the encoder's embedding of the label's text."""
    init_std: float = Field(0.02, ge=0)
    """Standard deviation of `normal`."""
    init_scale: float = Field(30.0, gt=0)
    """`label_text`: logit of a point whose embedding equals a label's, above the label's prior."""
    init_centroid: float = Field(1.0, ge=0)
    """`label_text`: weight of the mean of the label's training points beside its text; 0: the
    text alone, and no pass over all points."""
    init_constant: float = Field(5.0, ge=0)
    """`label_text`: norm of the constant added to every embedding, which stands in for a bias."""
    learning_rate: float = Field(2e-3, ge=0)
    """Peak learning rate of SGD, on the gradient summed over the global batch."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of SGD; 0 needs no buffer."""
    weight_decay: float = Field(0.0, ge=0)
    """Coupled weight decay of SGD."""
    chunk: int = Field(0, ge=0)
    """Labels worked on at once; 0: chosen so that a chunk stays in the cache."""


class FeedConfig(Config):
    """The order of points and how they are read."""

    augment: float = Field(0.0, ge=0, le=1)
    """Share of the label texts that an epoch streams as extra points, each with its own label
    as the only positive: whole files of the dataset, at least one; successive epochs take
    successive ones. With `filter_labels: positive` only texts of labels that are not themselves
    points of the training set are taken."""
    filter_labels: Literal["positive", "negative"] = "positive"
    """How a point trains with its filter labels, which are never predicted: in the LF datasets
    they are the point itself as a label, whose text `positive` teaches at no cost."""
    targets: str = ""
    """Soft targets: a teacher's predictions for the training points, as `renee-ray predict RUN
    DATASET DST split=train scores=probabilities` writes them; empty: none."""
    targets_weight: float = Field(0.5, ge=0, le=1)
    """lambda of the target of a label: (1 - lambda) * given + lambda * predicted, where given is 0
    or 1; a given label that the teacher does not list stays 1. Not for filter labels."""
    token_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of a training point's tokens that an epoch drops, never the first or the last; each
    epoch drops others."""
    streams: int = Field(8, ge=1)
    """Pieces of a global batch, each read as a stream of its own. If num_workers exceeds it, some
    workers read the same stream and each keeps its own rows, which costs CPU time."""
    window: int = Field(64, ge=1)
    """Batches inside which rows are ordered by length."""
    prefetch: int = Field(4, ge=1)
    """Windows that are read in one go, while as many earlier ones are trained on."""


METRIC = r"^((P|nDCG|PSP|PSnDCG)@[135]|recall@(10|100))$"


class EvalConfig(Config):
    """Evaluation on the validation split while training."""

    every: float = Field(1.0, ge=0)
    """Epochs between evaluations (and checkpoints); 0: only at the end."""
    tail: float = Field(0.0, ge=0)
    """tau of the logit adjustment: every score, in validation, evaluation and prediction, loses
    tau * log(training points of the label), which favours rare labels (Menon et al., ICLR 2021)."""
    tails: tuple[Annotated[float, Field(ge=0)], ...] = ()
    """Other values of `tail`. The best on the validation split replaces it after training, but none
    that lowers a figure by more than half a point."""
    neighbours: int = Field(0, ge=0)
    """Nearest training points, by the trained embedding, whose labels vote in `evaluate` and
    `predict` (not in validation while training); 0: none. Each worker then embeds and holds its
    share of the training points, 4 bytes a dimension."""
    neighbour_weight: float = Field(3.0, ge=0)
    """What a label gains that all neighbours have; others in proportion."""
    metric: str = Field("P@1", pattern=METRIC)
    """The metric that the best checkpoint is chosen by."""
    batch_size: int = Field(512, ge=1)
    """Points of a global batch when scoring."""


class CheckpointConfig(Config):
    """Checkpoints of a run."""

    keep: int = Field(2, ge=1)
    """Newest checkpoints kept; the best on the validation split is kept besides."""
    every_steps: int = Field(0, ge=0)
    """Steps between checkpoints inside an epoch; 0: only after evaluations."""
    background: bool = True
    """Write while training goes on, from a copy in host memory. If the copy does not fit, or with
    `false`, training waits until the checkpoint is written."""
    grace_s: float = Field(30.0, gt=0)
    """Seconds that a checkpoint may take when a worker or the driver is told to stop (SIGTERM), or
    before workers are regrouped."""
    max_failures: int = Field(3, ge=-1)
    """Lost workers that a run survives; -1: any number. A node that Ray was told to drain does not
    count, a spot node that just goes does; a user's error ends the run at once."""


class ObserveConfig(Config):
    """Logs and curves of a run."""

    log_format: Literal["text", "json"] = "text"
    """Lines in the workers' logs: text, or a JSON object each; both with rank and step."""
    log_to: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()
    """Where curves go besides history.json: tensorboard, to `tensorboard_dir`; mlflow, to where
    MLFLOW_TRACKING_URI in the environment of the nodes says; wandb, with its WANDB_API_KEY."""
    tensorboard_dir: str = ""
    """Directory of TensorBoard's files; empty: OUTPUT/tensorboard."""
    profile: bool = False
    """Writes a trace of ten early steps of each rank, by torch's profiler, to OUTPUT/profile."""
    straggler_factor: float = Field(1.5, gt=1)
    """A worker is reported when its own time a step exceeds the median of all by this factor."""
    straggler_window_s: float = Field(60.0, gt=0)
    """Seconds over which that time is averaged, and between two such warnings."""


class Placed(Config):
    """Where Ray Train workers run."""

    use_gpu: Literal["auto", "yes", "no"] = "auto"
    """One GPU for each worker; auto: where the cluster has that many."""
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Workers on few nodes or on many; STRICT: on one node, or each on its own."""
    accelerator_type: str = ""
    """Kind of GPU that workers run on, as Ray names it (L4, A100, H100); empty: any."""
    cpus_per_worker: int = Field(0, ge=0)
    """CPUs that Ray reserves for a worker; 0: one for a worker on CPU, none beside a GPU."""


class RunConfig(Placed):
    """`renee-ray train CONFIG`"""

    data: Name
    """Dataset directory, made by `renee-ray convert`."""
    output: Name
    """Run directory; a run that is already there is resumed."""
    recipe: str = ""
    """Recipe that the settings began as, which `expect` compares with; its name sets it."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of initial weights, order and dropout."""
    num_workers: int | tuple[int, int] = 2
    """Ray Train workers: data-parallel replicas of the encoder and shards of the classifier. Or the
    fewest and the most, as [2, 8]: the run then uses as many as there are nodes for."""
    regroup_s: float = Field(60.0, gt=0)
    """With a range of workers: seconds between two checks whether there is room for more."""
    threads: int = Field(0, ge=0)
    """Threads of a worker; 0: the cores of its node divided among the workers there, and at most 4
    beside a GPU."""
    batch_size: int = Field(256, ge=1)
    """Points of a global batch."""
    epochs: int = Field(10, ge=1)
    """Passes over the training points."""
    start: str = ""
    """Run with the labels of `data`, from whose best checkpoint a new run begins, with momentum.
    The model must be the same; without a CONFIG, all settings are those of that run."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of all steps in which both learning rates rise linearly; a cosine follows, to 0 without
    `average`."""
    average: float = Field(0.0, ge=0, lt=1)
    """Share of all steps, at the end, whose weights are averaged: the mean replaces the last ones.
    The learning rates that the share begins with are kept. 0: none."""
    loss_every: int = Field(20, ge=0)
    """Steps between two computations of the loss; 0: never."""
    timeout_s: int = Field(120, ge=5)
    """Seconds, the timeout of a collective inside a step. Before a step, and for a worker's next
    batch, the patience with storage is added (RENEE_RAY_STORAGE_PATIENCE_S, 300)."""
    encoder: EncoderConfig = EncoderConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    feed: FeedConfig = FeedConfig()
    evaluation: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    observe: ObserveConfig = ObserveConfig()

    @property
    def min_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @model_validator(mode="after")
    def _batch_can_be_cut(self) -> RunConfig:
        if not 1 <= self.min_workers <= self.max_workers:
            raise ValueError(
                f"num_workers {self.num_workers} is neither a number from 1 on nor [fewest, most]; "
                f"correct it"
            )
        if self.warmup + self.average > 1:
            raise ValueError(
                f"average {self.average} includes steps of the warmup {self.warmup}; set "
                f"average=0 or lower one"
            )
        if self.start and self.encoder.weights:
            raise ValueError(f"start={self.start!r} has the encoder too; omit encoder.weights")
        weight = FeedConfig.model_fields["targets_weight"].default
        if self.feed.targets_weight != weight and not self.feed.targets:
            raise ValueError("feed.targets_weight weighs feed.targets, which are not given")
        if self.encoder.frozen and self.feed.token_dropout:
            raise ValueError(
                f"feed.token_dropout {self.feed.token_dropout} gives every epoch other texts, and "
                f"encoder.frozen embeds a text once; leave one out"
            )
        if self.batch_size % self.feed.streams:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of feed.streams "
                f"{self.feed.streams}; change one of them"
            )
        if self.max_workers > self.batch_size:
            raise ValueError(
                f"num_workers {self.max_workers} exceeds batch_size {self.batch_size}, and each "
                f"worker takes rows of every batch; raise batch_size"
            )
        return self
