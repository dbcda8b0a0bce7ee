"""The whole: exported folders, `effllm serve` in a process of its own, its answers compared with the predictor's."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from effllm.runtime.predictor import Predictor
from effllm.serving.answers import WORDS

TEXT = "Ada lives in Paris, and the quick brown fox sleeps."


@pytest.fixture(scope="module")
def server(exported: dict[str, Path], tmp_path_factory) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`effllm serve` over all folders, one of them by a name of its own, with a key, and its URL."""
    key = tmp_path_factory.mktemp("key") / "key"
    key.write_text("secret", encoding="utf-8")
    arguments = [str(folder) for folder in exported.values()] + [f"twin={exported['text-classification']}"]
    command = [sys.executable, "-m", "effllm", "serve", *arguments, "--port", "0", "--threads", "1"]
    command += ["--api-key-file", str(key)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        table = ""
        while "serving on" not in table:
            line = running.stdout.readline()
            assert line, running.stderr.read()
            table += line
        for name in (*exported, "twin"):
            assert name in table
        yield running, table.partition("serving on ")[2].split()[0]
        running.kill()


def predictor(exported: dict[str, Path], task: str) -> Predictor:
    return Predictor.open(exported[task], threads=1)


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=60, headers={"authorization": "Bearer secret"}) as client:
        yield client


def ask(server, client: httpx.Client, path: str, body: dict) -> httpx.Response:
    answer = client.post(server[1] + path, json=body)
    assert answer.status_code == 200, answer.text
    return answer


def test_embeddings_are_the_predictors(exported, server, client) -> None:
    own = predictor(exported, "feature-extraction").embed([TEXT, "a fox"])
    assert ask(server, client, "/embed", {"inputs": [TEXT, "a fox"]}).json() == pytest.approx(own, abs=1e-5)
    data = ask(server, client, "/v1/embeddings", {"input": [TEXT, "a fox"], "model": "feature-extraction"}).json()[
        "data"
    ]
    assert np.array([one["embedding"] for one in data]) == pytest.approx(own, abs=1e-5)
    body = {"inputs": [{"name": "text", "shape": [2], "datatype": "BYTES", "data": [TEXT, "a fox"]}]}
    tensor = ask(server, client, "/v2/models/feature-extraction/infer", body).json()["outputs"][0]
    assert np.reshape(tensor["data"], tensor["shape"]) == pytest.approx(own, abs=1e-5)
    raw = np.array(ask(server, client, "/embed", {"inputs": TEXT, "normalize": False}).json()[0])
    assert raw / np.linalg.norm(raw) == pytest.approx(own[0], abs=1e-5)
    states = np.array(ask(server, client, "/embed_all", {"inputs": TEXT}).json()[0])
    assert states.mean(axis=0) == pytest.approx(raw, abs=1e-5)
    cosines = ask(
        server, client, "/similarity", {"inputs": {"source_sentence": TEXT, "sentences": ["a fox", TEXT]}}
    ).json()
    assert cosines == pytest.approx([own[0] @ own[1], 1.0], abs=1e-5)


def test_classes_are_the_predictors(exported, server, client) -> None:
    own = predictor(exported, "text-classification")
    for inputs, expected in [(TEXT, own.predict(TEXT)), ([TEXT, "a fox"], own.predict(TEXT, "a fox"))]:
        for path in ("/predict", "/models/twin/predict"):
            answer = ask(server, client, path, {"inputs": inputs}).json()
            assert {one["label"]: one["score"] for one in answer} == pytest.approx(expected["scores"], abs=1e-5)
    raw = ask(server, client, "/predict", {"inputs": TEXT, "raw_scores": True}).json()
    by_label = dict(zip(own.head.labels, own.predict(TEXT)["logits"], strict=True))
    assert {one["label"]: one["score"] for one in raw} == pytest.approx(by_label, abs=1e-4)


