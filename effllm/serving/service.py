"""The models of a server by name: opening, finding, reloading and draining them."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self, get_args, get_type_hints

from effllm import machine
from effllm.errors import ArtifactError, SettingError, first_line
from effllm.serving.garbage import settle
from effllm.serving.instance import KINDS, Instance
from effllm.serving.refusals import NotReady, QueueFull, TooMany, UnknownModel, WrongTask
from effllm.serving.served import Answers, ModelInfo, ServedModel, TokenPiece
from effllm.serving.settings import ServeSettings
from effllm.serving.worker import WorkerSettings
from effllm.tasks import Example

logger = logging.getLogger(__name__)

ENGINES = get_args(get_type_hints(ServeSettings)["engine"])
POLL_S = 0.02
SETTLE_S = 0.5
"""After a model that was replaced is closed; by then its last callbacks have run."""


class Model:
    """A name that answers. Which folder stands behind it can change from one request to the next."""

    def __init__(self, instance: Instance, settings: ServeSettings) -> None:
        self.instance = instance
        self._settings = settings
        self._restarts = 0

    @property
    def info(self) -> ModelInfo:
        """What is known of the model."""
        return self.instance.info

    @property
    def ready(self) -> bool:
        """Whether its worker answers."""
        return self.instance.ready

    @property
    def queued(self) -> int:
        """The inputs that were accepted and are not done."""
        return self.instance.queued

    @property
    def full(self) -> QueueFull | None:
        """The refusal of one more input, None where it has room."""
        return self.instance.full()

    @property
    def restarts(self) -> int:
        """How often a worker of this name died."""
        return self._restarts + self.instance.counts.restarts

    async def answer(
        self, examples: Sequence[Example], *, task: str = "", truncate: bool = True, deadline_s: float | None = None
    ) -> Answers:
        """Answer examples; see `served.ServedModel`."""
        if len(examples) > self._settings.max_inputs:
            raise TooMany(f"{len(examples)} inputs in one request, at most {self._settings.max_inputs} are taken")
        if task and task not in KINDS[self.info.task]:
            raise WrongTask(f"{self.info.name} answers {self.info.task}, not {task}")
        return await self.instance.answer(examples, task=task, truncate=truncate, deadline_s=deadline_s)

    async def tokenise(self, texts: Sequence[str]) -> list[list[TokenPiece]]:
        """Return the tokens of each text, not truncated."""
        return await self.instance.tokenise(texts)

    def switch(self, instance: Instance) -> Instance:
        """Answer with another instance from now on; returns the one before, which still has its requests."""
        before, self.instance = self.instance, instance
        self._restarts += before.counts.restarts
        return before


class Service:
    """All models of a server."""

    def __init__(
        self, opened: Mapping[str, Model], folders: Mapping[str, WorkerSettings], settings: ServeSettings
    ) -> None:
        self._opened = dict(opened)
        self._folders = dict(folders)
        self._settings = settings
        self._closing = False
        self._reloading = asyncio.Lock()
        self._end_s = math.inf
        self._retiring: set[asyncio.Task[None]] = set()

    @classmethod
    async def open(cls, folders: Mapping[str, Path], settings: ServeSettings) -> Self:
        """Load every folder, by the name it is served under. Raises what keeps one from loading; then none is left."""
        if settings.engine not in ENGINES:
            raise SettingError(f"--engine must be one of {', '.join(ENGINES)}, got {settings.engine!r}")
        threads = settings.threads or machine.usable_cores()
        wanted = {name: WorkerSettings(path, name, settings.engine, threads) for name, path in folders.items()}
        opening = [asyncio.ensure_future(Instance.open(each, settings)) for each in wanted.values()]
        try:
            found = await asyncio.gather(*opening)
        except BaseException:  # one cannot be loaded, or the server is stopped meanwhile
            ended = await asyncio.gather(*opening, return_exceptions=True)
            await asyncio.gather(*(each.close() for each in ended if isinstance(each, Instance)))
            raise
        models = {name: Model(each, settings) for name, each in zip(wanted, found, strict=True)}
        return cls(models, wanted, settings)

    @property
    def models(self) -> Mapping[str, ServedModel]:
        """The models by name, in the order they were given."""
        return self._opened

    @property
    def ready(self) -> bool:
        """Whether every model answers and the server is not draining."""
        return not self._closing and all(model.ready for model in self._opened.values())

    def find(self, name: str | None, *tasks: str) -> Model:
        """Return the model of that name, or the first that answers one of the tasks.

        Raises UnknownModel, WrongTask, or NotReady while the server drains.
        """
        if self._closing:
            raise NotReady("the server is shutting down")
        if name is None:
            fitting = [m for m in self._opened.values() if not tasks or set(tasks) & set(KINDS[m.info.task])]
            if not fitting:
                raise WrongTask(f"no model here answers {' or '.join(tasks)}")
            return fitting[0]
        if name not in self._opened:
            raise UnknownModel(f"no model {name!r} is served here; the models are {', '.join(self._opened)}")
        model = self._opened[name]
        if tasks and not set(tasks) & set(KINDS[model.info.task]):
            raise WrongTask(f"{name} answers {model.info.task}, not {' or '.join(tasks)}")
        return model

    async def reload(self, name: str | None = None) -> list[str]:
        """Load folders again and switch to them; see `served.Models`."""
        async with self._reloading:
            loaded, refused = [], {}
            for each in [name] if name is not None else list(self._opened):
                model = self.find(each)
                try:
                    instance = await Instance.open(self._folders[each], self._settings)
                except Exception as error:  # the other folders are tried all the same
                    refused[each] = first_line(error)
                    continue
                self._retire_later(model.switch(instance))
                loaded.append(each)
                logger.info("%s was loaded again", each)
        if refused:
            errors = "; ".join(f"{each}: {error}" for each, error in refused.items())
            raise ArtifactError(f"{errors}; loaded again: {', '.join(loaded) or 'none'}")
        return loaded

    def _retire_later(self, instance: Instance) -> None:
        """Close an instance when its requests are answered; they may take the time that they were accepted for."""
        seconds = max(self._settings.drain, self._settings.timeout)
        task = asyncio.get_running_loop().create_task(self._retire(instance, seconds))
        self._retiring.add(task)
        task.add_done_callback(self._retired)

    def _retired(self, task: asyncio.Task[None]) -> None:
        self._retiring.discard(task)
        asyncio.get_running_loop().call_later(SETTLE_S, settle)

    async def close(self) -> None:
        """Refuse what is new, finish what was accepted within the drain time, and end the workers."""
        self._closing = True
        self._end_s = min(self._end_s, time.monotonic() + self._settings.drain)
        await asyncio.gather(
            *(self._retire(model.instance, self._settings.drain) for model in self._opened.values()), *self._retiring
        )

    def stop_waiting(self) -> None:
        """Wait for no accepted request any more, in `close` and after a reload."""
        self._end_s = -math.inf

    async def _retire(self, instance: Instance, seconds: float) -> None:
        """Close an instance once its requests are answered, so many seconds or the server's drain time are over."""
        end = time.monotonic() + seconds
        while instance.busy and time.monotonic() < min(end, self._end_s):
            await asyncio.sleep(POLL_S)
        await instance.close()
