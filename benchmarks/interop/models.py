"""Small random-weight models, made on the spot, one for each task and tokenizer family that other tools must load.

The tokenizers are trained here and saved as transformers 5 saves them, because that is what users bring. Several have
settings that differ from what transformers 4 assumes when a folder is silent: a cased vocabulary, a byte-level
tokenizer that adds a leading space, extra special tokens, a mask token that takes the space before it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, Unigram, WordPiece

from effllm.data.english import english_sentences

VOCABULARY = 600
TOKENS = 64
"""The length limit of the small models, special tokens included."""
BERT_SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA_SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    # With the usual 0.02 all texts get nearly the same logits, and a wrong token would hide below the tolerance.
    "initializer_range": 0.2,
}


@dataclass(frozen=True)
class SmallModel:
    """A model to make: `head` is the ending of its transformers class, `task` the pipeline that it serves."""

    name: str
    task: str
    family: str
    head: str
    tokenizer: Callable[[Sequence[str]], Any]

    def write(self, folder: Path, texts: Sequence[str]) -> None:
        """Write the model and its tokenizer, trained on English and `texts`, into `folder`."""
        tokenizer = self.tokenizer([*english_sentences(), *(text for text in texts for _ in range(20))])
        offset = 2 if self.family in {"Roberta", "XLMRoberta"} else 0
        shape: dict[str, Any] = dict(SHAPE)
        if self.family == "DistilBert":
            shape = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "initializer_range": 0.2}
        if self.family == "ModernBert":
            # Windows shorter than the texts, so that local attention matters.
            shape |= {"local_attention": 16, "global_attn_every_n_layers": 2, "initializer_cutoff_factor": 3.0}
        if "QuestionAnswering" not in self.head and "MaskedLM" not in self.head:
            shape["id2label"] = {0: "negative", 1: "neutral", 2: "positive"}
            shape["label2id"] = {"negative": 0, "neutral": 1, "positive": 2}
        config = getattr(transformers, f"{self.family}Config")(
            vocab_size=len(tokenizer),
            max_position_embeddings=TOKENS + offset,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            cls_token_id=tokenizer.cls_token_id,
            sep_token_id=tokenizer.sep_token_id,
            **shape,
        )
        torch.manual_seed(0)
        model = getattr(transformers, f"{self.family}{self.head}")(config).eval()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def bert_uncased(corpus: Sequence[str]) -> Any:
    """Return a lower-casing WordPiece tokenizer under BERT's own class."""
    backend = _wordpiece(corpus, lowercase=True)
    return transformers.BertTokenizer(vocab=backend.get_vocab(), model_max_length=TOKENS)


def bert_cased(corpus: Sequence[str]) -> Any:
    """Return a cased WordPiece tokenizer with an extra special token, under the generic class."""
    tokenizer = _generic(_wordpiece(corpus, lowercase=False), "[MASK]")
    tokenizer.add_special_tokens({"extra_special_tokens": ["[ENTITY]"]})
    return tokenizer


def bert_bytes(corpus: Sequence[str]) -> Any:
    """Return a byte-level BPE tokenizer with BERT's special tokens, under the generic class: it has no normalizer."""
    return _generic(_byte_level(corpus, BERT_SPECIALS, prefix_space=True), "[MASK]")


def roberta(corpus: Sequence[str]) -> Any:
    """Return a byte-level BPE tokenizer under RoBERTa's own class; `<mask>` takes the space before it."""
    trained = json.loads(_byte_level(corpus, ROBERTA_SPECIALS, prefix_space=False).to_str())["model"]
    return transformers.RobertaTokenizer(
        vocab=trained["vocab"],
        merges=[tuple(merge) for merge in trained["merges"]],
        mask_token=AddedToken("<mask>", lstrip=True, special=True),
        model_max_length=TOKENS,
    )


def xlm_roberta(corpus: Sequence[str]) -> Any:
    """Return a unigram tokenizer under XLM-RoBERTa's own class."""
    backend = Tokenizer(Unigram())
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    backend.train_from_iterator(
        corpus, trainers.UnigramTrainer(vocab_size=VOCABULARY, special_tokens=specials, unk_token="<unk>")
    )
    trained = json.loads(backend.to_str())["model"]["vocab"]
    return transformers.XLMRobertaTokenizer(
        vocab=[(token, score) for token, score in trained] + [("<mask>", 0.0)],
        mask_token=AddedToken("<mask>", lstrip=True, special=True),
        model_max_length=TOKENS,
    )


def modernbert(corpus: Sequence[str]) -> Any:
    """Return a byte-level BPE tokenizer with BERT's special tokens under the generic class, as ModernBERT has."""
    backend = _byte_level(corpus, BERT_SPECIALS, prefix_space=False)
    return _generic(backend, AddedToken("[MASK]", lstrip=True, special=True))


def _wordpiece(corpus: Sequence[str], *, lowercase: bool) -> Tokenizer:
    backend = Tokenizer(WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(
        corpus, trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=BERT_SPECIALS, show_progress=False)
    )
    return backend


def _byte_level(corpus: Sequence[str], specials: Sequence[str], *, prefix_space: bool) -> Tokenizer:
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    return backend


def _generic(backend: Tokenizer, mask: AddedToken | str) -> Any:
    """Wrap a tokenizer in the class that transformers uses for a trained one, with BERT's template."""
    cls, sep = (backend.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", cls), ("[SEP]", sep)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=TOKENS,
        unk_token="[UNK]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        mask_token=mask,
    )


SMALL_MODELS = (
    SmallModel("bert-classifier", "text-classification", "Bert", "ForSequenceClassification", bert_uncased),
    SmallModel("bert-cased-tagger", "token-classification", "Bert", "ForTokenClassification", bert_cased),
    SmallModel("bert-answerer", "question-answering", "Bert", "ForQuestionAnswering", bert_uncased),
    SmallModel("bert-masked", "fill-mask", "Bert", "ForMaskedLM", bert_cased),
    SmallModel("bert-bytes-classifier", "text-classification", "Bert", "ForSequenceClassification", bert_bytes),
    SmallModel("distilbert-classifier", "text-classification", "DistilBert", "ForSequenceClassification", bert_uncased),
    SmallModel("electra-classifier", "text-classification", "Electra", "ForSequenceClassification", bert_cased),
    SmallModel("roberta-classifier", "text-classification", "Roberta", "ForSequenceClassification", roberta),
    SmallModel("xlm-roberta-masked", "fill-mask", "XLMRoberta", "ForMaskedLM", xlm_roberta),
    SmallModel("modernbert-classifier", "text-classification", "ModernBert", "ForSequenceClassification", modernbert),
)
