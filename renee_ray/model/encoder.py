"""The text encoder: tokens -> embedding, its optimizer, and its data-parallel wrapper."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from renee_ray.config.schema import NO_TRANSFORMER, EncoderConfig
from renee_ray.data.models import resolve_model
from renee_ray.errors import ReneeError, reason
from renee_ray.model.adapters import add_adapters
from renee_ray.model.bag import Bag, BagOptimizer
from renee_ray.model.dropout import draw_fast
from renee_ray.model.prompt import Prompt
from renee_ray.model.remembered import Remembered
from renee_ray.model.token_gradient import TokenGradient
from renee_ray.rank.batch import length_groups
from renee_ray.rank.collectives import Ranks, own_buffers, sum_gradients
from renee_ray.xfc.device import native_narrow

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)

POSITION_TABLES = {"position_embeddings", "embed_positions", "wpe"}
"""Names that models give their table of position vectors."""


class Encoder(nn.Module):
    """Transformer, pooling in fp32, and an optional bias-free fp32 bottleneck.

    Equals `bottleneck((h * mask).sum(1) / mask.sum(1)) + constant` for h [b, T, H] the last hidden
    states (Renée, section 3.1), or another pooling. `constant` [D] is 0, as in the paper, unless
    `classifier.init=label_text` sets it (model/initialise.py); it is not trained.
    With a bag, its columns follow those of the transformer, or stand alone. `normalise` and `scale`
    are applied to all columns before the constant is added.

    remembered: holds the embeddings of a frozen transformer, or None.
    """

    remembered: Remembered | None = None

    def __init__(self, config: EncoderConfig, device: torch.device) -> None:
        super().__init__()
        alone = config.name == NO_TRANSFORMER
        self.backbone: PreTrainedModel | None = None if alone else _backbone(config, device)
        hidden: int = self.backbone.config.hidden_size if self.backbone is not None else 0
        self.bottleneck = (
            nn.Linear(hidden, config.bottleneck, bias=False) if config.bottleneck else None
        )
        self.bag = Bag(config.bag) if config.bag.dim else None
        self.dim = (config.bottleneck or hidden) + config.bag.dim
        self.prompt = Prompt(config) if config.prompt else None
        self.pooling, self.normalise, self.scale = config.pooling, config.normalise, config.scale
        self.constant: Tensor
        self.register_buffer("constant", torch.zeros(self.dim))
        self.autocast = autocast_dtype(config.autocast, *native_narrow(device))
        self.compiled, self.grouped = config.compile, works_in_groups(config, device)
        if config.weights:
            load_initial_weights(self, config.weights)
        self.to(device)

    def train(self, mode: bool = True) -> Encoder:
        """Sets the mode of all but a frozen transformer, which never drops anything out."""
        super().train(mode)
        if self.backbone is not None:
            self.backbone.train(mode and any(p.requires_grad for p in self.backbone.parameters()))
        return self

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, keys: Tensor | None = None
    ) -> Tensor:
        """Embeds rows of tokens: float32 [b, D].

        input_ids, attention_mask: int64 [b, T], as `padded_tokens` makes them; keys: int64 [b], of
        the bag's dropout.
        """
        parts = []
        if self.remembered is not None:
            parts.append(self.remembered(input_ids, attention_mask))
        elif self.backbone is not None:
            parts.append(self.pooled(input_ids, attention_mask))
        with torch.autocast(input_ids.device.type, enabled=False):
            if self.bottleneck is not None:
                parts[0] = self.bottleneck(parts[0])
            if self.bag is not None:
                parts.append(self.bag(input_ids, attention_mask, keys))
            embeddings = torch.cat(parts, 1)
            if self.normalise:
                embeddings = nn.functional.normalize(embeddings, dim=1)
            if self.scale != 1:
                embeddings = embeddings * self.scale
            return embeddings + self.constant

    def pooled(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns the transformer's embeddings of tokens, with the prompt: float32 [b, H].

        Where `works_in_groups`, rows of similar length are padded to the longest among them.
        """
        assert self.backbone is not None
        if self.prompt is not None:
            input_ids, attention_mask = self.prompt(input_ids, attention_mask)
        # In one context, all groups of rows share the casts of the weights.
        with torch.autocast(
            input_ids.device.type, self.autocast, enabled=self.autocast is not None
        ):
            if not self.grouped or attention_mask.stride(1) == 0:
                hidden = self._hidden(self.backbone, input_ids, attention_mask)
                return pool(hidden, attention_mask, self.pooling)
            lengths = attention_mask.sum(1).numpy()
            pooled, order = [], []
            for rows in length_groups(lengths):
                width, own = int(lengths[rows[-1]]), torch.from_numpy(rows)
                mask = attention_mask[own, :width]
                if lengths[rows[0]] == width:
                    mask = mask[:1, :1].expand(mask.shape)
                hidden = self._hidden(self.backbone, input_ids[own, :width], mask)
                pooled.append(pool(hidden, mask, self.pooling))
                order.append(own)
            return torch.cat(pooled)[torch.cat(order).argsort()]

    def _hidden(
        self, backbone: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """Returns the last hidden states; a CPU notices a token outside the vocabulary."""
        # Compiled code is compiled anew for an absent mask, and for a mask of other strides.
        padded = self.compiled or attention_mask.stride(1) != 0
        mask = attention_mask.contiguous() if padded else None
        try:
            hidden: Tensor = backbone(input_ids=input_ids, attention_mask=mask)[0]
        except IndexError as error:
            raise ReneeError(
                f"the dataset has token ids up to {int(input_ids.max())} and the encoder knows "
                f"{backbone.config.vocab_size} tokens in texts of at most "
                f"{getattr(backbone.config, 'max_position_embeddings', 'any')}; convert the "
                f"source with the tokenizer of the encoder"
            ) from error
        return hidden


def works_in_groups(config: EncoderConfig, device: torch.device) -> bool:
    """Returns whether rows are padded in groups of similar length (`length_groups`), not together.

    On a GPU a group is some hundred kernels more, and its lengths are not known without waiting.
    """
    return device.type == "cpu" and not config.compile


def build_encoder(config: EncoderConfig, device: torch.device, seed: int) -> Encoder:
    """Builds the encoder of a configuration, the same on every rank.

    Raises:
        ReneeError: the model or the initial weights cannot be loaded.
    """
    torch.manual_seed(seed)
    encoder = Encoder(config, device)
    if encoder.backbone is None:
        return encoder
    if config.gradient_checkpointing:
        encoder.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    if device.type == "cpu" and not config.compile:  # compiled code draws its own way
        draw_fast(encoder)
    if config.compile:
        encoder.backbone.compile(dynamic=True)
    return encoder


def data_parallel(
    encoder: Encoder,
    ranks: Ranks,
    gradient: str,
    tokens: TokenGradient | None = None,
    on_last: Callable[[], None] = lambda: None,
    bag: BagOptimizer | None = None,
) -> nn.Module:
    """Wraps the encoder in DDP; `gradient` is `sum` or `mean` over the ranks.

    tokens, bag: reduce the gradients of the token vectors and the bag, which DDP leaves alone, as
        it does frozen weights.
    on_last: with `sum`, called in a backward when only the sum over the ranks is outstanding.
    """
    if ranks.num_ranks == 1:
        return encoder
    sparse = [id(each.weight) for each in (tokens, bag) if each is not None]
    parameters = encoder.named_parameters()
    names = [name for name, p in parameters if id(p) in sparse or not p.requires_grad]
    if len(names) == len(list(encoder.parameters())):
        return encoder
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(encoder, names)
    on_gpu = next(encoder.parameters()).is_cuda
    wrapped = DistributedDataParallel(
        encoder,
        device_ids=None if not on_gpu else [torch.cuda.current_device()],
        gradient_as_bucket_view=True,
        **own_buffers(DistributedDataParallel),
    )
    if gradient == "sum":
        sum_gradients(wrapped, on_last)
    return wrapped


def dense_parameters(encoder: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters that AdamW trains: all but the table of a bag and frozen ones."""
    tables = [id(module.table) for module in encoder.modules() if isinstance(module, Bag)]
    return [p for p in encoder.parameters() if p.requires_grad and id(p) not in tables]


def adamw(encoder: Encoder, config: EncoderConfig) -> torch.optim.AdamW:
    """Makes AdamW with eps 1e-6; vectors (biases, weights of normalisations) do not decay."""
    parameters = dense_parameters(encoder)
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        eps=1e-6,
        fused=True,
    )


@contextlib.contextmanager
def training_attention(device: torch.device) -> Iterator[None]:
    """Computes attention by matmuls on CPUs, where the fused backward takes twice as long."""
    if device.type == "cpu":
        with sdpa_kernel(SDPBackend.MATH):
            yield
    else:
        yield


def autocast_dtype(choice: str, bf16: bool, fp16: bool) -> torch.dtype | None:
    """Returns the dtype of autocast, or None for none: of `off`, `bf16`, `fp16` or `auto`.

    bf16, fp16: whether the device multiplies these, of which `auto` takes the first.
    """
    if choice == "auto":
        return torch.bfloat16 if bf16 else torch.float16 if fp16 else None
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[choice]


def load_initial_weights(encoder: Encoder, path: str) -> None:
    """Loads initial weights from a `state_dict` file, whose prefixes are mapped.

    Raises:
        ReneeError: no such file, not a plain state_dict, or no tensor of it fits.
    """
    if not Path(path).is_file():
        raise ReneeError(
            f"encoder.weights={path!r} is not a file; give a state_dict of the encoder"
        )
    state = read_state_dict(path)
    assert encoder.backbone is not None, "the configuration has been checked"
    own = encoder.backbone.state_dict()
    mapped = {_own_name(name, own): tensor for name, tensor in state.items()}
    fitting = {n: t for n, t in mapped.items() if n in own and own[n].shape == t.shape}
    if not fitting:
        raise ReneeError(
            f"none of the {len(state)} tensors in {path} fits encoder.name; the first is "
            f"{next(iter(state), 'none')!r}, expected is e.g. {next(iter(own))!r}"
        )
    encoder.backbone.load_state_dict(fitting, strict=False)
    missing = sorted(set(own) - set(fitting))
    if missing:
        log.warning("%s lacks %d tensors, kept as they were: %s", path, len(missing), missing[:5])


def attention_of(choice: str, device_type: str) -> str:
    """Returns the attention implementation: of `eager`, `sdpa` or `auto`."""
    if choice == "auto":
        return "eager" if device_type == "cpu" else "sdpa"
    return choice


def _backbone(config: EncoderConfig, device: torch.device) -> PreTrainedModel:
    # The import takes seconds, and most processes of a run hold no encoder.
    from transformers import AttentionMaskInterface, AutoModel
    from transformers.masking_utils import eager_mask, sdpa_mask

    for kind, make in ("eager", eager_mask), ("sdpa", sdpa_mask):
        AttentionMaskInterface.register(kind, partial(_mask, make))
    directory = resolve_model(config.name)
    attention = attention_of(config.attention, device.type)
    with _loading(config.name):
        settings = described(directory, attention)[0]
        if config.internal_dropout is not None:
            for key in dropout_keys(settings):
                setattr(settings, key, config.internal_dropout)
        model = AutoModel.from_pretrained(
            directory,
            config=settings,
            attn_implementation=attention,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
        )
    # DDP waits for the gradient of every parameter, and mean pooling never calls the pooler.
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    if getattr(model.config, "use_cache", False):  # of a decoder, for generating texts
        model.config.use_cache = False
    model.requires_grad_(config.trains_transformer)
    return add_adapters(model, config) if config.lora.rank else model


def _mask(make: Callable[..., Tensor | None], **given: Any) -> Tensor | None:
    """Makes a mask of transformers, which would wait for a GPU to tell that no text is padded."""
    if given.get("attention_mask") is not None:
        given |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return make(**given)


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    """Raises ReneeError for whatever error a model's files cause in the library."""
    try:
        yield
    except ReneeError:
        raise
    except Exception as error:
        raise ReneeError(
            f"encoder.name={name!r:.200} cannot be loaded ({type(error).__name__}: "
            f"{reason(error):.200}); give a model that has config.json and model.safetensors"
        ) from error


def check_positions(config: EncoderConfig, max_length: int) -> None:
    """Raises ReneeError where a text may have more tokens than the encoder has positions.

    Raises it as well for a prompt, or for targets of adapters, that do not fit the encoder.

    max_length: tokens that the dataset keeps of a text.
    """
    if config.name == NO_TRANSFORMER:
        return
    if config.lora.rank:
        with _loading(config.name):
            model = described(resolve_model(config.name), "eager")[1]
        add_adapters(model, config)
    prompt = len(Prompt(config).tokens) if config.prompt else 0
    longest, limit = min(config.max_length, max_length + prompt), max_positions(config.name)
    if limit is not None and longest > limit:
        raise ReneeError(
            f"encoder.name={config.name!r:.200} has {limit} positions, and encoder.max_length="
            f"{config.max_length} of a dataset of max_length={max_length} allows texts of "
            f"{longest} tokens; train with encoder.max_length={limit} at most"
        )


def max_positions(name: str) -> int | None:
    """Returns how many tokens an encoder has position vectors for; None: it needs no such table.

    Reads the tables of a model without weights. Some have rows that belong to no position: those
    up to the padding's (RoBERTa), or rows beyond what config.json counts (OPT). Relative and rotary
    positions have no table.
    """
    with _loading(name):
        settings, model = described(resolve_model(name), "eager")
    declared = getattr(settings, "max_position_embeddings", None)
    limits = []
    for path, table in model.named_modules():
        weight, padding = getattr(table, "weight", None), getattr(table, "padding_idx", None)
        if path.rpartition(".")[2] in POSITION_TABLES and isinstance(weight, Tensor):
            rows = min(len(weight), declared) if isinstance(declared, int) else len(weight)
            limits.append(rows if padding is None else rows - padding - 1)
    return min(limits, default=None)


def described(directory: str, attention: str) -> tuple[PretrainedConfig, PreTrainedModel]:
    """Returns (a model's configuration, the model without weights).

    Raises ReneeError where it needs a second text to decode, or embeds more than texts.
    """
    from transformers import AutoConfig, AutoModel

    settings = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    if getattr(settings, "is_encoder_decoder", False):
        raise ReneeError(
            f"encoder.name leads to an encoder-decoder ({settings.model_type}), which embeds no "
            f"text by itself; give an encoder or a decoder, or encoder.name=none"
        )
    hidden = getattr(settings, "hidden_size", None)
    if not isinstance(hidden, int) or getattr(settings, "word_embed_proj_dim", hidden) != hidden:
        raise ReneeError(
            f"encoder.name leads to a model ({settings.model_type}) that has no one width of its "
            f"texts (hidden_size); give a model of texts alone, or encoder.name=none"
        )
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = AutoModel.from_config(
            settings, attn_implementation=attention, trust_remote_code=False
        )
    return settings, model


def dropout_keys(settings: object) -> list[str]:
    numbers = (
        key
        for key, value in vars(settings).items()
        if ("dropout" in key or key.endswith("pdrop")) and isinstance(value, (int, float))
    )
    return [key for key in numbers if "classif" not in key]


def read_state_dict(path: str) -> dict[str, Tensor]:
    """Reads the tensors of a file. Raises ReneeError where it holds anything but a state_dict."""
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what its unpickler happens to raise
        raise ReneeError(f"{path} is not a plain state_dict ({type(error).__name__})") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    return {name: t for name, t in state.items() if isinstance(t, Tensor)}


def _own_name(name: str, own: Collection[str]) -> str:
    """Removes the leading modules that another program wrapped the encoder in from `name`."""
    parts = name.split(".")
    suffixes = (".".join(parts[i:]) for i in range(len(parts)))
    return next((suffix for suffix in suffixes if suffix in own), name)


def pool(hidden: Tensor, mask: Tensor, kind: str) -> Tensor:
    """Returns the mean of each row's tokens, or the first (cls) or last of them: float32 [b, H].

    hidden: [b, T, H], floating point; mask: int64 [b, T], 0 at padding, which may be on either
    side. A row that is all padding has the mean 0.
    """
    if kind == "mean":
        kept = mask.unsqueeze(-1).float()
        return (hidden.float() * kept).sum(1) / kept.sum(1).clamp(min=1)
    places = torch.arange(mask.shape[1], device=mask.device)
    if kind == "cls":
        chosen = places.masked_fill(mask == 0, mask.shape[1] - 1).amin(1)
    else:
        chosen = (places * mask).amax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), chosen].float()
