"""What a run was asked for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The options of a run, with their defaults filled in; the names are those of the `ogpsa_` options."""

    refresh_samples: int | None
    update_interval: int
    rank: int | None
    scope: str
    method: str
    loss: str
    batch_size: int | None
    basis_device: str
    basis_dtype: str
    kernel: str
    save_state: bool
    plot: bool
