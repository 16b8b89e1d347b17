"""Chooses `evaluation.tail` among `evaluation.tails` at the end of training, for run.json."""

from __future__ import annotations

from renee_ray.data.dataset import Dataset
from renee_ray.scoring.neighbours import Neighbours
from renee_ray.scoring.scorer import Scorer
from renee_ray.scoring.tail import CRITERION, best_tail, by_tail
from renee_ray.service.feed import scoring_feed
from renee_ray.service.observe.progress import WorkerChannel
from renee_ray.service.run.directory import RUN_FILE, RunDirectory
from renee_ray.training.loop import Trainer


def choose_tail(trainer: Trainer, channel: WorkerChannel) -> None:
    """Chooses by the best checkpoint, which is what `evaluate` takes; a collective of all ranks."""
    config, model, ranks = trainer.config, trainer.model, trainer.ranks
    settings, given, device = config.evaluation, trainer.validation, trainer.device
    if not settings.tails or given is None:
        return
    directory = RunDirectory(config.output)
    best = directory.checkpoint("best")
    if best.state.step != trainer.state.step:
        best.load_encoder(model.encoder)
        best.load_shard(model.shard, momentum=False)
    voters = None
    if settings.neighbours:
        rows, length = settings.batch_size, config.encoder.max_length
        points = scoring_feed(Dataset.without_check(config.data), "train", rows, length, ranks)
        count, weight = settings.neighbours, settings.neighbour_weight
        voters = Neighbours.embed(model.encoder, points, ranks, device, count, weight)
    scorer = Scorer(model.encoder, model.shard, ranks, device, None, voters)
    offsets = {tail: given.offset(tail) for tail in settings.tails}
    table = by_tail(scorer, offsets, given.batches(), given.propensities)
    if ranks.rank:
        return
    saved, chosen = directory.read(RUN_FILE) or {}, best_tail(table)
    saved["config"]["evaluation"]["tail"] = chosen
    known = {"checkpoint": best.name, "largest": f"{' + '.join(CRITERION)}", "table": table}
    directory.write(RUN_FILE, saved | {"chosen_tail": known})
    channel.say(f"evaluation.tail={chosen} chosen on the validation points")
