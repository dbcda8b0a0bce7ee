"""Models that keep their own attention, whatever name they are loaded with, still get the mask that it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_model, make_tokenizer
from runs import settings
from test_finetune import classified, run, write_jsonl

from effllm.data.vocabulary import Vocabulary
from effllm.errors import Unsupported
from effllm.folder import open_folder
from effllm.tasks import TASKS, Head
from effllm.train.heads import load_for_task
from effllm.train.models import build_model
from effllm.train.pretrain import pretrain

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
CONFIGS = {"mpnet": transformers.MPNetConfig, "megatron-bert": transformers.MegatronBertConfig}


@pytest.fixture(params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A small model of a kind whose attention is its own, with a tokenizer."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer("bert")
    config = CONFIGS[request.param](**SMALL, vocab_size=len(tokenizer), max_position_embeddings=64)
    model = transformers.AutoModel.from_config(config)
    for parameter in model.parameters():
        parameter.data *= 3
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_padding_is_not_attended_to(folder: Path) -> None:
    model = load_for_task(open_folder(folder), TASKS["sentence-similarity"], Head(), dropout=0.0, seed=0).eval()
    ids = torch.randint(5, 50, (1, 6), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([ids, torch.ones(1, 5, dtype=torch.int64)], dim=1)
    with torch.no_grad():
        alone = model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
        together = model(input_ids=padded, attention_mask=(torch.arange(11) < 6).long()[None])[0][:, :6]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_it_is_fine_tuned_but_shows_no_relations(folder: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", classified())
    run(folder, tmp_path / "out", "text-classification", file)
    with pytest.raises(Unsupported, match="does not show its attention"):
        run(
            folder, tmp_path / "taught", "text-classification", file, teacher=tmp_path / "out",
            settings={"distil_attention": 1.0},
        )  # fmt: skip


def test_it_is_not_pre_trained_on_packed_rows(tokens: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="cannot be kept within packed sequences"):
        list(pretrain(tokens, tmp_path / "out", settings(model=str(folder / "config.json"))))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("mobilebert", {"embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32}),
        ("esm", {"token_dropout": True, "mask_token_id": 4, "position_embedding_type": "absolute"}),
        ("fnet", {}),
    ],
)
def test_a_model_that_mixes_packed_sequences_is_not_pre_trained(
    tokens: Path, tmp_path: Path, kind: str, more: dict
) -> None:
    size = Vocabulary.read(tokens / "tokenizer").size
    config = transformers.AutoConfig.for_model(kind, **SMALL, **more, vocab_size=size, max_position_embeddings=64)
    config.save_pretrained(tmp_path / "model")
    with pytest.raises(Unsupported, match="packed sequences"):
        list(pretrain(tokens, tmp_path / "out", settings(model=str(tmp_path / "model"))))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert", "electra", "camembert", "xlm-roberta", "esm"])
def test_a_model_that_keeps_packed_sequences_apart_is_pre_trained(tokens: Path, tmp_path: Path, kind: str) -> None:
    vocabulary = Vocabulary.read(tokens / "tokenizer")
    more = {"embedding_size": 32} if kind == "electra" else {}
    more |= {"token_dropout": False, "mask_token_id": vocabulary.mask_id} if kind == "esm" else {}
    config = transformers.AutoConfig.for_model(
        kind, **SMALL, **more, vocab_size=vocabulary.size, max_position_embeddings=64, pad_token_id=vocabulary.pad_id
    )
    config.save_pretrained(tmp_path / "model")
    build_model(str(tmp_path / "model"), vocabulary, 32, "mlm", 0)


def test_the_others_take_what_is_named(tmp_path: Path) -> None:
    model = load_for_task(
        open_folder(make_model(tmp_path / "bert")), TASKS["text-classification"], Head(("a", "b")), dropout=0.0, seed=0
    )
    assert model.config._attn_implementation == "effllm_capturing"
