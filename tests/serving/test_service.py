"""The service: what it answers, what it refuses, and what happens when its worker dies or its folder changes."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import os
import shutil
import signal
import socket
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import WORDS, make_model

import effllm
from effllm.errors import ArtifactError, SettingError
from effllm.runtime.predictor import Predictor
from effllm.serving.garbage import settle
from effllm.serving.instance import Instance
from effllm.serving.refusals import (
    BadInput,
    DeadlinePassed,
    Failed,
    NotReady,
    QueueFull,
    TooLong,
    TooMany,
    UnknownModel,
    WorkerDied,
    WrongTask,
)
from effllm.serving.served import POOLED, TOKEN_STATES
from effllm.serving.service import Service
from effllm.serving.settings import ServeSettings
from effllm.serving.worker import PieceFailed, Ran, Worker, WorkerSettings, check_same
from effllm.tasks import Example

TEXTS = [" ".join(WORDS[i : i + 2 + i % 9]) for i in range(20)]
TASKS = ("text-classification", "feature-extraction", "fill-mask", "token-classification", "question-answering")


@pytest.fixture
def folders(exported: dict[str, Path]) -> dict[str, Path]:
    return {task: exported[task] for task in TASKS}


def run(
    folders: dict[str, Path], test: Callable[[Service], Awaitable[Any]], settings: ServeSettings | None = None
) -> Any:
    """Open a service, run a test on it, and close it."""

    async def whole() -> Any:
        service = await Service.open(folders, settings or ServeSettings(threads=1))
        try:
            return await test(service)
        finally:
            await service.close()

    return asyncio.run(whole())


def example(task: str, text: str) -> Example:
    if task == "question-answering":
        return Example(WORDS[0], text)
    if task == "token-classification":
        return Example(tuple(text.split()))
    return Example(f"{text} [MASK]" if task == "fill-mask" else text)


def flat(value: Any) -> np.ndarray:
    """Return the numbers of an answer."""
    if isinstance(value, dict):
        return np.concatenate([flat(v) for v in value.values()] or [np.zeros(0)])
    if isinstance(value, list | tuple):
        return np.concatenate([flat(v) for v in value] or [np.zeros(0)])
    return np.ravel(np.asarray(value, dtype=np.float64)) if not isinstance(value, str | None) else np.zeros(0)


def stop(pid: int) -> None:
    """Stop a worker, and wait until all its threads have: the signal reaches one of them, the others may still run."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)


def test_every_task_answers_what_the_predictor_answers(folders: dict[str, Path]) -> None:
    async def test(service: Service) -> None:
        for task in TASKS:
            examples = [example(task, text) for text in TEXTS]
            answers = await service.find(task).answer(examples)
            own = list(Predictor.open(folders[task], threads=1).answers(examples))
            for got, expected in zip(answers.results, own, strict=True):
                np.testing.assert_allclose(flat(got.value), flat(expected.value), atol=1e-5)
            assert answers.tokens > 0

    run(folders, test)


def test_an_answer_does_not_depend_on_what_runs_beside_it(folders: dict[str, Path]) -> None:
    async def test(service: Service) -> None:
        model = service.find("feature-extraction")
        alone = [(await model.answer([Example(text)])).results[0].value for text in TEXTS]
        together = await asyncio.gather(*(model.answer([Example(text)]) for text in TEXTS))
        for one, answers in zip(alone, together, strict=True):
            np.testing.assert_allclose(answers.results[0].value, one, atol=1e-5)

    run({"feature-extraction": folders["feature-extraction"]}, test)


def test_embeddings_come_as_states_and_pooled_too(folders: dict[str, Path]) -> None:
    async def test(service: Service) -> None:
        model = service.find(None, "feature-extraction")
        unit, pooled, states = [
            (await model.answer([Example(TEXTS[5])], task=task)).results[0]
            for task in ("feature-extraction", POOLED, TOKEN_STATES)
        ]
        np.testing.assert_allclose(states.value.mean(axis=0), pooled.value, atol=1e-6)
        np.testing.assert_allclose(pooled.value / np.linalg.norm(pooled.value), unit.value, atol=1e-6)
        assert len(states.value) == states.tokens

    run({"feature-extraction": folders["feature-extraction"]}, test)


