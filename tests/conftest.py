"""Models made on the spot: every supported architecture, a few thousand parameters, with a tokenizer trained here."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # test processes side by side share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if not Path("/dev/nvidia0").exists():  # before anything imports triton, which reads it then
    os.environ.setdefault("TRITON_INTERPRET", "1")

WORDS = (
    "the quick brown fox jumps over a lazy dog and then it sleeps under an old tree near river bank while birds sing "
    "good bad movie film actor plot ending great awful paris london berlin ada lives moved works in city where does she"
).split()
ARCHITECTURES = ("bert", "roberta", "distilbert", "electra", "xlm-roberta", "modernbert")
# The same examples in every run, so that a change is what turns a run red; `--hypothesis-profile=default` explores.
hypothesis.settings.register_profile("reproducible", derandomize=True)
hypothesis.settings.load_profile("reproducible")

THREADS = int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0))))


@pytest.fixture(autouse=True)
def _torch_threads() -> Iterator[None]:
    """Take back how many threads a test let torch have, as the last bits of a training depend on it."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(THREADS)


HEADS = {
    "feature-extraction": "AutoModel",
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
}
LABELS = {
    "text-classification": ["negative", "positive", "neutral"],
    "token-classification": ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"],
}


def make_config(architecture: str, vocabulary: int, labels: list[str] | None):
    import transformers

    shared = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": vocabulary}
    if labels:
        shared |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    if architecture == "distilbert":
        shared |= {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64}
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
            shared.pop(name)
        return transformers.DistilBertConfig(**shared, pad_token_id=0)
    shared["intermediate_size"] = 64
    if architecture == "modernbert":
        special = {"cls_token_id": 2, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
        return transformers.ModernBertConfig(
            **shared, **special, max_position_embeddings=64, local_attention=16, global_attn_every_n_layers=2
        )
    if architecture in {"roberta", "xlm-roberta"}:
        kind = transformers.RobertaConfig if architecture == "roberta" else transformers.XLMRobertaConfig
        special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
        return kind(**shared, **special, max_position_embeddings=66, type_vocab_size=1)
    kind = {"bert": transformers.BertConfig, "electra": transformers.ElectraConfig}[architecture]
    return kind(**shared, max_position_embeddings=64, pad_token_id=0)


def make_tokenizer(architecture: str):
    """Train a word-piece tokenizer whose special tokens are those of the architecture's family."""
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if architecture in {"roberta", "xlm-roberta"}:
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        first, last, pad, unknown, mask = "<s>", "</s>", "<pad>", "<unk>", "<mask>"
    else:
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        first, last, pad, unknown, mask = "[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token=unknown))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.train_from_iterator(WORDS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special))
    ids = [(token, backend.token_to_id(token)) for token in (first, last)]
    pair = f"{first} $A {last} $B:1 {last}:1" if first == "[CLS]" else f"{first} $A {last} {last} $B {last}"
    backend.post_processor = processors.TemplateProcessing(single=f"{first} $A {last}", pair=pair, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        cls_token=first,
        sep_token=last,
        pad_token=pad,
        unk_token=unknown,
        mask_token=mask,
        model_max_length=64,
    )


def make_model(folder: Path, architecture: str = "bert", task: str = "text-classification") -> Path:
    """Save a small random model, its weights large enough that its answers differ from text to text."""
    import torch
    import transformers

    torch.manual_seed(0)
    tokenizer = make_tokenizer(architecture)
    config = make_config(architecture, len(tokenizer), LABELS.get(task))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, HEADS[task]).from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 2:
                    parameter.normal_(0, 0.15)
                elif "bias" in name:
                    parameter.normal_(0, 0.05)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT text classifier."""
    return make_model(tmp_path_factory.mktemp("models") / "classifier")


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small BERT exported for each task, by the task's name. Exporting takes seconds: nobody may change these."""
    import effllm

    root = tmp_path_factory.mktemp("exported")
    for task in HEADS:
        effllm.export(make_model(root / "models" / task, "bert", task), root / task, task=task)
    return {task: root / task for task in HEADS}


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The packaged all-MiniLM-L6-v2."""
    from effllm.data.packaged import minilm

    return minilm()


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small token store, as `prepare` writes them."""
    from stores import write_store

    return write_store(tmp_path_factory.mktemp("tokens") / "store")


@pytest.fixture
def device() -> str:
    """Where the kernels run: a GPU, or the CPU in Triton's interpreter."""
    pytest.importorskip("triton")
    from interpreted import DEVICE

    return DEVICE
