"""What the training losses are given: labels, first tokens of words, answer spans in windows, scaled scores."""

from __future__ import annotations

import itertools
import json
import lzma
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from effllm.errors import SettingError
from effllm.runtime.tokenizer import Encoding, TextTokenizer
from effllm.tasks import TASKS, Example, Head
from effllm.tasks.question_answering import Reference, answer_characters, answer_tokens, best_spans, read_references

SHARED = Path(__file__).parents[3] / "shared" / "data"
CORPUS = "ada lovelace moved to london in 1840 and wrote about the analytical engine ’s numbers 北京 in notes".split()


def tokenizer(kind: str, max_length: int = 64) -> TextTokenizer:
    """Return a small tokenizer of a family: BERT's word pieces, byte-level BPE with a space before the first word (as
    RoBERTa's for words) or without (as ModernBERT's), or T5's unigrams."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    if kind == "wordpiece":
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer()
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=80, special_tokens=special)
    elif kind.startswith("bpe"):
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "bpe")
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet)
    else:
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="[UNK]")
    backend.train_from_iterator(CORPUS, trainer)
    ids = [(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    return TextTokenizer(backend, max_length, "[MASK]", 0)


KINDS = ("wordpiece", "bpe", "bpe without prefix", "unigram")


def test_classes_are_indices_and_regressions_numbers() -> None:
    task, encoding = TASKS["text-classification"], tokenizer("wordpiece").encode("ada")
    head = Head(("negative", "positive"))
    example = task.parse({"text": "ada", "label": "positive"}, head, gold=True)
    assert task.targets(example, [encoding], head) == [{"labels": 1}]
    one = Head(("score",))
    example = task.parse({"text": "ada", "label": "2.5"}, one, gold=True)
    assert task.targets(example, [encoding], one) == [{"labels": 2.5}]


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_token_of_a_word_carries_its_label(kind: str) -> None:
    task, head = TASKS["token-classification"], Head(("O", "B-PER", "I-PER", "B-LOC"))
    words = ["ada", "lovelace", "moved", "to", "londonderry", ",", "notes", "北京"]
    tags = ["B-PER", "I-PER", "O", "O", "B-LOC", "O", "O", "B-LOC"]
    example = task.parse({"tokens": words, "tags": tags}, head, gold=True)
    encoding = task.encode(tokenizer(kind), example)[0]
    (target,) = task.targets(example, [encoding], head)
    labels = target["labels"]
    assert labels.dtype == np.int64
    assert len(labels) == len(encoding)
    assert any(len(list(group)) > 1 for word, group in itertools.groupby(encoding.word_ids) if word is not None)
    for word, tag in enumerate(tags):
        places = [i for i, w in enumerate(encoding.word_ids) if w == word]
        assert [labels[i] for i in places] == [head.labels.index(tag)] + [-100] * (len(places) - 1)
    assert all(labels[i] == -100 for i, special in enumerate(encoding.special) if special)


def test_labels_and_answers_use_the_same_tokens() -> None:
    """A model that says exactly what it was taught is scored as perfect."""
    task, head = TASKS["token-classification"], Head(("O", "B-PER", "I-PER", "B-LOC"))
    example = Example(("ada", "lovelace", "londonderry"), gold=("B-PER", "I-PER", "B-LOC"))
    encoding = task.encode(tokenizer("wordpiece"), example)[0]
    labels = task.targets(example, [encoding], head)[0]["labels"]
    logits = np.eye(4, dtype=np.float32)[np.where(labels < 0, 2, labels)]
    answer = task.decode(example, [encoding], [{"logits": logits}], head)
    assert answer["tags"] == list(example.gold)


def test_words_that_were_cut_off_have_no_label() -> None:
    task, head = TASKS["token-classification"], Head(("O", "B-PER"))
    example = Example(("ada",) * 20, gold=("B-PER",) * 20)
    encoding = task.encode(tokenizer("wordpiece", max_length=10), example)[0]
    labels = task.targets(example, [encoding], head)[0]["labels"]
    assert len(labels) == 10
    assert (labels == 1).sum() == len({w for w in encoding.word_ids if w is not None})


def test_scores_are_scaled_by_the_range_of_the_head() -> None:
    task = TASKS["sentence-similarity"]
    head = Head(score_range=(1.0, 5.0))
    example = task.parse({"text": "ada", "text_pair": "london", "score": 4}, head, gold=True)
    encodings = task.encode(tokenizer("wordpiece"), example)
    assert task.targets(example, encodings, head) == [{"score": 0.75}, {"score": 0.75}]


def test_tasks_that_are_not_fine_tuned_say_so() -> None:
    with pytest.raises(NotImplementedError, match="fill-mask is not fine-tuned"):
        TASKS["fill-mask"].targets(Example("x"), [], Head())


PASSAGE = "Ada Lovelace moved to London in 1840 and wrote about the analytical engine ’s numbers in notes ."


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_the_answer_is_found_in_each_window_that_holds_it(kind: str, data: st.DataObject) -> None:
    """Against the definition, character by character: the fewest tokens that cover the answer, or none."""
    text = tokenizer(kind, max_length=data.draw(st.integers(24, 200)))
    start = data.draw(st.integers(0, len(PASSAGE) - 1))
    end = data.draw(st.integers(start + 1, min(len(PASSAGE), start + 25)))
    answer = PASSAGE[start:end]
    if not answer.strip():
        return
    task = TASKS["question-answering"]
    example = Example("where did ada move", PASSAGE, gold=(Reference(answer, start),))
    encodings = task.encode(text, example)
    targets = task.targets(example, encodings, Head())
    assert len(targets) == len(encodings)
    wanted = {c for c in range(start, end) if not PASSAGE[c].isspace()}
    for encoding, target in zip(encodings, targets, strict=True):
        passage = [i for i, part in enumerate(encoding.sequence_ids) if part == 1]
        covered = {c for i in passage for c in range(*encoding.offsets[i])}
        if not wanted <= covered:
            assert target == {"start": 0, "end": 0}
            continue
        span = range(target["start"], target["end"] + 1)
        assert set(span) <= set(passage)
        assert wanted <= {c for i in span for c in range(*encoding.offsets[i])}
        for i in (span[0], span[-1]):  # no token too many
            assert wanted & set(range(*encoding.offsets[i]))


def test_a_window_without_the_whole_answer_points_at_cls() -> None:
    text = tokenizer("wordpiece", max_length=24)
    task = TASKS["question-answering"]
    example = Example("where", PASSAGE, gold=(Reference("London", None),))
    encodings = task.encode(text, example)
    targets = task.targets(example, encodings, Head())
    assert len(encodings) >= 3
    assert targets[-1] == {"start": 0, "end": 0}
    first = targets[0]
    assert encodings[0].offsets[first["start"]][0] == PASSAGE.index("London")
    assert encodings[0].offsets[first["end"]][1] == PASSAGE.index("London") + 6


def test_a_model_that_learnt_its_targets_answers_the_answer() -> None:
    text = tokenizer("bpe", max_length=40)
    task = TASKS["question-answering"]
    example = Example("when", PASSAGE, gold=(Reference("1840", PASSAGE.index("1840")),))
    encodings = task.encode(text, example)
    outputs = []
    for encoding, target in zip(encodings, task.targets(example, encodings, Head()), strict=True):
        logits = {name: np.full(len(encoding), -5.0, dtype=np.float32) for name in ("start", "end")}
        for name, values in logits.items():
            values[target[name]] = 5.0
        outputs.append({f"{name}_logits": values for name, values in logits.items()})
    answer = task.decode(example, encodings, outputs, Head())
    assert answer["answer"] == "1840"
    assert answer["n_best"][0] == {key: answer[key] for key in ("answer", "score", "start", "end")}
    assert answer["score"] == 10.0


def test_answers_are_where_the_record_says_or_where_they_first_occur() -> None:
    assert answer_characters("ab ab", Reference("ab", 3)) == (3, 5)
    assert answer_characters("ab ab", Reference("ab", None)) == (0, 2)
    assert answer_characters("x  ab", Reference(" ab ", 2)) == (3, 5)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (Reference("ab", 2), "the answer 'ab' is not at character 2 of the passage 'ab ab'"),
        (Reference("zz", None), "the answer 'zz' is not in the passage"),
        (Reference(" ", 2), "the answer ' ' is not at character 2"),
        (Reference("ab", 400), "not at character 400"),
    ],
)
def test_an_answer_that_is_elsewhere_is_refused(reference: Reference, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        answer_characters("ab ab", reference)


@pytest.mark.parametrize(
    "answers",
    [
        ["Paris"],
        [{"text": "Paris"}],
        {"text": ["Paris"]},
    ],
)
def test_answers_without_places_are_read(answers: object) -> None:
    assert read_references(answers) == (Reference("Paris", None),)


@pytest.mark.parametrize("answers", [[{"text": "Paris", "answer_start": 7}], {"text": ["Paris"], "answer_start": [7]}])
def test_answers_with_places_are_read(answers: object) -> None:
    assert read_references(answers) == (Reference("Paris", 7),)


@pytest.mark.parametrize(
    "answers",
    [None, [], {}, "Paris", [3], {"text": "Paris"}, [{"answer_start": 3}], [{"text": "a", "answer_start": -1}]],
)
def test_answers_that_are_none_are_refused(answers: object) -> None:
    with pytest.raises(SettingError, match="column 'answers'"):
        read_references(answers)


def windows(offsets: list[list[tuple[int, int]]]) -> list[Encoding]:
    """Return encodings of a [CLS] and passage tokens with these offsets."""
    text = tokenizer("wordpiece")
    return [
        Encoding(
            ids=[2] + [5] * len(own),
            type_ids=[0] * (len(own) + 1),
            special=[True] + [False] * len(own),
            word_ids=[None, *range(len(own))],
            sequence_ids=[None] + [1] * len(own),
            offsets=[(0, 0), *own],
            tokenizer=text,
        )
        for own in offsets
    ]


@pytest.mark.parametrize("seed", range(20))
def test_the_n_best_list_is_that_of_all_spans_of_all_windows(seed: int) -> None:
    """Against every span of every window, scored one by one; overlaps count once, with their best score."""
    rng = np.random.default_rng(seed)
    own = [[(2 * i, 2 * i + 1) for i in range(a, a + 8)] for a in (0, 4, 8)]
    encodings = windows(own)
    outputs = [
        {name: rng.normal(size=9).astype(np.float32) for name in ("start_logits", "end_logits")} for _ in encodings
    ]
    passage = "abcdefghijklmnopqrstuvwxyz0123456789"
    task = TASKS["question-answering"]
    answer = task.decode(Example("q", passage), encodings, outputs, Head())
    scores: dict[tuple[int, int], float] = {}
    for encoding, output in zip(encodings, outputs, strict=True):
        for first in range(1, 9):
            for last in range(first, 9):
                span = (encoding.offsets[first][0], encoding.offsets[last][1])
                score = float(output["start_logits"][first] + output["end_logits"][last])
                scores[span] = max(score, scores.get(span, -np.inf))
    ranked = sorted(scores.items(), key=lambda item: -item[1])[:5]
    assert [(a["start"], a["end"], a["score"]) for a in answer["n_best"]] == [(*span, s) for span, s in ranked]
    assert [a["answer"] for a in answer["n_best"]] == [passage[s:e] for (s, e), _ in ranked]


def test_an_empty_passage_has_no_answers() -> None:
    encodings = windows([[]])
    zeros = {name: np.zeros(1, dtype=np.float32) for name in ("start_logits", "end_logits")}
    answer = TASKS["question-answering"].decode(Example("q", ""), encodings, [zeros], Head())
    assert answer == {"answer": "", "score": 0.0, "start": 0, "end": 0, "n_best": []}


def test_spans_are_at_most_thirty_tokens_and_never_backwards() -> None:
    start, end = np.zeros(50), np.zeros(50)
    start[40], end[5], start[2], end[45] = 9, 9, 3, 3
    spans = best_spans(start, end, range(50))
    assert all(s <= e < s + 30 for _, s, e in spans)
    assert spans[0][0] == 12.0
    backwards_only = best_spans(np.arange(100.0), -np.arange(100.0), range(100))
    assert backwards_only == [(0.0, 99, 99)]


def test_tokens_of_an_answer_outside_the_window_are_none() -> None:
    (encoding,) = windows([[(4, 6), (6, 9)]])
    assert answer_tokens(encoding, 5, 7) == (1, 2)
    assert answer_tokens(encoding, 3, 5) is None
    assert answer_tokens(encoding, 7, 10) is None


def test_every_answer_of_squad_is_where_it_says() -> None:
    file = SHARED / "squad11" / "train.jsonl.xz"
    if not file.is_file():
        pytest.skip(f"no {file}: development data, not in the repository")
    task = TASKS["question-answering"]
    with lzma.open(file, "rt", encoding="utf-8") as stream:
        for line in stream:
            example = task.parse(json.loads(line), Head(), gold=True)
            start, end = answer_characters(example.text_pair, example.gold[0])
            assert example.text_pair[start:end] == example.gold[0].text.strip()