def test_models_are_found_by_name_and_by_task(folders: dict[str, Path]) -> None:
    async def test(service: Service) -> None:
        assert service.find(None).info.name == TASKS[0]
        assert service.find(None, "fill-mask").info.name == "fill-mask"
        with pytest.raises(UnknownModel, match=r"'nothing'.*text-classification"):
            service.find("nothing")
        with pytest.raises(WrongTask, match="fill-mask answers fill-mask, not"):
            service.find("fill-mask", "feature-extraction")
        with pytest.raises(WrongTask):
            await service.find("fill-mask").answer([Example("a")], task=POOLED)

    run({name: folders[name] for name in ("text-classification", "fill-mask")}, test)


CLASSIFIER = "text-classification"


def classifier(folders: dict[str, Path]) -> dict[str, Path]:
    return {CLASSIFIER: folders[CLASSIFIER]}


def test_bad_inputs_are_refused_by_their_index(folders: dict[str, Path]) -> None:
    async def test(service: Service) -> None:
        model = service.find(None)
        with pytest.raises(BadInput, match="input 1") as bad:
            await model.answer([Example("a"), Example("\ud800")])
        assert bad.value.index == 1
        with pytest.raises(TooLong, match=r"input 0 has \d+ tokens, text-classification takes"):
            await model.answer([Example(" ".join(WORDS) * 200)], truncate=False)
        cut = await model.answer([Example(" ".join(WORDS) * 200)])
        assert cut.results[0].truncated_tokens > 0
        with pytest.raises(TooMany, match="at most 4"):
            await model.answer([Example("a")] * 5)
        assert model.queued == 0

    run(classifier(folders), test, ServeSettings(threads=1, max_inputs=4))


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(folders: dict[str, Path]) -> None:
    async def test(service: Service) -> None:
        model = service.find(None)
        stop(model.instance.worker_pid)
        waiting = [asyncio.create_task(model.answer([Example("a")] * 4)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="8 inputs wait") as full:
            await model.answer([Example("a")])
        assert full.value.retry_after_s > 0
        waiting[0].cancel()
        await asyncio.sleep(0)
        assert model.queued == 4
        later = asyncio.create_task(model.answer([Example("a")]))
        await asyncio.sleep(0)
        os.kill(model.instance.worker_pid, signal.SIGCONT)
        assert len((await waiting[1]).results) == 4
        assert len((await later).results) == 1

    run(classifier(folders), test, ServeSettings(threads=1, max_inputs=4, max_queue=8))


def test_batches_side_by_side_are_busy_for_their_common_time(folders: dict[str, Path]) -> None:
    async def test(service: Service) -> None:
        instance = service.find(None).instance
        stop(instance.worker_pid)
        waiting = [asyncio.create_task(instance.answer([Example("a")])) for _ in range(3)]
        await asyncio.sleep(0.01)
        now, running = time.monotonic(), list(instance._running.items())
        assert len(running) > 1
        assert instance._worker is not None
        for number, places in running:
            values = [PieceFailed("") for _ in places]
            instance._ran(instance._worker, Ran(number, values, now - 100, now))
        assert 0 < instance.counts.busy_s < 100
        for task in waiting:
            task.cancel()
        os.kill(instance.worker_pid, signal.SIGKILL)

    run(classifier(folders), test, ServeSettings(threads=2))


def test_what_is_not_done_in_time_is_refused_and_leaves_the_queue(folders: dict[str, Path]) -> None:
    async def test(service: Service) -> None:
        model = service.find(None)
        stop(model.instance.worker_pid)
        with pytest.raises(DeadlinePassed, match=r"0\.2 s"):
            await model.answer([Example("a")], deadline_s=0.2)
        assert model.queued == 0
        os.kill(model.instance.worker_pid, signal.SIGCONT)
        assert (await model.answer([Example("a")])).results

    run(classifier(folders), test)


def test_what_a_killed_worker_ran_is_answered_by_the_next_one(folders: dict[str, Path]) -> None:
    async def test(service: Service) -> None:
        model = service.find(None)
        before = [(await model.answer([Example(text)])).results[0].value for text in TEXTS]
        stop(model.instance.worker_pid)
        waiting = [asyncio.create_task(model.answer([Example(text)])) for text in TEXTS]
        await asyncio.sleep(0.05)
        os.kill(model.instance.worker_pid, signal.SIGKILL)
        while model.ready:
            await asyncio.sleep(0.01)
        assert not service.ready
        answers = await asyncio.gather(*waiting)
        assert [a.results[0].value["label"] for a in answers] == [b["label"] for b in before]
        assert service.ready
        assert model.restarts == 1

    run(classifier(folders), test)


def test_a_worker_that_comes_back_to_another_folder_answers_as_that_folder(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    served, other = tmp_path / "model", make_model(tmp_path / "other")
    shutil.copytree(folders[CLASSIFIER], served)
    config = json.loads((other / "config.json").read_text())
    config["id2label"] = {"0": "a", "1": "b", "2": "c"}
    (other / "config.json").write_text(json.dumps(config | {"label2id": {"a": 0, "b": 1, "c": 2}}))
    effllm.export(other, tmp_path / "replacing")

    async def test(service: Service) -> None:
        model = service.find(None)
        stop(model.instance.worker_pid)
        waiting = asyncio.create_task(model.answer([Example("good movie")]))
        await asyncio.sleep(0.05)
        shutil.rmtree(served)
        (tmp_path / "replacing").rename(served)
        os.kill(model.instance.worker_pid, signal.SIGKILL)
        with pytest.raises(WorkerDied, match="was replaced"):
            await waiting
        answer = (await model.answer([Example("good movie")], deadline_s=20)).results[0].value
        assert answer["label"] in "abc"
        assert model.info.labels == ("a", "b", "c")

    run({"model": served}, test)


def test_a_worker_comes_back_once_the_machine_can_start_processes_again(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    start, failures = SpawnProcess.start, [errno.EMFILE, errno.EAGAIN]

    def refused(process: SpawnProcess) -> None:
        if failures:
            raise OSError(failures[0], os.strerror(failures.pop(0)))
        start(process)

    async def test(service: Service) -> None:
        model = service.find(None)
        monkeypatch.setattr(SpawnProcess, "start", refused)
        os.kill(model.instance.worker_pid, signal.SIGKILL)
        assert (await model.answer([Example("a")], deadline_s=20)).results
        assert not failures

    run(classifier(folders), test)


def test_what_nobody_waits_for_is_not_tokenised_to_its_end(folders: dict[str, Path]) -> None:
    async def test(service: Service) -> None:
        model, begun = service.find(None), []
        tokenizer = model.instance._tokenising._thread_tokenizer
        encode = tokenizer.encode

        def slow(*texts: Any) -> Any:
            begun.append(texts)
            time.sleep(0.05)
            return encode(*texts)

        tokenizer.encode = slow
        with pytest.raises(DeadlinePassed):
            await model.answer([Example("fox " * 300)] * 40, deadline_s=0.12)
        await asyncio.sleep(1.0)
        assert 0 < len(begun) < 10

    run(classifier(folders), test)


def test_a_hangup_of_the_whole_group_leaves_the_workers(folders: dict[str, Path]) -> None:
    async def test(service: Service) -> None:
        model = service.find(None)
        pid = model.instance.worker_pid
        os.kill(pid, signal.SIGHUP)
        assert (await model.answer([Example("a")], deadline_s=20)).results
        assert model.instance.worker_pid == pid
        assert model.restarts == 0

    run(classifier(folders), test)


def test_a_worker_that_cannot_be_started_keeps_no_socket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refused(process: SpawnProcess) -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    ends = socket.socketpair()
    monkeypatch.setattr(SpawnProcess, "start", refused)
    monkeypatch.setattr(socket, "socketpair", lambda: ends)
    with pytest.raises(OSError, match="temporarily unavailable"):
        Worker(WorkerSettings(tmp_path, "model", "onnxruntime", 1))
    assert [end.fileno() for end in ends] == [-1, -1]


def test_an_input_that_kills_two_workers_is_refused_and_its_neighbours_are_not(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(service: Service) -> None:
        model = service.find(None)
        stop(model.instance.worker_pid)
        waiting = [asyncio.create_task(model.answer([Example(text)])) for text in TEXTS[:4]]
        await asyncio.sleep(0.05)
        instance: Instance = model.instance
        poison = next(iter(instance._running.values()))[0]
        submit = instance._submit

        def deadly(places: list[tuple[int, int]]) -> None:
            submit(places)
            if poison in places:
                os.kill(instance.worker_pid, signal.SIGKILL)

        monkeypatch.setattr(instance, "_submit", deadly)
        os.kill(instance.worker_pid, signal.SIGKILL)
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(a) for a in answers].count(WorkerDied) == 1
        assert sum(not isinstance(a, BaseException) for a in answers) == 3

    run(classifier(folders), test)


def test_an_input_that_the_engine_refuses_does_not_fail_its_neighbours(folders: dict[str, Path]) -> None:
    async def test(service: Service) -> None:
        model = service.find(None)
        stop(model.instance.worker_pid)
        waiting = [asyncio.create_task(model.answer([Example(TEXTS[0])])) for _ in range(6)]
        await asyncio.sleep(0)
        assert [len(places) for places in model.instance._running.values()] == [
            1,
            1,
        ]  # the other four wait for one batch
        list(model.instance._requests.values())[3].pieces[0].encoding.ids[1] = 10**6  # the engine knows no such token
        os.kill(model.instance.worker_pid, signal.SIGCONT)
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        assert [isinstance(a, Failed) for a in answers] == [False, False, False, True, False, False]
        assert [len(a.results) for a in answers if not isinstance(a, BaseException)] == [1] * 5
        assert model.instance.counts.batches == 3

    run(classifier(folders), test)


def test_a_reload_answers_what_was_accepted_and_then_uses_the_new_folder(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    served = tmp_path / "model"
    shutil.copytree(folders[CLASSIFIER], served)

    async def test(service: Service) -> None:
        model = service.find(None)
        waiting = [asyncio.create_task(model.answer([Example(text)])) for text in TEXTS]
        await asyncio.sleep(0)
        first = model.instance
        assert await service.reload() == ["model"]
        assert model.instance is not first
        assert len(await asyncio.gather(*waiting)) == len(TEXTS)
        file = served / "onnx" / "model.onnx"
        file.write_bytes(file.read_bytes()[:-1000])
        with pytest.raises(ArtifactError, match="damaged"):
            await service.reload("model")
        assert (await model.answer([Example("a")])).results
        while not first._closed:
            await asyncio.sleep(0.01)

    run({"model": served}, test)


@pytest.fixture
def thawed() -> Iterator[None]:
    gc.unfreeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("thawed")
def test_what_settled_and_became_garbage_is_freed_by_the_next_call() -> None:
    class Cycle:
        def __init__(self) -> None:
            self.itself = self

    cycle = Cycle()
    alive = weakref.ref(cycle)
    settle()
    del cycle
    gc.collect()
    assert alive() is not None  # the collector passes over it
    settle()
    assert alive() is None


@pytest.mark.usefixtures("thawed")
def test_a_model_settles_after_a_reload_and_the_one_before_is_freed(folders: dict[str, Path]) -> None:
    async def test(service: Service) -> None:
        before = weakref.ref(service.find(None).instance)
        await service.reload()
        while service._retiring:
            await asyncio.sleep(0.01)
        async with asyncio.timeout(10):
            while not gc.get_freeze_count():
                await asyncio.sleep(0.01)
        assert before() is None

    run(classifier(folders), test)


def test_closing_answers_what_was_accepted_and_refuses_what_is_new(folders: dict[str, Path]) -> None:
    async def whole() -> None:
        service = await Service.open(classifier(folders), ServeSettings(threads=1))
        model = service.find(None)
        waiting = [asyncio.create_task(model.answer([Example(text)])) for text in TEXTS]
        await asyncio.sleep(0)
        closing = asyncio.create_task(service.close())
        await asyncio.sleep(0)
        with pytest.raises(NotReady):
            service.find(None)
        assert len(await asyncio.gather(*waiting)) == len(TEXTS)
        await closing
        with pytest.raises(NotReady):
            await model.answer([Example("a")])

    asyncio.run(whole())


def test_a_drain_ends_when_its_time_is_over(folders: dict[str, Path]) -> None:
    async def whole() -> None:
        service = await Service.open(classifier(folders), ServeSettings(threads=1, drain=0.1))
        model = service.find(None)
        stop(model.instance.worker_pid)
        waiting = asyncio.create_task(model.answer([Example("a")]))
        await asyncio.sleep(0)
        await service.close()
        with pytest.raises(NotReady):
            await waiting

    asyncio.run(whole())


def test_folders_that_cannot_be_served_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    async def nothing(service: Service) -> None:
        raise AssertionError(service)

    with pytest.raises(ArtifactError, match="effllm export"):
        run({"a": folders[CLASSIFIER], "b": make_model(tmp_path / "plain")}, nothing)
    with pytest.raises(SettingError, match="--engine must be one of onnxruntime, openvino, got 'torch'"):
        run(classifier(folders), nothing, ServeSettings(engine="torch"))


def test_tokens_are_told_as_the_model_sees_them(folders: dict[str, Path]) -> None:
    async def test(service: Service) -> None:
        (tokens,) = await service.find(None).tokenise([f"{WORDS[0]} {WORDS[1]}"])
        assert [t.text for t in tokens] == ["[CLS]", WORDS[0], WORDS[1], "[SEP]"]
        assert [t.special for t in tokens] == [True, False, False, True]
        assert (tokens[2].start, tokens[2].stop) == (len(WORDS[0]) + 1, len(WORDS[0]) + 1 + len(WORDS[1]))

    run(classifier(folders), test)


def test_tokenising_has_few_places_of_its_own_a_deadline_and_a_bound(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("effllm.serving.tokenising.TOLD_TOKENS", 3000)

    async def test(service: Service) -> None:
        model, busy = service.find(None), threading.Event()
        with pytest.raises(TooLong, match="more than 3000 tokens"):
            await model.tokenise([WORDS[0], f"{WORDS[0]} " * 3000])
        model.instance._tokenising._thread.submit(busy.wait, 20)
        long = f"{WORDS[0]} " * 2000
        waiting = [asyncio.create_task(model.tokenise([long])) for _ in range(5)]
        await asyncio.sleep(0)
        got = await asyncio.gather(*waiting, return_exceptions=True)
        busy.set()
        assert [type(each) for each in got] == [DeadlinePassed] * 4 + [QueueFull]
        assert len((await model.tokenise([long]))[0]) == 2002

    run(classifier(folders), test, ServeSettings(threads=1, timeout=2))


def test_a_reload_finishes_what_is_being_tokenised(folders: dict[str, Path]) -> None:
    async def test(service: Service) -> None:
        model, busy = service.find(None), threading.Event()
        model.instance._tokenising._thread.submit(busy.wait, 20)
        telling = asyncio.create_task(model.tokenise([f"{WORDS[0]} " * 2000]))
        await asyncio.sleep(0)
        await service.reload()
        await asyncio.sleep(0.2)
        busy.set()
        assert len((await telling)[0]) == 2002

    run(classifier(folders), test)


def test_token_states_that_would_fill_memory_are_refused_before_they_are_made(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(service: Service) -> None:
        model = service.find(None)
        examples, batches = [Example(WORDS[0])] * 5, model.instance.counts.batches
        monkeypatch.setattr("effllm.serving.tokenising.STATE_NUMBERS", 15 * model.info.embedding_size)
        assert len((await model.answer(examples, task=TOKEN_STATES)).results) == 5
        monkeypatch.setattr("effllm.serving.tokenising.STATE_NUMBERS", 15 * model.info.embedding_size - 1)
        with pytest.raises(TooMany, match="15 tokens, more than the 14"):
            await model.answer(examples, task=TOKEN_STATES)
        assert len((await model.answer(examples)).results) == 5
        assert model.instance.counts.batches > batches

    run({"feature-extraction": folders["feature-extraction"]}, test)


def test_windows_take_places_and_one_input_makes_only_so_many(folders: dict[str, Path]) -> None:
    passage = " ".join(WORDS) * 20

    async def test(service: Service) -> None:
        model = service.find(None)
        with pytest.raises(TooLong, match=r"input 1 makes .* windows, at most 128"):
            await model.answer([Example(WORDS[0], WORDS[1]), Example(WORDS[0], passage * 20)])
        stop(model.instance.worker_pid)
        alone = asyncio.create_task(model.answer([Example(WORDS[0], passage)]))
        await asyncio.sleep(0.5)
        assert model.queued > 4
        with pytest.raises(QueueFull):
            await model.answer([Example(WORDS[0], WORDS[1])])
        os.kill(model.instance.worker_pid, signal.SIGCONT)
        assert (await alone).results
        assert model.queued == 0

    run({"qa": folders["question-answering"]}, test, ServeSettings(threads=1, max_queue=4, max_inputs=4))


def test_a_reload_tries_every_folder_and_tells_which_were_not_loaded(folders: dict[str, Path], tmp_path: Path) -> None:
    for name in "ab":
        shutil.copytree(folders[CLASSIFIER], tmp_path / name)

    async def test(service: Service) -> None:
        before = {name: model.instance for name, model in service._opened.items()}
        (tmp_path / "a" / "onnx" / "model.onnx").write_bytes(b"")
        with pytest.raises(ArtifactError, match=r"a: .*damaged.*; loaded again: b$"):
            await service.reload()
        assert [service._opened[name].instance is before[name] for name in "ab"] == [True, False]

    run({name: tmp_path / name for name in "ab"}, test)


def test_reloads_run_one_after_another(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    opened, under_way, most = Instance.open, 0, 0

    async def counted(*args: Any) -> Instance:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        try:
            return await opened(*args)
        finally:
            under_way -= 1

    async def test(service: Service) -> None:
        monkeypatch.setattr(Instance, "open", counted)
        await asyncio.gather(*(service.reload() for _ in range(3)))
        assert most == 1

    run(classifier(folders), test)


def test_a_reload_leaves_accepted_requests_the_time_that_they_may_take(folders: dict[str, Path]) -> None:
    async def test(service: Service) -> None:
        model = service.find(None)
        pid = model.instance.worker_pid
        stop(pid)
        waiting = asyncio.create_task(model.answer([Example("a")]))
        await asyncio.sleep(0)
        await service.reload()
        await asyncio.sleep(0.5)
        os.kill(pid, signal.SIGCONT)
        assert (await waiting).results

    run(classifier(folders), test, ServeSettings(threads=1, drain=0.1, timeout=20))


def test_a_close_gives_what_a_reload_left_no_more_than_the_drain_time(folders: dict[str, Path]) -> None:
    async def test(service: Service) -> None:
        model = service.find(None)
        stop(model.instance.worker_pid)
        waiting = asyncio.create_task(model.answer([Example("a")]))
        await asyncio.sleep(0)
        await service.reload()
        async with asyncio.timeout(5):
            await service.close()
        with pytest.raises(NotReady):
            await waiting

    run(classifier(folders), test, ServeSettings(threads=1, drain=0.1, timeout=20))


def test_a_request_waits_until_its_first_batch_and_runs_while_any_of_its_batches_does(folders: dict[str, Path]) -> None:
    async def test(service: Service) -> None:
        instance = service.find(None).instance
        stop(instance.worker_pid)
        long = " ".join(WORDS) * 200
        waiting = asyncio.create_task(instance.answer([Example(long)] * 3))
        while not instance._requests:
            await asyncio.sleep(0.01)
        (request,) = instance._requests.values()
        assert instance._worker is not None
        ran = [(2.0, 4.0), (1.0, 3.0), (6.0, 7.0)]  # seconds after it came; two side by side, a pause, another
        while ran:
            number, places = next(iter(instance._running.items()))
            assert len(places) == 1
            start, end = (request.added_s + seconds for seconds in ran.pop(0))
            instance._ran(instance._worker, Ran(number, [None], start, end))
        answers = await waiting
        assert answers.queue_s == pytest.approx(1.0)
        assert answers.infer_s == pytest.approx(4.0)
        os.kill(instance.worker_pid, signal.SIGKILL)

    run(classifier(folders), test, ServeSettings(threads=2, max_tokens=1))


def test_a_reload_follows_a_link_to_where_it_leads_now(folders: dict[str, Path], tmp_path: Path) -> None:
    current = tmp_path / "current"
    current.symlink_to(folders[CLASSIFIER])

    async def test(service: Service) -> None:
        assert service.find("model").info.task == CLASSIFIER
        current.unlink()
        current.symlink_to(folders["fill-mask"])
        assert await service.reload() == ["model"]
        assert service.find("model").info.task == "fill-mask"

    run({"model": current}, test)


def test_a_folder_that_is_replaced_while_it_is_loaded_is_not_mixed(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from effllm.serving import instance

    kept = []

    def other(folder: Path, manifest: dict) -> None:
        raise ArtifactError(f"{folder} was replaced while it was loaded; load it again")

    def start(settings: WorkerSettings) -> tuple[Worker, Any]:
        kept.append(started := begin(settings))
        return started

    begin = instance._start
    monkeypatch.setattr(instance, "_start", start)
    monkeypatch.setattr(instance, "check_same", other)
    with pytest.raises(ArtifactError, match="was replaced while it was loaded"):
        run(classifier(folders), None)
    assert not kept[0][0]._process.is_alive()


def test_a_manifest_that_changed_is_seen(folders: dict[str, Path]) -> None:
    manifest = json.loads((folders[CLASSIFIER] / "effllm.json").read_text())
    check_same(folders[CLASSIFIER], manifest)
    with pytest.raises(ArtifactError, match="was replaced while it was loaded"):
        check_same(folders["fill-mask"], manifest)


def test_a_server_that_is_stopped_while_it_loads_leaves_no_process(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from effllm.serving import instance

    kept: list[Worker] = []
    slow = threading.Event()

    def start(settings: WorkerSettings) -> tuple[Worker, Any]:
        if settings.name == "slow":
            assert slow.wait(30)
        started = begin(settings)
        kept.append(started[0])
        return started

    begin = instance._start
    monkeypatch.setattr(instance, "_start", start)

    async def test() -> None:
        named = {"quick": folders[CLASSIFIER], "slow": folders[CLASSIFIER]}
        opening = asyncio.ensure_future(Service.open(named, ServeSettings(threads=1)))
        while not kept:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        opening.cancel()
        await asyncio.sleep(0.1)
        slow.set()
        with pytest.raises(asyncio.CancelledError):
            await opening

    asyncio.run(test())
    assert len(kept) == 2
    assert not any(worker._process.is_alive() for worker in kept)


def test_a_question_that_is_too_long_is_told_by_how_much(folders: dict[str, Path]) -> None:
    async def test(service: Service) -> None:
        model = service.find(None)
        with pytest.raises(TooLong, match=r"the question of input 0 has \d+ tokens more than model takes"):
            await model.answer([Example(" ".join(WORDS[:8] * 30), "paris")], truncate=False)

    run({"model": folders["question-answering"]}, test)
