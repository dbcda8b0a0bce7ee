"""The deployment on a Ray cluster of two nodes: answers, a node that is killed under load, and an update."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import make_model

import effllm
from effllm.errors import SettingError
from effllm.serving.settings import RaySettings, ServeSettings

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A head that runs no replicas, and two nodes that run one each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    ray.init(cluster.address, log_to_driver=False)
    yield cluster, nodes
    from ray import serve

    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ray")
    return effllm.export(make_model(root / "model"), root / "served").path


SETTINGS = ServeSettings(port=8765, threads=1)
URL = f"http://127.0.0.1:{SETTINGS.port}"


class Load:
    """Clients that ask all the time and count what comes back."""

    def __init__(self, clients: int) -> None:
        self.counts: Counter[str] = Counter()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        with httpx.Client(timeout=60) as client:
            while not self._stop.is_set():
                try:
                    self.counts[str(client.post(f"{URL}/predict", json={"inputs": "a"}).status_code)] += 1
                except httpx.HTTPError as error:
                    self.counts[type(error).__name__] += 1

    def stop(self) -> Counter[str]:
        self._stop.set()
        for thread in self._threads:
            thread.join(90)
        assert not any(thread.is_alive() for thread in self._threads), "a request hangs"
        return self.counts


def deploy(folder: Path, name: str) -> None:
    from effllm.serving.ray import deploy

    deploy({name: folder}, SETTINGS, RaySettings(min_replicas=2, max_replicas=2))


def wait_for(status: int, seconds: float = 60) -> httpx.Response:
    end = time.monotonic() + seconds
    while True:
        answer = httpx.get(f"{URL}/health/ready", timeout=30)
        if answer.status_code == status or time.monotonic() > end:
            return answer
        time.sleep(0.5)


def test_a_cluster_that_is_not_there_is_named(folder: Path) -> None:
    from effllm.serving.ray import deploy

    assert not ray.is_initialized()  # so this stands before the tests that start a cluster
    with pytest.raises(SettingError, match=r"no Ray cluster at 127\.0\.0\.1:1"):
        deploy({"a": folder}, SETTINGS, RaySettings(ray_address="127.0.0.1:1"))


def test_a_killed_node_costs_its_own_requests_and_the_other_goes_on(cluster: Any, folder: Path) -> None:
    deploy(folder, "first")
    assert wait_for(200).status_code == 200
    assert httpx.get(f"{URL}/info").json()["model_id"] == "first"
    load = Load(4)
    time.sleep(5)
    before = sum(load.counts.values())
    _, nodes = cluster
    cluster[0].remove_node(nodes[1], allow_graceful=False)
    time.sleep(20)
    counts = load.stop()
    assert counts["200"] > before
    # The proxy of the killed node takes its connections along; what ran there ends with an error.
    assert set(counts) <= {"200", "500", "503", "ReadError", "RemoteProtocolError", "ConnectError"}
    assert sum(counts.values()) - counts["200"] <= 4 * 5, counts


def test_an_update_drops_no_request(cluster: Any, folder: Path) -> None:
    cluster[0].add_node(num_cpus=1)
    deploy(folder, "first")
    load = Load(4)
    deploy(folder, "second")
    time.sleep(5)
    counts = load.stop()
    assert httpx.get(f"{URL}/info").json()["model_id"] == "second"
    assert set(counts) == {"200"}
