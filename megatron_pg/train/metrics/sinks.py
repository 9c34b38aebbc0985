"""Where the numbers of a run go: console, JSONL, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
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


class Sink:
    """Takes the metrics of every step, and what is said of the run; only the first rank has some.

    A sink of one's own overrides what it wants to hear.
    """

    def write(self, metrics: Mapping[str, float]) -> None:
        """One step; ``metrics["step"]`` is its number, from 1."""

    def say(self, what: Any) -> None:
        """A sentence, as it stands, or a rich table."""

    def close(self) -> None:
        """The run has ended."""


class Console(Sink):
    """A line a step on standard output.

    Args:
        num_steps: of the run.
    """

    def __init__(self, num_steps: int) -> None:
        from rich.console import Console as RichConsole

        self.console = RichConsole()
        self.num_steps = num_steps
        self._print_row([heading for _, heading, _ in _COLUMNS], style="bold")

    def write(self, metrics: Mapping[str, float]) -> None:
        """See ``Sink``."""
        cells = [
            form.format(metrics[name]) if name in metrics else "-" for name, _, form in _COLUMNS
        ]
        cells[0] = f"{int(metrics['step'])}/{self.num_steps}"
        self._print_row(cells)

    def say(self, what: Any) -> None:
        """See ``Sink``."""
        is_text = isinstance(what, str)
        self.console.print(what, markup=not is_text, highlight=not is_text, soft_wrap=is_text)

    def _print_row(self, cells: list[str], style: str | None = None) -> None:
        widths = [max(len(heading), 9) for _, heading, _ in _COLUMNS]
        line = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths))
        self.console.print(line, style=style, highlight=False, soft_wrap=True)


class JsonLines(Sink):
    """``metrics.jsonl``, one object a step.

    It is cut back to the resumed step first, so that a step never stands there twice.

    Args:
        path: of the file.
        first_step: steps done already.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        self.path = path
        kept = [m for m in read_metrics(path) if m["step"] <= first_step]
        write_atomically(path, "".join(json.dumps(m) + "\n" for m in kept))

    def write(self, metrics: Mapping[str, float]) -> None:
        """See ``Sink``."""
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps(dict(metrics)) + "\n")


class TensorBoard(Sink):
    """TensorBoard events, those after the resumed step purged.

    Args:
        folder: of the events.
        first_step: steps done already.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = str(folder)
        with writing(self.folder):
            self.events: Any = SummaryWriter(self.folder, purge_step=first_step + 1)

    def write(self, metrics: Mapping[str, float]) -> None:
        """See ``Sink``."""
        with writing(self.folder):
            for name in sorted(metrics.keys() - {"step"}):
                self.events.add_scalar(name, metrics[name], int(metrics["step"]))
            # A thread writes; its errors show here.
            self.events.flush()

    def close(self) -> None:
        """See ``Sink``."""
        with writing(self.folder):
            self.events.flush()
            self.events.close()


class WeightsAndBiases(Sink):
    """Weights & Biases, under one id however often the run is resumed.

    Args:
        folder: of the run.
        project: to log under.
        config: the whole configuration, shown beside the curves.
    """

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any]) -> None:
        import wandb

        self.run: Any = wandb.init(
            project=project,
            id=_run_id(folder / "wandb_run_id.txt"),
            dir=str(folder),
            config=dict(config),
            resume="allow",
        )

    def write(self, metrics: Mapping[str, float]) -> None:
        """See ``Sink``."""
        self.run.log(dict(metrics), step=int(metrics["step"]))

    def close(self) -> None:
        """See ``Sink``."""
        self.run.finish()


def make_sinks(run: RunConfig, config: Mapping[str, Any], first_step: int) -> list[Sink]:
    """What ``run`` asks for, in the order in which a step is written.

    Args:
        run: where to.
        config: the whole configuration.
        first_step: steps done already.
    """
    folder = Path(run.out)
    folder.mkdir(parents=True, exist_ok=True)
    sinks: list[Sink] = [JsonLines(folder / "metrics.jsonl", first_step)]
    if run.tensorboard:
        sinks.append(TensorBoard(folder / "tensorboard", first_step))
    if run.wandb_project is not None:
        sinks.append(WeightsAndBiases(folder, run.wandb_project, config))
    return [*sinks, Console(run.num_steps)]


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
