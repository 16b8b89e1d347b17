"""Distributed training of extreme multi-label text classifiers on Ray.

    import renee_ray as rr

    rr.convert("LF-Debian-40K", "data/set", rr.ConvertConfig())
    recipe, mine = rr.read_yaml("lf-debian-40k"), {"data": "data/set", "output": "runs/first"}
    rr.train(rr.make_config(rr.RunConfig, recipe, mine))
    rr.evaluate("runs/first", "data/set", rr.ScoreConfig())["metrics"]
    rr.load("runs/first").predict(["libjson perl"], k=3)

Each name is imported when it is first used: `import renee_ray` alone loads neither torch nor ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from renee_ray.config.overrides import make_config, read_yaml
    from renee_ray.config.schema import ConvertConfig, RunConfig
    from renee_ray.config.score import ExportConfig, ScoreConfig
    from renee_ray.errors import ReneeError
    from renee_ray.service.convert.convert import convert
    from renee_ray.service.quickstart import quickstart
    from renee_ray.service.score.evaluate import evaluate_run as evaluate
    from renee_ray.service.score.export import export_run as export
    from renee_ray.service.score.loading import load
    from renee_ray.service.score.predict import predict_run as predict
    from renee_ray.service.train.train import train

__version__ = "0.1.0"
__all__ = [
    "ConvertConfig", "ExportConfig", "ReneeError", "RunConfig", "ScoreConfig", "convert",
    "evaluate", "export", "load", "make_config", "predict", "quickstart", "read_yaml", "train",
]  # fmt: skip

_HOMES = {
    "ConvertConfig": "config.schema.ConvertConfig",
    "ExportConfig": "config.score.ExportConfig",
    "ReneeError": "errors.ReneeError",
    "RunConfig": "config.schema.RunConfig",
    "ScoreConfig": "config.score.ScoreConfig",
    "convert": "service.convert.convert.convert",
    "evaluate": "service.score.evaluate.evaluate_run",
    "export": "service.score.export.export_run",
    "load": "service.score.loading.load",
    "make_config": "config.overrides.make_config",
    "predict": "service.score.predict.predict_run",
    "quickstart": "service.quickstart.quickstart",
    "read_yaml": "config.overrides.read_yaml",
    "train": "service.train.train.train",
}
"""Where each public name is defined, below this package; the imports above, for the interpreter."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOMES[name].rpartition(".")
    return getattr(import_module(f"{__name__}.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
