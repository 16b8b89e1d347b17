"""Scoring in passes, where the ranks together do not have the memory for all labels.

The labels [lo, hi) of a rank are cut into P pieces. In pass p every rank holds its piece p, and
all rows meet it. So embeddings are made once, and the best labels so far wait in files:

    pass 0       E = encoder(rows);                         best = topk(E W_0')
    pass p       E from its file;                           best = merge(best, topk(E W_p'))
    pass P - 1   and votes, then answers

`merge` is that of the ranks' lists, and the order of labels is total, so the labels are those of
one pass. A block is some consecutive batches; a rank's files of its rows of a block are

    RANK-BLOCK-embeddings    [rows, D]                     float32, written in pass 0
    RANK-BLOCK-best-PARITY   scores, labels [rows, c]      float32, int64; and parts [rows, c]
    RANK.json                P, and the blocks that the rank has done, counted over all passes

A killed command goes on at the first block that some rank has not done. A rank that is ahead then
does blocks again, from the files of the pass before. These are still there: pass p writes over
those of pass p - 2, and ranks meet in every batch, so none begins pass p before all have ended
pass p - 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from renee_ray.data.storage import read_file, replace_file, write_file
from renee_ray.data.untrusted import parse_json
from renee_ray.errors import ReneeError
from renee_ray.rank.batch import Batch
from renee_ray.rank.collectives import Ranks, gather_numbers
from renee_ray.scoring.scorer import Answer, Found, Scorer


@dataclass(frozen=True)
class Blocks:
    """The blocks of a split, the same number on every rank, and where their files are.

    count: blocks; batches: of a block.
    directory: one that all ranks share, if a command is to go on from it; empty: only one pass is
    made, and nothing is kept.
    """

    count: int
    batches: int
    ranks: Ranks
    directory: str = ""

    def resumed(self, passes: int) -> tuple[int, int]:
        """Returns (passes to make, blocks done by all ranks), `passes` being the fewest that do.

        More passes than that are made to go on with a command that began so.
        """
        content = read_file(self._progress) if self.directory else None
        own = parse_json(content or b'{"passes": 0, "done": 0}')
        found = gather_numbers(self.ranks, [own["passes"], own["done"]])
        begun = {int(each) for each, _ in found}
        if len(begun) == 1 and max(begun) >= passes:
            return max(begun), int(min(done for _, done in found))
        return passes, 0

    def mark(self, passes: int, done: int) -> None:
        """Notes that this rank has done so many blocks."""
        if self.directory:
            replace_file(self._progress, json.dumps({"passes": passes, "done": done}).encode())

    def again_from(self, block: int) -> None:
        """Notes that what this rank answered of a block, or of a later one, is lost.

        The last pass goes on there. What it reads is still there: only earlier passes write files.
        """
        content = read_file(self._progress)
        if content is not None:
            own = parse_json(content)
            self.mark(own["passes"], min(own["done"], (own["passes"] - 1) * self.count + block))

    def write(self, number: int, block: int, found: list[Found]) -> None:
        """Writes what pass `number` found for own rows of a block's batches."""
        best = {
            "scores": torch.cat([each.scores.cpu() for each in found]),
            "labels": torch.cat([each.labels.cpu() for each in found]),
        }
        for i in range(len(found[0].parts)):
            best[f"part {i}"] = torch.cat([each.parts[i] for each in found])
        if number == 0:
            own = torch.cat([_own(each, self.ranks).cpu() for each in found])
            write_file(self._file(block, "embeddings"), save({"embeddings": own}))
        write_file(self._file(block, f"best-{number % 2}"), save(best))

    def read(
        self, number: int, block: int, batches: list[Batch], device: torch.device
    ) -> Iterator[tuple[Tensor, Found]]:
        """Yields (own embeddings, what pass `number` found) of each batch of a block."""
        embeddings = self._tensors(self._file(block, "embeddings"))["embeddings"]
        best = self._tensors(self._file(block, f"best-{number % 2}"))
        rows = [len(batch) for batch in batches]
        cut = {name: each.split(rows) for name, each in best.items()}
        for i, own in enumerate(embeddings.split(rows)):
            scores, labels = cut["scores"][i].to(device), cut["labels"][i].to(device)
            parts = [cut[name][i] for name in sorted(cut) if name.startswith("part ")]
            yield own.to(device), Found(own, [], scores, labels, parts)

    @property
    def _progress(self) -> str:
        return f"{self.directory}/{self.ranks.rank:05d}.json"

    def _file(self, block: int, name: str) -> str:
        return f"{self.directory}/{self.ranks.rank:05d}-{block:06d}-{name}"

    def _tensors(self, path: str) -> dict[str, Tensor]:
        try:
            return load(read_file(path) or b"")
        except SafetensorError:
            raise ReneeError(
                f"{path}, which a command wrote that was cut off, is damaged; remove "
                f"{self.directory} and give the command again"
            ) from None


def in_passes(
    open_piece: Callable[[int, int], Scorer],
    begun: tuple[int, int],
    batches: Callable[[int], Iterator[Batch]],
    k: int,
    blocks: Blocks,
) -> Iterator[list[Answer]]:
    """Yields the answers of own rows, a block at a time, from the first block that is not done.

    A block is done when the next one is asked for. A collective of all ranks.

    Args:
        open_piece: takes (p, P) and loads the piece of pass p of P.
        begun: what `blocks.resumed` returns.
        batches: takes the number of a batch, and returns that one and all that follow.
    """
    passes, done = begun
    if not done:
        blocks.mark(passes, 0)  # files of a command with other passes are worth nothing now
    for number in range(done // blocks.count, passes):
        scorer = open_piece(number, passes)
        first = max(0, done - number * blocks.count)
        stream = batches(first * blocks.batches)
        for block in range(first, blocks.count):
            some = list(islice(stream, blocks.batches))
            before: Iterator[tuple[Tensor | None, Found | None]] = iter([(None, None)] * len(some))
            if number:
                before = blocks.read(number - 1, block, some, scorer.device)
            found = (
                (batch, scorer.search(batch, k, *each))
                for batch, each in zip(some, before, strict=True)
            )
            if number == passes - 1:
                yield [scorer.finish(batch, each, k) for batch, each in found]
            else:
                blocks.write(number, block, [each for _, each in found])
            blocks.mark(passes, number * blocks.count + block + 1)
        del scorer  # before the next piece is allocated


def _own(found: Found, ranks: Ranks) -> Tensor:
    first = sum(found.counts[: ranks.rank])
    return found.everyone[first : first + found.counts[ranks.rank]]
