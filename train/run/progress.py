"""Reports of a running command: progress on stderr, scalars for TensorBoard, lines of JSON.

Standard output is reserved for the one JSON object that ends every command. On a terminal, progress
is a bar with rate and time left; in a log it is a line every few seconds. Torch-free.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from ...engine.interrupts import safe_point
from ...export.terminal import say, visible

LOG = "log.jsonl"
LINE_EVERY_S = 10.0  # between two lines of progress in a log


class Report(AbstractContextManager["Report"]):
    """Reports to stderr and, when given a folder, to FOLDER/tensorboard and FOLDER/log.jsonl.

    TensorBoard gets a sub-run for every method and for the teacher, with the same tags in each.
    The log has one line per message and per scalar: {"time": seconds since 1970, "said": …} or
    {"time": …, "tag": …, "step": …, "value": …}.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bar: tuple[str, Progress, TaskID] | None = None
        self._began: dict[str, tuple[float, float]] = {}
        self._line_due: dict[str, float] = {}
        self._folder = folder
        self._events: dict[str, Path] = {}
        self._curves_lost = False
        self._unwritten, self._log_is_open = "", False

    def progress(self, what: str, done: float, total: float, unit: str, note: str = "") -> None:
        """`done` of `total` units ("epochs", "images") of `what` are finished; call it often.

        Here a signal ends the command.
        """
        safe_point()
        now = time.monotonic()
        if what not in self._began or done < self._began[what][1]:
            self._began[what] = (now, done)
            self._line_due[what] = now + LINE_EVERY_S
        text = f"{_amount(done)}/{_amount(total)} {unit}{self._pace(what, done, total, unit, now)}"
        text += f"  {note}" if note else ""
        finished = done >= total
        if self._console.is_terminal:
            self._draw(what, done, total, text)
            if finished:
                self._end_bar()
        elif now >= self._line_due[what] or finished:
            self.say(f"{what}  {text}")
            self._line_due[what] = now + LINE_EVERY_S
        if finished:
            del self._began[what]

    def _pace(self, what: str, done: float, total: float, unit: str, now: float) -> str:
        """Rate in this session and the time left."""
        began, before = self._began[what]
        seconds, made = now - began, done - before
        if seconds <= 0 or made <= 0:
            return ""
        rate = made / seconds
        left = "" if done >= total else f"  {duration((total - done) / rate)} left"
        return left if unit == "s" else f"  {pace(rate, unit)}{left}"

    def _draw(self, what: str, done: float, total: float, text: str) -> None:
        if self._bar is None or self._bar[0] != what:
            self._end_bar()
            bar = Progress(
                TextColumn("{task.description:24}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}"),
                console=self._console,
            )
            bar.start()
            self._bar = (what, bar, bar.add_task(what, total=total, text=text))
        _, bar, task = self._bar
        bar.update(task, completed=done, total=total, text=text)

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar[1].stop()
            self._bar = None

    def scalar(self, tag: str, step: int, value: float) -> None:
        """A point of a curve, "loss" of the sub-run dace: ("dace/loss", epoch, 1.3)."""
        if self._folder is None:
            return
        self._write({"tag": tag, "step": step, "value": value})
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        name, _, short = tag.rpartition("/")
        point = Summary(value=[Summary.Value(tag=short, simple_value=value)])
        self._add_events(self._folder / "tensorboard" / name, step, point)

    def outcome(
        self, name: str, settings: Mapping[str, Any], accuracy: float, picture: Path | None = None
    ) -> None:
        """The end of a method's sub-run: accuracy in percent, settings (hparams), a PNG picture."""
        if self._folder is None:
            return
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
        from torch.utils.tensorboard.summary import hparams

        plain = {k: v for k, v in settings.items() if isinstance(v, int | float | str)}
        values = [Summary.Value(tag="accuracy", simple_value=accuracy)]
        if picture is not None and picture.is_file():  # not where its folder was removed since
            png = picture.read_bytes()
            width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
            shape = {"width": width, "height": height, "colorspace": 3}
            image = Summary.Image(encoded_image_string=png, **shape)
            values.append(Summary.Value(tag="rendered", image=image))
        told = hparams({"method": name, **plain}, {"accuracy": accuracy})
        folder, last = self._folder / "tensorboard" / name, int(settings.get("epochs", 0))
        self._add_events(folder, last, *told, Summary(value=values))

    def _add_events(self, folder: Path, step: int, *summaries: Any) -> None:
        """Append to this session's file at once: SummaryWriter's thread dies of a lost folder."""
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.summary.writer.record_writer import RecordWriter

        if self._curves_lost:
            return
        try:
            if folder.name not in self._events:
                folder.mkdir(parents=True, exist_ok=True)
                file = f"events.out.tfevents.{time.time():.6f}.{os.getpid()}"
                self._events[folder.name] = folder / file
            with self._events[folder.name].open("ab") as stream:
                events = [Event(wall_time=time.time(), step=step, summary=s) for s in summaries]
                if not stream.tell():
                    events.insert(0, Event(wall_time=time.time(), file_version="brain.Event:2"))
                for event in events:
                    RecordWriter(stream).write(event.SerializeToString())
        except OSError as error:
            self._curves_lost = True
            self.say(f"warning: no more curves for TensorBoard ({error}); {LOG} has them")

    def open_log(self) -> None:
        """Start to write the log, earlier lines first. Call it once the folder is locked."""
        self._log_is_open = True
        self._write_lines()

    def _write(self, entry: dict[str, Any]) -> None:
        self._unwritten += json.dumps({"time": round(time.time(), 3), **entry}) + "\n"
        self._write_lines()

    def _write_lines(self) -> None:
        """Append to the log; a full disk costs log lines and nothing else."""
        if self._folder is not None and self._log_is_open:
            with suppress(OSError), (self._folder / LOG).open("a") as log:
                log.write(self._unwritten)
            self._unwritten = ""

    def say(self, line: str) -> None:
        """One line for the user: a choice that was made, a warning."""
        self._write({"said": line})
        if self._bar is None:
            say(line)
        else:
            self._bar[1].console.print(visible(line), markup=False)

    def __exit__(self, *_: object) -> None:
        self._end_bar()


def _amount(value: float) -> str:
    return f"{value:g}" if value < 1e6 else f"{value:.0f}"


def pace(rate: float, unit: str) -> str:
    """`12 images/s`, or `40 s/epoch` when one takes longer than a second."""
    one = {"classes": "class"}.get(unit, unit.removesuffix("s"))
    slow = 0 < rate < 1 and one
    return f"{duration(1 / rate)}/{one}" if slow else f"{rate:.3g} {unit}/s"


def duration(seconds: float) -> str:
    """`0 s`, `3.4 s`, `74 s`, `12 min`, `3.4 h`."""
    if seconds < 9.95:
        return f"{seconds:.1f}".removesuffix(".0") + " s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
