"""auto: searches pruning, distillation and precision together, with latencies measured on this machine and the gate.

A trial is a row of other methods, made and judged as if it had been asked for by hand. First comes quantisation alone;
then pruning to a third of the multiplications, with a target to half of them, and less, each share recovered by
distillation where there are training texts. A share whose quantised model loses too much is quantised again with the
layers that lose most left float, which costs no training. Where all of that fails, the next share is the geometric mean
of it and the last that passed. Every trial is noted in a journal beside the target, so that a search that was cut
off goes on where it was.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from effllm.compression.method import Stage
from effllm.errors import CheckFailed, GateFailed, SettingError, TrainingStopped, Unsupported
from effllm.progress import OutOfTime

if TYPE_CHECKING:
    from effllm.exporters.source import Source

SHARES = (0.5, 0.33, 0.2)
"""The shares of the multiplications that are tried while they pass, before the search goes between them. Without a
target the first is left out: it could only be the answer where the second fails."""
CLOSE = 1.3
"""The search stops where the share that passes is at most so many times the one that fails."""
DISTIL = "distil:steps={steps},learning_rate=2e-4,precision={precision},seed={seed}"
"""How a share is recovered."""
LEAST, MARGIN = 0.25, 0.9
"""How much of a training that would end too late there must be time for, and the share of that time that is used."""
FORMS = ("int8", "int8:float_layers=2", "int8:float_layers=4")
"""How a share is quantised, until one form passes."""
REFUSALS = (SettingError, Unsupported, CheckFailed, TrainingStopped, GateFailed)
"""The errors that tell of a model and a method, not of a file, a disk or an installation."""


@dataclass(frozen=True)
class Trial:
    """What one row of methods gave: `specs` as on the command line; all of it measured against the dense model.

    `drop` is what the gate judges; `speedup` the ratio of median latencies over the dense graph in ONNX Runtime, in one
    interleaved run; `size` the share of its file. `folder` is the name of its variant, `seconds` what making it took.
    `refused` is why there is none: a method that cannot be on this model, or a training that stopped.
    """

    specs: tuple[str, ...]
    folder: str
    drop: float
    speedup: float
    size: float
    seconds: float
    rows: tuple[dict[str, Any], ...] = field(default=(), repr=False)
    refused: str = ""

    def within(self, max_drop: float) -> bool:
        """Return whether there is a variant that loses no more than this."""
        return not self.refused and self.drop <= max_drop

    @property
    def outcome(self) -> str:
        """What it lost, or why it could not be made."""
        return self.refused or f"{self.drop:.2%}"


@dataclass(frozen=True)
class Auto:
    """The search; ends the row, and is alone in it."""

    name: ClassVar[str] = "auto"
    summary: ClassVar[str] = "searches pruning, distillation and precision for this machine, within --max-drop"
    stage: ClassVar[Stage] = Stage.SEARCH

    target_speedup: float = field(
        default=0.0, metadata={"help": "stop at a trial this many times as fast as ONNX Runtime float32; 0 = fastest"}
    )
    target_size: float = field(
        default=0.0, metadata={"help": "stop at a trial whose file is at most this share of the dense one; 0 = fastest"}
    )
    budget_minutes: float = field(default=30.0, metadata={"help": "neither start a trial nor train after this time"})
    distil_steps: int = field(default=2000, metadata={"help": "steps of distillation after pruning, with --train"})
    precision: Literal["fp32", "bf16"] = field(
        default="fp32", metadata={"help": "how distillation computes products: in fp32, or in bf16 by autocast"}
    )
    seed: int = field(default=0, metadata={"help": "decides texts and their order in training"})

    def __post_init__(self) -> None:
        if self.target_speedup and self.target_size:
            raise SettingError("auto: give target_speedup or target_size, not both")
        if self.target_speedup < 0 or not 0 <= self.target_size <= 1:
            raise SettingError("auto: target_speedup must be at least 0 and target_size between 0 and 1")
        if self.distil_steps < 1:
            raise SettingError(f"auto: distil_steps must be at least 1, got {self.distil_steps}")
        if not self.budget_minutes > 0:
            raise SettingError(f"auto: budget_minutes must be above 0, got {self.budget_minutes}")

    def check(self, source: Source) -> None:
        """Every trial checks its own methods."""

    def reached(self, trial: Trial) -> bool:
        """Return whether a trial is all that was asked for."""
        if self.target_speedup:
            return trial.speedup >= self.target_speedup
        return bool(self.target_size) and trial.size <= self.target_size

    def gain(self, trial: Trial) -> float:
        """Return what a trial is ranked by among those that pass: larger is better."""
        return -trial.size if self.target_size else trial.speedup

    def best(self, trials: Sequence[Trial], max_drop: float) -> Trial:
        """Return the trial to keep: of those that reach the target the one that loses least, else the largest gain.

        Raises GateFailed when none is within `max_drop`.
        """
        passing = [trial for trial in trials if trial.within(max_drop)]
        if not passing:
            tried = "; ".join(f"{' + '.join(t.specs)}: {t.outcome}" for t in trials)
            raise GateFailed(f"no trial stays within the allowed {max_drop:.2%}; tried {tried}", [])
        reaching = [trial for trial in passing if self.reached(trial)]
        if reaching:
            return min(reaching, key=lambda t: (t.drop, -self.gain(t)))
        return max(passing, key=lambda t: (self.gain(t), -t.drop))

    def search(self, trials: Search, max_drop: float, *, distil: bool) -> Trial:
        """Run trials until the target is reached, nothing is left to try, or the budget is over; return the best.

        The first trial may take what it takes, so that there is an answer. A later one is given up when its training
        shows that it would end too late, what comes after it taken to last as long as the first trial; the last trial
        is then the same one with as many steps as there is time for.
        """
        end, reserve = time.monotonic() + self.budget_minutes * 60, 0.0
        for specs in self._plan(trials, max_drop, distil=distil):
            if time.monotonic() > end and specs not in trials.seen:
                break
            known, begun = specs in trials.seen, time.monotonic()
            until = end - reserve if trials.seen else math.inf
            try:
                trial = trials.run(specs, until)
            except OutOfTime as error:
                trials.given_up = f"{' + '.join(specs)}: {error}"
                self._run_shorter(trials, specs, until, begun, error.needed_s)
                break
            reserve = reserve or (trial.seconds if known else time.monotonic() - begun)
            if trial.within(max_drop) and self.reached(trial):
                break
        return self.best(trials.all, max_drop)

    def _recovery(self, steps: int) -> str:
        return DISTIL.format(steps=steps, precision=self.precision, seed=self.seed)

    def _run_shorter(self, trials: Search, specs: tuple[str, ...], until: float, begun: float, needed_s: float) -> None:
        """Run a trial that was given up with as many steps as there is time for, unless those are too few.

        What came before its training, begun at `begun`, comes again; the whole training would take `needed_s`.
        """
        now = time.monotonic()
        fits = (until - now - (now - begun)) / needed_s
        steps = int(self.distil_steps * fits * MARGIN)
        if fits < LEAST or not steps:
            return
        whole, fewer = self._recovery(self.distil_steps), self._recovery(steps)
        with contextlib.suppress(OutOfTime):
            trials.run(tuple(fewer if spec == whole else spec for spec in specs), until)

    def _plan(self, trials: Search, max_drop: float, *, distil: bool) -> Iterator[tuple[str, ...]]:
        """Yield the rows of methods to try next, each chosen by what the ones before gave."""
        recover = (self._recovery(self.distil_steps),) if distil else ()

        def forms(*weights: str) -> Generator[tuple[str, ...], None, bool]:
            for form in FORMS:
                specs = (*weights, form)
                yield specs
                if trials.seen[specs].within(max_drop):
                    return True
            return False

        def pruned(share: float) -> Generator[tuple[str, ...], None, bool]:
            return forms(f"structured:flops={share:g}", *recover)

        yield from forms()
        passing, failing = 1.0, 0.0
        for share in SHARES if self.target_speedup or self.target_size else SHARES[1:]:
            if not (yield from pruned(share)):
                failing = share
                break
            passing = share
        while failing and passing > failing * CLOSE:
            share = round(math.sqrt(passing * failing), 3)
            if (yield from pruned(share)):
                passing = share
            else:
                failing = share


@dataclass
class Search:
    """The trials of one search. `make` makes a trial of a row of methods; what it gave is noted in `journal`.

    `make` is also told when to be done with what trains, on the monotonic clock, and raises OutOfTime where it cannot;
    `given_up` says which trial that was. A journal of an earlier search with the same `identity` is gone on with.
    """

    make: Callable[[tuple[str, ...], float], Trial]
    journal: Path
    identity: str
    given_up: str = ""
    seen: dict[tuple[str, ...], Trial] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.journal.is_file():
            return
        text = self.journal.read_text(encoding="utf-8")
        if not text.endswith("\n"):  # what is written next should not continue the line that a kill cut off
            self.journal.write_text(text + "\n", encoding="utf-8")
        for line in text.splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # the line that was being written when the process was killed
                continue
            if record.pop("identity", None) == self.identity:
                trial = Trial(**{**record, "specs": tuple(record["specs"]), "rows": tuple(record["rows"])})
                if (self.journal.parent / trial.folder).is_dir():
                    self.seen[trial.specs] = trial

    @property
    def all(self) -> list[Trial]:
        """Every trial, in the order in which they were made."""
        return list(self.seen.values())

    def run(self, specs: tuple[str, ...], until: float = math.inf) -> Trial:
        """Make a trial, or return the one that is there. What the model does not take is a trial too, refused.

        Raises OutOfTime where it shows that what trains will not be done by `until`, on the monotonic clock.
        """
        if specs not in self.seen:
            try:
                self.seen[specs] = self.make(specs, until)
            except REFUSALS as error:
                self.seen[specs] = Trial(specs, "", drop=1.0, speedup=0.0, size=1.0, seconds=0.0, refused=str(error))
            else:
                with self.journal.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps({"identity": self.identity, **asdict(self.seen[specs])}) + "\n")
        return self.seen[specs]
