"""Why a request gets no answer, as types. Each API gives them its own JSON form; `status` is the same in all.

The tree, with the status of each:

    Refused
    ├── BadInput               422    an input that the task cannot take; `index` tells which
    ├── TooLong                413    an input has more tokens than the model takes, and may not be cut
    ├── TooMany                413    more inputs than one request may have
    ├── UnknownModel           404    no model of that name is served
    ├── WrongTask              400    the model does not answer that task
    ├── QueueFull              429    `retry_after_s` says when to come back
    ├── NotReady               503    the model's worker is starting, restarting or draining
    ├── WorkerDied             503    the worker process died with this request; it may be sent again
    ├── Failed                 500    the engine raised an error on this input
    └── DeadlinePassed         504    it was not done in time
"""

from __future__ import annotations


class Refused(Exception):
    """A request that is not answered."""

    status = 500


class BadInput(Refused):
    """An input that the task cannot take."""

    status = 422

    def __init__(self, message: str, index: int = 0) -> None:
        super().__init__(message)
        self.index = index
        self.field = f"inputs.{index}"
        """Where the input stands in the body."""


class TooLong(BadInput):
    """An input has more tokens than the model takes, and may not be cut."""

    status = 413


class TooMany(Refused):
    """More inputs than one request may have."""

    status = 413


class UnknownModel(Refused):
    """No model of that name is served."""

    status = 404


class WrongTask(Refused):
    """The model does not answer that task."""

    status = 400


class QueueFull(Refused):
    """The queue of the model is full."""

    status = 429

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotReady(Refused):
    """The model's worker is starting, restarting or draining."""

    status = 503


class WorkerDied(Refused):
    """The worker process died with this request."""

    status = 503


class Failed(Refused):
    """The engine raised an error on this input."""


class DeadlinePassed(Refused):
    """It was not done in time."""

    status = 504
