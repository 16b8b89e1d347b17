"""The configuration of a service."""

from __future__ import annotations

from pydantic import Field, model_validator

from renee_ray.config.schema import Name
from renee_ray.config.score import Searched

TOKEN = "RENEE_RAY_SERVE_TOKEN"
"""The environment variable that holds the secret which requests must bear."""


class ServeConfig(Searched):
    """`renee-ray serve RUN`"""

    host: Name = "127.0.0.1"
    """Address to listen on: by default this machine alone; 0.0.0.0: all networks it is in."""
    port: int = Field(8000, ge=0, lt=2**16)
    """TCP port; 0: any free one."""
    num_shards: int = Field(0, ge=0)
    """Processes that hold a range of labels each; 0: as many as trained the run."""
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
