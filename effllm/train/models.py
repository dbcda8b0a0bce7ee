"""The model that a pre-training run starts from: a preset, a transformers configuration, or a trained folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from effllm.data.vocabulary import Vocabulary
from effllm.errors import ArtifactError, SettingError, Unsupported, first_line, unknown_name
from effllm.folder import ModelFolder, find, open_folder
from effllm.hf import quiet, takes_attention
from effllm.train.attention import NAME, register, sequence_index
from effllm.train.objectives import check_objective, position_offset
from effllm.variant import check_whole

SHAPES = {"tiny": (2, 128), "mini": (4, 256), "small": (4, 512), "medium": (8, 512), "base": (12, 768)}
"""Size -> (layers, width), after Turc et al. 2019, table 1; heads of 64."""
PRESETS = (*SHAPES, *(f"modern-{size}" for size in SHAPES))
"""What `--model` takes besides folders: a BERT of that size, or a ModernBERT of the same layers and width."""


def build_model(name: str, vocabulary: Vocabulary, max_length: int, objective: str, seed: int) -> Any:
    """Return a masked-LM with packed attention, ready to train.

    `name` is a preset, a folder or file with a `config.json` (random weights), or a folder or hub id with weights
    (training goes on from them). Raises SettingError when the model's vocabulary or length does not fit, ArtifactError
    or Unsupported when the folder cannot be read.
    """
    register()
    torch.manual_seed(seed)
    auto = transformers.AutoModelForMaskedLM if objective == "mlm" else transformers.AutoModelForPreTraining
    with quiet():
        if name in PRESETS:
            config = preset_config(name, vocabulary, max_length)
            check_objective(objective, config.model_type)
            model = auto.from_config(config, attn_implementation=NAME)
        else:
            folder = _located(name)
            check_objective(objective, str(folder.config.get("model_type", "")))
            model = _from_folder(folder, auto, vocabulary)
    if not takes_attention(model):
        raise Unsupported(
            f"{name} is a {model.config.model_type} model, whose attention cannot be kept within packed sequences; "
            "models with transformers' attention interface can be pre-trained, such as BERT, RoBERTa and ModernBERT"
        )
    if name not in PRESETS and folder.has_weights:
        _check_tokenizer(folder.path, vocabulary)
    _check_fit(name, model, vocabulary, max_length)
    if not _keeps_apart(model, vocabulary):
        raise Unsupported(
            f"{name} is a {model.config.model_type} model, which mixes packed sequences outside of its attention; "
            "BERT, RoBERTa and ModernBERT, among others, do not"
        )
    return model


def preset_config(name: str, vocabulary: Vocabulary, max_length: int) -> transformers.PretrainedConfig:
    """Return a preset's configuration.

    Dropout is off: a pre-training run sees each token a few times at most. The ModernBERT presets attend over the whole
    sequence in every layer, their gated FFN is as large as the BERT's, and their classifiers pool by the mean, since
    masked-LM training alone gives the first token nothing to say.
    """
    layers, width = SHAPES[name.removeprefix("modern-")]
    shared = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": max(1, width // 64),
        "vocab_size": vocabulary.size,
        "max_position_embeddings": max(512, max_length),
        "pad_token_id": vocabulary.pad_id,
    }
    if name.startswith("modern-"):
        ends = {"cls_token_id": vocabulary.cls_id, "sep_token_id": vocabulary.sep_id}
        ends |= {"bos_token_id": vocabulary.cls_id, "eos_token_id": vocabulary.sep_id}
        gated = 8 * width // 3 // 64 * 64
        return transformers.ModernBertConfig(
            **shared, **ends, intermediate_size=gated, global_attn_every_n_layers=1, classifier_pooling="mean"
        )
    return transformers.BertConfig(
        **shared, intermediate_size=4 * width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )


def _located(name: str) -> ModelFolder:
    path = Path(name)
    if path.is_file():
        path = path.parent
    elif not path.exists() and "/" not in name:
        raise unknown_name("model", name, PRESETS)
    return open_folder(find(path), weights=False)


def _from_folder(folder: ModelFolder, auto: Any, vocabulary: Vocabulary) -> Any:
    try:
        if folder.has_weights:
            open_folder(folder.path)
            check_whole(folder.path)
            return auto.from_pretrained(
                folder.path,
                attn_implementation=NAME,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
            )
        config = transformers.AutoConfig.from_pretrained(folder.path, trust_remote_code=False)
        config.pad_token_id = vocabulary.pad_id  # its row gets no gradient
        return auto.from_config(config, attn_implementation=NAME)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{folder.path} is not a masked-LM that transformers can build: {first_line(error)}"
        ) from error


def _check_tokenizer(folder: Path, vocabulary: Vocabulary) -> None:
    """Raise SettingError where trained weights have another tokenizer than the data: its ids would mean other words."""
    if not (folder / "tokenizer.json").is_file():
        return
    own = Vocabulary.read(folder)
    if own.digest != vocabulary.digest or own.pad_id != vocabulary.pad_id:
        raise SettingError(f"model {folder} has another tokenizer than the data; prepare the data with the model's")


def _check_fit(name: str, model: Any, vocabulary: Vocabulary, max_length: int) -> None:
    rows = int(model.config.vocab_size)
    if rows < vocabulary.size:
        raise SettingError(
            f"model {name} has {rows} rows of embeddings, the tokenizer of the data has {vocabulary.size} tokens; "
            "prepare the data with the model's tokenizer or set vocab_size"
        )
    places = getattr(model.config, "max_position_embeddings", None)
    if isinstance(places, int) and places - position_offset(model) < max_length:
        raise SettingError(f"model {name} takes {places - position_offset(model)} tokens, --max-length is {max_length}")


def _keeps_apart(model: Any, vocabulary: Vocabulary) -> bool:
    """Return whether two packed sequences come out as each does alone.

    Some models mix along the row outside of attention: MobileBERT's embeddings see their neighbours, ESM's are scaled
    by the share of masks in the row.
    """
    lengths = np.array([5, 3])
    ids = torch.arange(int(lengths.sum())) % vocabulary.size
    ids[1] = vocabulary.mask_id

    def states(ids: torch.Tensor, lengths: np.ndarray) -> torch.Tensor:
        places = torch.cat([torch.arange(length) for length in lengths]) + position_offset(model)
        index = torch.from_numpy(sequence_index(lengths))
        output = model.base_model(input_ids=ids[None], position_ids=places[None], sequence_index=index)
        found: torch.Tensor = output.last_hidden_state[0]
        return found

    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            together = states(ids, lengths)
            alone = torch.cat([states(ids[:5], lengths[:1]), states(ids[5:], lengths[1:])])
    except TypeError:  # it does not take the places of packed sequences at all
        return False
    finally:
        model.train(training)
    return torch.allclose(together, alone, rtol=1e-3, atol=1e-3)
