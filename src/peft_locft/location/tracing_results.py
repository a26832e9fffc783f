"""What causal tracing found over many facts, and the layers that it proposes."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..edits import write_atomically
from .facts import ROLES


TRACING_NAME = "tracing.json"
# MEMIT (arXiv 2210.07229), section 4: a range of layers is edited, of five (GPT-NeoX) or six (GPT-J).
_NUM_LAYERS = 5


class Peak(NamedTuple):
    """Where an average effect is highest.

    Args:
        role (`str`):
            The role of the token.
        layer (`int`):
            The layer, or the centre of the window.
        effect (`float`):
            The average indirect effect, a difference of probabilities.
    """

    role: str
    layer: int
    effect: float


@dataclass(frozen=True, eq=False)
class TracingResults:
    """Average indirect effects of many facts, by the role of the token.

    Args:
        effects (`dict[str, torch.Tensor]`):
            By kind (`"states"`, `"mlp"`, `"attention"`), of shape (6 roles, layers), in float64. Not a number where no
            token has the role.
        tokens (`dict[str, int]`):
            By role, how many tokens the average is of.
        rows (`list[dict]`):
            One row a fact: `id`, `prompt`, `subject`, `answer` (its first token, as the model says it), `clean` and
            `corrupted` (its probabilities), and why it is `left_out`, `None` where it is not.
        settings (`dict`, *optional*):
            The model's name, and how it was traced.
    """

    effects: dict[str, torch.Tensor]
    tokens: dict[str, int]
    rows: list[dict[str, Any]] = field(repr=False)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def num_facts(self) -> int:
        """How many facts were traced (`int`)."""
        return len(self._traced)

    @property
    def left_out(self) -> dict[str, int]:
        """How many facts were left out, by the reason (`dict[str, int]`)."""
        return dict(Counter(row["left_out"] for row in self.rows if row["left_out"] is not None))

    @property
    def clean_probability(self) -> float:
        """The mean probability of the answers (`float`)."""
        return sum(row["clean"] for row in self._traced) / self.num_facts

    @property
    def corrupted_probability(self) -> float:
        """The mean probability of the answers in the corrupted runs (`float`)."""
        return sum(row["corrupted"] for row in self._traced) / self.num_facts

    @property
    def peaks(self) -> dict[str, Peak]:
        """By kind, where the average effect is highest (`dict[str, Peak]`)."""
        found = {}
        for kind, values in self.effects.items():
            best = int(values.nan_to_num(-torch.inf).argmax())
            role, layer = divmod(best, values.shape[1])
            found[kind] = Peak(ROLES[role], layer, float(values[role, layer]))
        return found

    @property
    def _traced(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["left_out"] is None]

    def effects_of(self, kind: str, role: str) -> torch.Tensor:
        """Return the average effects of one kind at one role.

        Args:
            kind (`str`):
                `"states"`, `"mlp"` or `"attention"`.
            role (`str`):
                The role, such as `"last subject token"`.

        Returns:
            `torch.Tensor`: Of shape (layers,).

        Raises:
            `ValueError`: If there is no such kind or role.
        """
        for name, value, known in (("kind", kind, list(self.effects)), ("role", role, list(ROLES))):
            if value not in known:
                raise ValueError(f"`{name}` is {value!r}, expected one of {known}")
        return self.effects[kind][ROLES.index(role)]

    def to_json(self) -> str:
        """Return everything as JSON.

        Returns:
            `str`: The text of `tracing.json`.
        """
        effects = {
            kind: {
                role: None if line.isnan().any() else [float(f"{value:.6g}") for value in line.tolist()]
                for role, line in zip(ROLES, values)
            }
            for kind, values in self.effects.items()
        }
        summary = {
            "facts": self.num_facts,
            "left_out": self.left_out,
            "clean_probability": self.clean_probability,
            "corrupted_probability": self.corrupted_probability,
            "settings": self.settings,
            "tokens": self.tokens,
            "effects": effects,
            "rows": self.rows,
        }
        return json.dumps(summary, indent=2, ensure_ascii=False) + "\n"

    def save(self, folder: str | os.PathLike) -> None:
        """Write `tracing.json`.

        Args:
            folder (`str` or `os.PathLike`):
                Where to. It is made if it is missing.
        """
        write_atomically(Path(folder) / TRACING_NAME, self.to_json())


def load_tracing(folder: str | os.PathLike) -> TracingResults:
    """Read the results that [`TracingResults.save`] wrote.

    Args:
        folder (`str` or `os.PathLike`):
            The folder.

    Returns:
        [`TracingResults`]: The results. Effects have six digits.

    Raises:
        `FileNotFoundError`: If the folder has none.
    """
    path = Path(folder) / TRACING_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {TRACING_NAME}: it holds no results of causal tracing")
    summary = json.loads(path.read_text(encoding="utf-8"))
    effects = {}
    for kind, by_role in summary["effects"].items():
        count = next((len(line) for line in by_role.values() if line is not None), 0)
        lines = [by_role[role] or [float("nan")] * count for role in ROLES]
        effects[kind] = torch.tensor(lines, dtype=torch.float64)
    return TracingResults(effects, summary["tokens"], summary["rows"], summary["settings"])


def layers_from_tracing(results: TracingResults, num_layers: int | None = None) -> list[int]:
    """Propose layers to edit: neighbouring ones, whose MLPs have the highest average effect at the last subject token.

    That is where ROME ([arXiv 2202.05262](https://arxiv.org/abs/2202.05262), section 2.2) places the fact's early site,
    and how it and MEMIT ([arXiv 2210.07229](https://arxiv.org/abs/2210.07229), section 4: a range of layers) choose.
    It is a convention, and no proof: how well an edit works says little about the effect at its layer, and the other
    way round ([arXiv 2301.04213](https://arxiv.org/abs/2301.04213)).

    Args:
        results ([`TracingResults`]):
            The results of [`trace_edits`].
        num_layers (`int`, *optional*):
            How many layers to propose. Defaults to 5, or to all of a model that has fewer.

    Returns:
        `list[int]`: The layers, counted from 0, in ascending order.

    Raises:
        `ValueError`: If the number is out of range, or no MLP was traced.
    """
    if "mlp" not in results.effects:
        raise ValueError(
            f"no MLP was traced, only {list(results.effects)}: leave `kinds` out, or name 'mlp' among them. Without "
            "`kinds`, it means that this model's layers have no MLP of a known name"
        )
    effects = results.effects_of("mlp", "last subject token")  # (layers,)
    if effects.isnan().any():
        raise ValueError("no MLP was traced at the last subject token: leave `roles` out, or name it among them")
    count = len(effects)
    num_layers = min(_NUM_LAYERS, count) if num_layers is None else num_layers
    if not 1 <= num_layers <= count:
        raise ValueError(f"`num_layers` is {num_layers}, expected 1 to {count}, the number of the model's layers")
    first = int(effects.unfold(0, num_layers, 1).mean(1).argmax())
    return list(range(first, first + num_layers))
