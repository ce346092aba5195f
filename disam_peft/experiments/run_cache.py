"""Keeps what several runs have in common, so that it is loaded and computed once."""

from __future__ import annotations

from collections.abc import Callable

from disam_peft.common.records import ResultRow
from disam_peft.config.data import DataConfig
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.load import load

KEPT_ROWS = 64


class RunCache:
    """The data that were loaded last, and the zero-shot rows of the last runs."""

    def __init__(self) -> None:
        self._data: tuple[DataConfig, DomainDataset] | None = None
        self._zero_shot: dict[str, list[ResultRow]] = {}

    def dataset(self, config: DataConfig) -> DomainDataset:
        """``load(config)``, unless it was the last one asked for.

        Raises:
            UserError: as ``load``.
        """
        if self._data is None or self._data[0] != config:
            self._data = None  # before the next ones are loaded: two sets of images may not fit into memory together
            self._data = (config, load(config))
        return self._data[1]

    def zero_shot(self, key: str, compute: Callable[[], list[ResultRow]]) -> list[ResultRow]:
        """The rows of ``key``; ``compute`` is called where they are not known yet.

        Args:
            key: everything that the rows depend on.
        """
        if key not in self._zero_shot:
            if len(self._zero_shot) == KEPT_ROWS:
                self._zero_shot.pop(next(iter(self._zero_shot)))
            self._zero_shot[key] = compute()
        return list(self._zero_shot[key])