def test_entities_masks_and_answers_are_the_predictors(exported, server, client) -> None:
    tagger = predictor(exported, "token-classification").predict(" ".join(WORDS.findall(TEXT)))
    groups = ask(server, client, "/predict", {"inputs": TEXT, "model": "token-classification"}).json()
    assert all(TEXT[one["start"] : one["end"]] == one["word"] for one in groups)
    assert sum(len(WORDS.findall(one["word"])) for one in groups) == sum(tag != "O" for tag in tagger["tags"])
    masked = "the quick [MASK] sleeps"
    best = predictor(exported, "fill-mask").predict(masked)["masks"][0]["candidates"]
    fillings = ask(server, client, "/predict", {"inputs": masked, "model": "fill-mask"}).json()
    assert [one["token"] for one in fillings] == [one["id"] for one in best]
    assert fillings[0]["sequence"] == f"the quick {best[0]['token']} sleeps"
    expected = predictor(exported, "question-answering").predict("where does Ada live?", TEXT)
    answer = ask(server, client, "/predict", {"inputs": {"question": "where does Ada live?", "context": TEXT}}).json()
    assert (answer["start"], answer["end"]) == (expected["start"], expected["end"])
    assert TEXT[answer["start"] : answer["end"]] == answer["answer"]
    assert 0.2 <= answer["score"] <= 1


def test_long_texts_are_cut_and_counted_or_refused(server, client) -> None:
    long = "fox " * 500
    answer = ask(server, client, "/embed", {"inputs": ["a fox", long]})
    assert int(answer.headers["x-truncated-tokens"]) == 502 - 64
    refused = client.post(f"{server[1]}/embed", json={"inputs": ["a fox", long], "truncate": False})
    assert refused.status_code == 413
    assert refused.json()["error"].startswith("inputs.1: ")
    tokens = ask(server, client, "/tokenize", {"inputs": "the quick fox"}).json()[0]
    assert ["the quick fox"[one["start"] : one["stop"]] for one in tokens if not one["special"]] == [
        "the",
        "quick",
        "fox",
    ]


def test_odd_texts_are_answered_by_every_task(server, client) -> None:
    for text in (" ", "\0", "\t\n", "…", "😀", "a" * 5000, "\u202e\u0301", "[MASK]", "[CLS] [SEP] [PAD]"):
        for body in (
            {"inputs": text, "model": "text-classification"},
            {"inputs": text, "model": "token-classification"},
            {"inputs": text + "[MASK]", "model": "fill-mask"},
            {"inputs": {"question": text, "context": text}},
        ):
            assert ask(server, client, "/predict", body)
        ask(server, client, "/embed", {"inputs": text})
        ask(server, client, "/tokenize", {"inputs": text})


def test_a_damaged_folder_is_one_line_and_exit_2(exported, tmp_path: Path) -> None:
    shutil.copytree(exported["fill-mask"], tmp_path / "damaged")
    (tmp_path / "damaged" / "config.json").write_text("{}", encoding="utf-8")
    command = [sys.executable, "-m", "effllm", "serve", str(tmp_path / "damaged"), "--port", "0"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert "config.json" in line


STUCK = """
import os, signal, sys
from pathlib import Path
from effllm.serving.server import serve
from effllm.serving.settings import ServeSettings
def started(models, url):
    os.kill(models.models["stuck"].instance.worker_pid, signal.SIGSTOP)
    print(url, flush=True)
if __name__ == "__main__":
    serve({"stuck": Path(sys.argv[1])}, ServeSettings(port=0, threads=1, timeout=100, drain=100), started)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
def test_a_second_sigterm_does_not_wait(exported, client) -> None:
    command = [sys.executable, "-c", STUCK, str(exported["text-classification"])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            url, answers = running.stdout.readline().strip(), []
            asking = threading.Thread(
                target=lambda: answers.append(client.post(f"{url}/predict", json={"inputs": "a"}).status_code)
            )
            asking.start()
            while 'effllm_queue_size{model="stuck"} 1.0' not in client.get(f"{url}/metrics").text:
                time.sleep(0.01)
            running.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.wait(1)
            assert running.returncode is None  # asked once, it waits
            running.send_signal(signal.SIGTERM)
            assert running.wait(15) == 0
            asking.join(15)
            assert answers == [503]
        finally:
            running.kill()


def test_reload_keeps_answering_and_sigterm_ends_with_0(server, client) -> None:
    running, url = server
    assert client.post(f"{url}/admin/reload/twin", timeout=60).json() == {"reloaded": ["twin"]}
    assert client.get(f"{url}/health").status_code == 200
    ask(server, client, "/models/twin/predict", {"inputs": "a"})
    assert 'effllm_requests_total{path="/models/{name}/predict",status="200"}' in client.get(f"{url}/metrics").text
    running.send_signal(signal.SIGTERM)
    _, log = running.communicate(timeout=30)
    assert running.returncode == 0
    assert TEXT not in log
    assert "Traceback" not in log
