"""Reads checkpoints of microsoft/renee: `{name}_{rank}_state_dict.pt`, one file a rank.

    xfc_weight                                                  float [n, D], the rank's labels
    embed.[module.]0.[_orig_mod.]transformer.*                  the encoder, the same in each file
    embed.[module.]1.transformer_weight                         float [D, H], the bottleneck

Brackets: what DDP and torch.compile add. n is the same on every rank: the labels divided by the
ranks, rounded up to a multiple of 16; the rows beyond the last label are padding.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from renee_ray.checkpoint.state import CheckpointError
from renee_ray.model.encoder import Encoder, read_state_dict
from renee_ray.xfc.shard import Shard

PADDED_TO = 16
_FILE = re.compile(r"(.+)_(\d+)_state_dict\.pt")
_OWN_NAMES = (
    (re.compile(r"embed\.(?:module\.)?0\.(?:_orig_mod\.)?transformer\."), "backbone."),
    (re.compile(r"embed\.(?:module\.)?1\.transformer_weight"), "bottleneck.weight"),
)


def rank_files(directory: str) -> list[str]:
    """Finds the files of all ranks, by rank.

    Raises:
        CheckpointError: there are none, or some are missing, or of two runs.
    """
    found = {path: m for path in Path(directory).glob("*.pt") if (m := _FILE.fullmatch(path.name))}
    names = {match[1] for match in found.values()}
    ranks = sorted(int(match[2]) for match in found.values())
    if len(names) != 1 or ranks != list(range(len(ranks))):
        raise CheckpointError(
            f"{directory} has files NAME_RANK_state_dict.pt of the names {sorted(names)!s:.100} "
            f"and the ranks {ranks!s:.100}; give a directory with those of one run, from rank 0 on"
        )
    return [str(path) for path in sorted(found, key=lambda path: int(found[path][2]))]


def load_released(files: list[str], encoder: Encoder, shard: Shard) -> None:
    """Fills an encoder, and a shard of all labels, from the files of all ranks; one at a time.

    Raises:
        CheckpointError: a file is of another number of labels or ranks, or of another encoder.
    """
    num_labels, dim = shard.owned.num_labels, encoder.dim
    each = -(-num_labels // len(files))
    each += -each % PADDED_TO
    for rank, path in enumerate(files):
        state = read_state_dict(path)
        weight = state.pop("xfc_weight", None)
        if weight is None or list(weight.shape) != [each, dim]:
            raise CheckpointError(
                f"{path} has an xfc_weight of {None if weight is None else list(weight.shape)} and "
                f"{num_labels} labels on {len(files)} ranks are [{each}, {dim}]; give the dataset "
                f"and the flags that it was trained with"
            )
        first = min(rank * each, num_labels)
        shard.write(first, weight[: num_labels - first].float())
        if rank == 0:
            _load_encoder(path, state, encoder)


def _load_encoder(path: str, state: dict[str, Tensor], encoder: Encoder) -> None:
    own, found = encoder.state_dict(), dict[str, Tensor]()
    for name, tensor in state.items():
        for pattern, prefix in _OWN_NAMES:
            if match := pattern.match(name):
                found[prefix + name[match.end() :]] = tensor
    given = {name: t for name, t in found.items() if name in own and own[name].shape == t.shape}
    missing = sorted(own.keys() - given.keys() - {"constant"})
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} tensors of this encoder, as {missing[0]}; give the "
            f"command's --tf and --bottleneck-dims"
        )
    encoder.load_state_dict(given, strict=False)
