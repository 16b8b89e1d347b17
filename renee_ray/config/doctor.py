"""The configuration of `renee-ray doctor`."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from renee_ray.config.schema import Config, Name


class DoctorConfig(Config):
    """`renee-ray doctor`"""

    storage: tuple[Name, ...] = ()
    """Directory or URL that every node is to read and write, or a list: storage=[A,B]."""
    num_workers: int = Field(2, ge=1)
    """Training workers that are to run, beside which a CPU must be left for reading data."""
    cpus_per_worker: int = Field(0, ge=0)
    """CPUs that a worker reserves; 0: one for a worker on CPU, none beside a GPU."""
    timeout_s: float = Field(30.0, gt=0)
    """Seconds that a node has for each probe."""

    @field_validator("storage", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value
