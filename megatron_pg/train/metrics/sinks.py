"""Where the numbers of a run go: console, JSONL, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...data import parse_json_text
from ..checkpoints import write_atomically, writing
from ..config import RunConfig
from .generations import Generation, Generations, printable, write_generations

# Characters of a text that the console and a page of TensorBoard show.
_CONSOLE_CHARS, _PAGE_CHARS = 300, 20_000

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
        """One step; ``metrics["step"]`` is its number, from 1, or 0 for what was judged before."""

    def say(self, what: Any) -> None:
        """A sentence, as it stands, or a rich table."""

    def show(self, generations: Generations) -> None:
        """Responses of a step or an evaluation."""

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
        if not metrics["step"]:
            return
        cells = [
            form.format(metrics[name]) if name in metrics else "-" for name, _, form in _COLUMNS
        ]
        cells[0] = f"{int(metrics['step'])}/{self.num_steps}"
        self._print_row(cells)

    def say(self, what: Any) -> None:
        """See ``Sink``."""
        is_text = isinstance(what, str)
        if is_text:
            self._print_text(what)
        else:
            self.console.print(what)

    def show(self, generations: Generations) -> None:
        """See ``Sink``: a few of them, whatever they hold."""
        for one in generations.shown:
            head = (
                f"{generations.split} step {generations.step}, reward {one.reward:g}, {one.status}"
            )
            self._print_text(f"{head}, {printable(one.group_id, _CONSOLE_CHARS)}")
            for name, text in (("prompt", one.prompt), ("response", one.response)):
                if text is not None:
                    self._print_text(f"  {name}: {printable(text, _CONSOLE_CHARS)}")

    def _print_text(self, text: str) -> None:
        encoding = self.console.encoding
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        self.console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)

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
        # A run that begins again judges once more before its first step.
        kept = [m for m in read_metrics(path) if m["step"] <= first_step] if first_step else []
        write_atomically(path, "".join(json.dumps(m) + "\n" for m in kept))

    def write(self, metrics: Mapping[str, float]) -> None:
        """See ``Sink``."""
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps(dict(metrics)) + "\n")


class GenerationFiles(Sink):
    """Every response that is shown, in files of their own.

    Args:
        folder: of the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def show(self, generations: Generations) -> None:
        """See ``Sink``."""
        write_generations(self.folder, generations)


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

    def show(self, generations: Generations) -> None:
        """See ``Sink``: a few of them as a text."""
        page = "\n\n".join(map(_markdown, generations.shown))
        with writing(self.folder):
            self.events.add_text(f"generations/{generations.split}", page, generations.step)
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

        self.wandb: Any = wandb
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

    def show(self, generations: Generations) -> None:
        """See ``Sink``: a few of them as a table."""
        columns = ["group_id", "prompt", "response", "reward", "status", "data_source"]
        rows = [[_cell(getattr(one, name)) for name in columns] for one in generations.shown]
        table = self.wandb.Table(columns=columns, data=rows)
        self.run.log({f"generations/{generations.split}": table}, step=generations.step)

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
    if run.log_generations_interval is not None:
        sinks.append(GenerationFiles(folder / "generations"))
    return [*sinks, Console(run.num_steps)]


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Metrics of every complete step of a ``metrics.jsonl``; a torn last line is left out.

    Raises:
        ValueError: naming the file and a line before the last one that holds no step.
    """
    if not path.is_file():
        return []
    steps: list[dict[str, float]] = []
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            step = parse_json_text(line)
        except ValueError:
            step = None
        if isinstance(step, dict) and type(step.get("step")) in (int, float):
            steps.append(step)
        elif number < len(lines):
            # What follows it would be cut off with it.
            told = "holds no step of a run; restore the file, or remove the line"
            raise ValueError(f"{path}, line {number} {told}")
    return steps


def _markdown(one: Generation) -> str:
    """A heading, and the texts as blocks that nothing in them ends."""
    blocks = [f"### reward {one.reward:g}, {one.status}"]
    for name, text in (("prompt", one.prompt), ("response", one.response)):
        if text is not None:
            lines = printable(text, _PAGE_CHARS, keep_lines=True).split("\n")
            blocks.append(f"{name}\n\n" + "\n".join(f"    {line}" for line in lines))
    return "\n\n".join(blocks)


def _cell(value: object) -> object:
    """What a table of strings and numbers takes."""
    return printable(value, len(value), keep_lines=True) if isinstance(value, str) else value


def _run_id(path: Path) -> str:
    """The id under which a resumed run goes on; made up once."""
    if not path.is_file():
        write_atomically(path, uuid.uuid4().hex)
    return path.read_text()
