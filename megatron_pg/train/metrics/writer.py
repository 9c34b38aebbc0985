"""What a step reports, and where it goes: console, JSONL, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checkpoints import write_atomically, writing
from ..config import RunConfig

# Console columns: metric name, heading, format.
_COLUMNS = (
    ("step", "step", "{:.0f}"),
    ("reward/mean", "reward", "{:.3f}"),
    ("actor/loss", "loss", "{:+.4f}"),
    ("actor/entropy", "entropy", "{:.3f}"),
    ("actor/grad_norm", "grad norm", "{:.3f}"),
    ("tokens/reuse_ratio", "reuse", "{:.2f}x"),
    ("tokens/unique", "encoded", "{:,.0f}"),
    ("perf/logical_tokens_per_second", "logical tok/s", "{:,.0f}"),
    ("time/step", "seconds", "{:.1f}"),
)


class PhaseTimer:
    """Wall seconds per phase of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the body's wall time to ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """``time/<phase>`` in seconds."""
        return {f"time/{name}": seconds for name, seconds in self.seconds.items()}


class MetricsWriter:
    """Writes every step's metrics; only the first rank makes one.

    ``metrics.jsonl`` holds one object a step and is cut back to the resumed step first, so that a
    step never stands there twice.

    Args:
        run: where to.
        config: the whole configuration, shown beside the curves.
        first_step: steps done already.
    """

    def __init__(self, run: RunConfig, config: Mapping[str, Any], first_step: int) -> None:
        from rich.console import Console

        self.console = Console()
        self.num_steps = run.num_steps
        folder = Path(run.out)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        self.history = [m for m in read_metrics(self.path) if m["step"] <= first_step]
        write_atomically(self.path, "".join(json.dumps(m) + "\n" for m in self.history))
        self._tensorboard: Any = None
        self._wandb: Any = None
        if run.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            events = str(folder / "tensorboard")
            with writing(events):
                self._tensorboard = SummaryWriter(events, purge_step=first_step + 1)
        if run.wandb_project is not None:
            import wandb

            self._wandb = wandb.init(
                project=run.wandb_project,
                id=_run_id(folder / "wandb_run_id.txt"),
                dir=run.out,
                config=dict(config),
                resume="allow",
            )
        self._print_row([heading for _, heading, _ in _COLUMNS], style="bold")

    def write(self, metrics: Mapping[str, float]) -> None:
        """Record one step; ``metrics["step"]`` is its number, from 1."""
        step = int(metrics["step"])
        self.history.append(dict(metrics))
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps(dict(metrics)) + "\n")
        if self._tensorboard is not None:
            with writing(self._tensorboard.log_dir):
                for name in sorted(metrics.keys() - {"step"}):
                    self._tensorboard.add_scalar(name, metrics[name], step)
                # A thread writes; its errors show here.
                self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)
        cells = [
            form.format(metrics[name]) if name in metrics else "-" for name, _, form in _COLUMNS
        ]
        cells[0] = f"{step}/{self.num_steps}"
        self._print_row(cells)

    def print(self, text: Any) -> None:
        """Print text or a rich table to the console."""
        self.console.print(text)

    def note(self, text: str) -> None:
        """Print a sentence as it stands."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Flush every sink."""
        if self._tensorboard is not None:
            with writing(self._tensorboard.log_dir):
                self._tensorboard.flush()
                self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _print_row(self, cells: list[str], style: str | None = None) -> None:
        widths = [max(len(heading), 9) for _, heading, _ in _COLUMNS]
        line = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths))
        self.console.print(line, style=style, highlight=False, soft_wrap=True)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Metrics of every complete step of a ``metrics.jsonl``; a torn last line is left out."""
    if not path.is_file():
        return []
    steps = []
    for line in path.read_text().splitlines():
        try:
            steps.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return steps


def _run_id(path: Path) -> str:
    """The id under which a resumed run goes on; made up once."""
    if not path.is_file():
        write_atomically(path, uuid.uuid4().hex)
    return path.read_text()
