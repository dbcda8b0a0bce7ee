"""TEI's API, and the tasks in its style, over models that answer by rule."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from asgi import Client
from fakes import LABELS, SIZE, FakeModel, FakeModels, every_task, numbers

from effllm.serving.answers import fillings, words_of
from effllm.serving.app import create_app
from effllm.serving.refusals import BadInput
from effllm.serving.served import POOLED, TOKEN_STATES, TokenPiece
from effllm.serving.settings import ServeSettings


@pytest.fixture
def models() -> FakeModels:
    return every_task()


@pytest.fixture
def client(models: FakeModels) -> Client:
    return Client(create_app(models, ServeSettings(max_inputs=40)))


def test_embed_gives_a_list_of_unit_vectors_for_one_text_too(client: Client) -> None:
    one = client.post("/embed", {"inputs": "a text"}).json()
    two = client.post("/embed", {"inputs": ["a text", "another"]}).json()
    assert np.shape(one) == (1, SIZE)
    assert np.shape(two) == (2, SIZE)
    assert two[0] == one[0]
    assert np.linalg.norm(two, axis=1) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/predict", {"inputs": "a film", "model": "films", "raw_scores": True}),
        (
            "/v2/models/films/infer",
            {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a film"]}]},
        ),
    ],
)
def test_an_answer_under_way_while_its_model_is_reloaded_keeps_its_labels(
    models: FakeModels, client: Client, path: str, body: dict
) -> None:
    expected = client.post(path, body).json()
    model = models.models["films"]
    answer = model.answer

    async def reloaded(*given, **settings):
        found = await answer(*given, **settings)
        model.info = dataclasses.replace(model.info, labels=("one", "two"))
        return found

    model.answer = reloaded
    assert client.post(path, body).json() == expected


def test_masks_times_characters_are_bounded(client: Client) -> None:
    answer = client.post("/predict", {"inputs": "[MASK] " * 300 + "a" * 30_000, "model": "masks"})
    assert answer.status_code == 413
    assert answer.json()["error"].startswith("inputs.0: texts times their masks have more than 8000000 characters")


def test_embed_without_normalising_gives_the_pooled_states(models: FakeModels, client: Client) -> None:
    raw = client.post("/embed", {"inputs": "a text", "normalize": False}).json()[0]
    assert raw == pytest.approx(numbers("a text", 4 * SIZE).reshape(4, SIZE).mean(axis=0), abs=1e-6)
    assert models.models["minilm"].asked[-1][1] == POOLED


def test_dimensions_shorten_and_scale_again(client: Client) -> None:
    whole = client.post("/embed", {"inputs": "a text"}).json()[0]
    short = client.post("/embed", {"inputs": "a text", "dimensions": 3}).json()[0]
    assert short == pytest.approx(np.array(whole[:3]) / np.linalg.norm(whole[:3]), abs=1e-6)
    refused = client.post("/embed", {"inputs": "a", "dimensions": SIZE + 1})
    assert refused.status_code == 422
    assert "9 dimensions" in refused.json()["error"]


def test_embed_all_gives_one_vector_per_token(models: FakeModels, client: Client) -> None:
    states = client.post("/embed_all", {"inputs": ["a text", "a"]}).json()
    assert [np.shape(one) for one in states] == [(4, SIZE), (3, SIZE)]
    assert models.models["minilm"].asked[-1][1] == TOKEN_STATES
    assert len(client.post("/embed_all", {"inputs": ["a"] * 33}).json()) == 33


def test_classes_come_best_first_as_probabilities_or_as_the_outputs(client: Client) -> None:
    scores = client.post("/predict", {"inputs": "a film"}).json()
    raw = client.post("/predict", {"inputs": "a film", "raw_scores": True}).json()
    logits = numbers("a film", 3)
    assert [one["score"] for one in raw] == pytest.approx(sorted(logits.tolist(), reverse=True))
    assert [one["label"] for one in raw] == [LABELS["text-classification"][i] for i in np.argsort(-logits)]
    assert [one["label"] for one in scores] == [one["label"] for one in raw]
    assert sum(one["score"] for one in scores) == pytest.approx(1)


@pytest.mark.parametrize(
    ("inputs", "asked", "single"),
    [
        ("a", [("a", None)], True),
        (["a"], [("a", None)], True),
        (["a", "b"], [("a", "b")], True),
        ([["a"]], [("a", None)], False),
        ([["a"], ["b", "c"]], [("a", None), ("b", "c")], False),
    ],
)
def test_texts_pairs_and_batches_are_told_apart_as_tei_does(models, client, inputs, asked, single) -> None:
    answer = client.post("/predict", {"inputs": inputs}).json()
    assert [(e.text, e.text_pair) for e in models.models["films"].asked[-1][0]] == asked
    assert isinstance(answer[0], dict) is single
    assert single or len(answer) == len(asked)


@pytest.mark.parametrize("inputs", [["a", "b", "c"], [["a", "b", "c"]], [[]]])
def test_three_texts_are_no_pair(client: Client, inputs) -> None:
    answer = client.post("/predict", {"inputs": inputs})
    assert answer.status_code == 422
    assert "write a batch as" in answer.json()["error"]


def test_entities_have_the_characters_of_the_text(client: Client) -> None:
    text = "  Today Ada (of Paris), lives."
    groups = client.post("/predict", {"inputs": text, "model": "names"}).json()
    assert [(g["entity_group"], g["word"]) for g in groups] == [("LOC", "Today"), ("PER", "Ada"), ("LOC", "Paris")]
    assert all(text[g["start"] : g["end"]] == g["word"] for g in groups)
    assert set(groups[0]) == {"entity_group", "score", "word", "start", "end"}
    batch = client.post("/predict", {"inputs": [text, "none"], "model": "names"}).json()
    assert batch == [groups, []]


def test_entities_of_several_words_are_one_group(client: Client) -> None:
    (group,) = client.post("/predict", {"inputs": "to New York it is", "model": "names"}).json()
    assert group["word"] == "New York"
    assert group["score"] == pytest.approx((0.75 + 0.5 + 0.5 / 3) / 2)


@pytest.mark.parametrize("mask", ["[MASK]", "<mask>"])
def test_a_mask_is_filled_with_the_best_words(models: FakeModels, client: Client, mask: str) -> None:
    best = client.post("/predict", {"inputs": f"the {mask} sleeps", "model": "masks"}).json()
    assert best[0] == {"score": 0.5, "token": 0, "token_str": "fox", "sequence": "the fox sleeps"}
    assert len(best) == 3
    assert models.models["masks"].asked[-1][0][0].text == "the [MASK] sleeps"
    several = client.post("/predict", {"inputs": f"the {mask} and {mask}", "model": "masks"}).json()
    assert [one[1]["sequence"] for one in several] == [f"the dog and {mask}", f"the {mask} and dog"]


def test_a_text_without_a_mask_is_refused_not_masked_at_random(models: FakeModels, client: Client) -> None:
    answer = client.post("/predict", {"inputs": ["the [MASK]", "no mask"], "model": "masks"})
    assert answer.status_code == 422
    assert answer.json()["error"] == "inputs.1: there is no [MASK] in the text"
    assert not models.models["masks"].asked


def test_an_answer_has_a_share_as_its_score(client: Client) -> None:
    asked = {"question": "who?", "context": "Ada did."}
    answer = client.post("/predict", {"inputs": asked}).json()
    assert answer == {"answer": "Ada ", "score": pytest.approx(1 / (1 + np.exp(-1))), "start": 0, "end": 4}
    assert client.post("/predict", {"inputs": [asked, asked]}).json() == [answer, answer]
    assert client.post("/predict", {"inputs": "a text", "model": "squad"}).status_code == 422
    assert client.post("/predict", {"inputs": asked, "model": "films"}).status_code == 400


def test_rerank_orders_by_score_and_keeps_the_places(client: Client) -> None:
    body = {"query": "q", "texts": ["a", "b", "c"]}
    ranks = client.post("/rerank", body).json()
    assert sorted(r["index"] for r in ranks) == [0, 1, 2]
    assert [r["score"] for r in ranks] == sorted((r["score"] for r in ranks), reverse=True)
    assert all(0 < r["score"] < 1 and "text" not in r for r in ranks)
    raw = client.post("/rerank", body | {"raw_scores": True, "return_text": True}).json()
    assert [r["index"] for r in raw] == [r["index"] for r in ranks]
    assert all(r["text"] == body["texts"][r["index"]] for r in raw)
    assert raw[0]["score"] == pytest.approx(float(numbers("q" + raw[0]["text"], 1)[0]))


def test_rerank_needs_a_model_with_one_output(client: Client) -> None:
    answer = client.post("/rerank", {"query": "q", "texts": ["a"], "model": "films"})
    assert answer.status_code == 400
    assert "3 labels" in answer.json()["error"]


def test_similarity_is_the_cosine_of_the_embeddings(client: Client) -> None:
    texts = ["a cat", "a dog", "a cat"]
    body = {"inputs": {"source_sentence": texts[0], "sentences": texts[1:]}}
    vectors = np.array(client.post("/embed", {"inputs": texts}).json())
    answer = client.post("/similarity", body).json()
    assert answer == pytest.approx([vectors[0] @ vectors[1], 1.0], abs=1e-6)


def test_tokenize_gives_places_of_the_text_and_can_leave_special_tokens_out(client: Client) -> None:
    tokens = client.post("/tokenize", {"inputs": "a cat"}).json()[0]
    assert tokens[0] == {"id": 1, "text": "[CLS]", "special": True, "start": None, "stop": None}
    assert tokens[2] == {"id": 6, "text": "cat", "special": False, "start": 2, "stop": 5}
    plain = client.post("/tokenize", {"inputs": ["a cat"], "add_special_tokens": False}).json()[0]
    assert plain == tokens[1:3]


def test_a_token_is_told_as_its_part_of_the_text(models: FakeModels, client: Client) -> None:
    async def tokenise(texts: list[str]) -> list[list[TokenPiece]]:
        return [[TokenPiece(5, "em", False, 0, 2), TokenPiece(6, "##bed", False, 2, 5)]]

    models.models["minilm"].tokenise = tokenise
    assert [token["text"] for token in client.post("/tokenize", {"inputs": "EMbed"}).json()[0]] == ["EM", "bed"]


def test_a_model_is_named_by_the_path_by_the_body_or_is_the_first_that_fits(models, client) -> None:
    for path, body, name in [
        ("/embed", {}, "minilm"),
        ("/embed", {"model": "other"}, "other"),
        ("/models/other/embed", {}, "other"),
        ("/models/other/embed", {"model": "minilm"}, "other"),
    ]:
        models.models[name].asked.clear()
        assert client.post(path, {"inputs": "a"} | body).status_code == 200
        assert len(models.models[name].asked) == 1
    assert client.post("/models/none/embed", {"inputs": "a"}).status_code == 404
    assert client.post("/embed", {"inputs": "a", "model": "films"}).status_code == 400


def test_what_a_request_says_of_truncation_wins_over_the_setting(models: FakeModels, client: Client) -> None:
    asked = models.models["minilm"].asked
    for body, expected in [({}, True), ({"truncate": None}, True), ({"truncate": False}, False)]:
        client.post("/embed", {"inputs": "a"} | body)
        assert asked[-1][2] is expected
    strict = Client(create_app(models, ServeSettings(truncate=False)))
    strict.post("/embed", {"inputs": "a"})
    assert asked[-1][2] is False


def test_headers_tell_tokens_cut_and_where_the_time_went(client: Client) -> None:
    headers = client.post("/embed", {"inputs": ["a b", "w " * 100]}).headers
    assert headers["x-truncated-tokens"] == "38"
    assert headers["x-compute-tokens"] == "68"
    assert [headers[f"x-{name}-time"] for name in ("queue", "tokenization", "inference")] == ["1.00", "2.00", "3.00"]
    assert float(headers["x-total-time"]) > 0


def test_info_tells_the_limits_and_every_model(client: Client) -> None:
    info = client.get("/info").json()
    assert info["model_id"] == "minilm"
    assert info["model_type"] == {"embedding": {"pooling": "mean"}}
    assert info["max_client_batch_size"] == 40
    assert info["auto_truncate"] is True
    assert [model["name"] for model in info["models"]][:3] == ["minilm", "films", "rank"]
    other = client.get("/models/films/info").json()
    assert other["model_type"]["classifier"]["id2label"]["1"] == "positive"
    assert client.get("/models/none/info").status_code == 404


@pytest.mark.parametrize(
    ("methods", "says"), [([], "float32"), (["structured", "int8"], "int8"), (["distil", "int4"], "int4")]
)
def test_info_tells_what_the_weights_are(models: FakeModels, client: Client, methods: list[str], says: str) -> None:
    model = models.models["minilm"]
    steps = [{"verb": "compress", "method": method} for method in methods]
    model.info = dataclasses.replace(model.info, manifest={"steps": [{"verb": "export"}, *steps]})
    assert client.get("/info").json()["model_dtype"] == says


def test_one_model_alone_needs_no_name() -> None:
    client = Client(create_app(FakeModels(FakeModel("only", "fill-mask")), ServeSettings()))
    assert client.post("/predict", {"inputs": "a [MASK]"}).status_code == 200
    refused = client.post("/embed", {"inputs": "a"})
    assert refused.status_code == 400
    assert refused.json()["error_type"] == "Validation"


def test_a_text_without_a_mask_is_not_for_a_model_that_fills_them() -> None:
    models = FakeModels(FakeModel("masks", "fill-mask"), FakeModel("films", "text-classification"))
    client = Client(create_app(models, ServeSettings()))
    assert "label" in client.post("/predict", {"inputs": "a film"}).json()[0]
    assert "token_str" in client.post("/predict", {"inputs": "a [MASK]"}).json()[0]
    alone = Client(create_app(FakeModels(FakeModel("masks", "fill-mask")), ServeSettings()))
    assert "no [MASK]" in alone.post("/predict", {"inputs": "a film"}).json()["error"]


def test_metadata_of_a_similarity_model_is_that_of_an_embedder() -> None:
    client = Client(create_app(FakeModels(FakeModel("sts", "sentence-similarity")), ServeSettings()))
    assert np.shape(client.post("/embed", {"inputs": "a"}).json()) == (1, SIZE)
    assert client.get("/info").json()["model_type"] == {"embedding": {"pooling": "mean"}}


def test_a_mask_that_was_cut_off_is_an_error() -> None:
    found = {"masks": [{"candidates": [{"score": 0.5, "id": 7, "token": "fox"}]}]}
    assert fillings(found, "a [MASK]")[0]["sequence"] == "a fox"
    with pytest.raises(BadInput, match="beyond the tokens"):
        fillings(found, "a [MASK] and a [MASK]")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("我住在北京，他在Paris。", ["我", "住", "在", "北", "京", "，", "他", "在", "Paris", "。"]),
        (
            "Paris/London, Ada,Bob Berlin–Paris",
            ["Paris", "/", "London", ",", "Ada", ",", "Bob", "Berlin", "–", "Paris"],
        ),
        ("Jean-Luc's U.S. visit (AT&T)!", ["Jean-Luc's", "U.S", ".", "visit", "(", "AT&T", ")!"]),
        ("3,000 to 4.5 at rock'n'roll_2", ["3,000", "to", "4.5", "at", "rock'n'roll_2"]),
    ],
)
def test_words_of_text_are_those_that_can_have_a_tag_of_their_own(text: str, words: list[str]) -> None:
    assert list(words_of(text).text) == words


def test_texts_of_any_kind_lose_nothing_but_white_space() -> None:
    for text in ("a..b,,c 9,9 ,9", "東京にいる", "ไทย และ", "x\u3000y z", "'' - ’a’ &b&"):
        assert "".join(words_of(text).text) == "".join(text.split())
