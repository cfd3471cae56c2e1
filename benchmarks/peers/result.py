"""What a contestant did on a workload."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Result"]


@dataclass
class Result:
    """What one contestant did on one workload.

    Args:
        team: its name.
        version: of the library.
        dtype: of weights and cache.
        workload: the letter.
        walls_s: seconds of each run.
        foreign_cpus: CPUs that others used during each run.
        output_tokens: of one run.
        requests: of one run that count.
        outputs: token ids of the first run.
        ttft_s: seconds to the first token of each run, where it can be told.
        phases: where the time of the last run went, if it was asked for.
        same: requests of the first run with the same tokens as the first contestant's.
        error: why there is no figure.
    """

    team: str
    version: str
    dtype: str
    workload: str
    walls_s: list[float] = field(default_factory=list)
    foreign_cpus: list[float | None] = field(default_factory=list)
    output_tokens: int = 0
    requests: int = 0
    outputs: list[list[int]] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)
    same: int | None = None
    error: str | None = None

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Result:
        """What `as_json` gave, without the tokens."""
        return cls(**value)

    def as_json(self) -> dict[str, Any]:
        """All of it but the tokens."""
        return {name: value for name, value in asdict(self).items() if name != "outputs"}

    @property
    def rate(self) -> float | None:
        """Output tokens a second, by the median of the runs."""
        if self.error is not None or not self.walls_s:
            return None
        return self.output_tokens / statistics.median(self.walls_s)

    def disturbed(self, most: float) -> bool:
        """Whether others used more than that many CPUs in the median run."""
        known = [cpus for cpus in self.foreign_cpus if cpus is not None]
        return bool(known) and statistics.median(known) > most
