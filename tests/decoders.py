"""Small decoders made on the spot, with a byte-level BPE trained here, and texts whose next word can be learnt."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import transformers
from conftest import WORDS

from effllm.data.tokenizer_training import save_tokenizer, train_tokenizer

LENGTH = 32
TEXTS = [" ".join(WORDS[(i * 5 + j * (1 + i % 3)) % len(WORDS)] for j in range(3 + i % 40)) for i in range(120)]
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


@functools.cache
def tokenizer() -> Any:
    return train_tokenizer("bpe", 300, lambda: TEXTS, lowercase=False)


def make_decoder(folder: Path, kind: str = "Llama", *, trained: bool = False, **settings: Any) -> Path:
    """Save a decoder, random or trained for a second, that takes 32 tokens."""
    folder.mkdir(parents=True)
    save_tokenizer(tokenizer(), folder / "tokenizer", LENGTH)
    for file in (folder / "tokenizer").iterdir():
        file.rename(folder / file.name)
    (folder / "tokenizer").rmdir()
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=300, max_position_embeddings=LENGTH, **SIZES, **ids, **({"num_key_value_heads": 2} | settings)
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.08)
    if trained:
        _train(model)
    model.save_pretrained(folder)
    return folder


def _train(model: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    rows = [tokenizer().backend.encode(text).ids for text in TEXTS[:40]]
    for step in range(80):
        ids = torch.tensor([row[:LENGTH] for row in rows if len(row) >= LENGTH][step % 2 :: 2])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
