"""Pruned and factored models in transformers: after `import effllm.hf`, `from_pretrained` reads what effllm writes.

Pruning gives linear layers sizes that no config of transformers can say. Such a folder's `config.json` therefore holds

    "quantization_config": {"quant_method": "effllm", "linears": {"encoder.layer.0.output.dense": {…}, …}}

with an entry for each linear layer that is not what the rest of the config makes of it, named as in the base model.
transformers hands that entry to the quantizer registered here, which gives the layers their sizes before the weights
are loaded. A model in which nothing differs is written without the entry and loads without effllm.

Sparse layers are stored as one bit per weight and the values of those that are not zero, and are dense again once
loaded, as no engine that effllm writes for is faster on scattered zeros.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from effllm.errors import ArtifactError, Unsupported, first_line
from effllm.folder import ModelFolder, open_folder
from effllm.tasks import task_of

METHOD = "effllm"


@dataclass(frozen=True)
class Stored:
    """How a linear layer is stored: the rows and columns of its weight, and what is special about it.

    `rank` is that of two factors, 0 for a plain layer; `nonzeros` how many weights are stored where zeros are left out,
    -1 where they are not.
    """

    rows: int
    columns: int
    rank: int = 0
    nonzeros: int = -1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name} of a stored linear layer must be a whole number, got {value!r}")
        if min(self.rows, self.columns) < 1 or self.rank < 0 or not -1 <= self.nonzeros <= self.rows * self.columns:
            raise ValueError(f"no linear layer has the sizes {asdict(self)}")


class SparseLinear(nn.Linear):
    """A linear layer whose zeros stay: `mask`, bool (rows, columns), marks the weights that may change.

    The masked weights are zero, and no gradient reaches them. An optimizer that moves them all the same, as Muon does,
    moves what the layer does not use and no file stores.
    """

    mask: torch.Tensor

    @classmethod
    def of(cls, linear: nn.Linear, mask: torch.Tensor) -> SparseLinear:
        """Return a layer with the parameters of `linear`, whose weights outside the mask are set to zero in place."""
        with torch.device("meta"):
            sparse = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        sparse.weight = linear.weight
        sparse.register_parameter("bias", linear.bias)
        sparse.register_buffer("mask", mask.to(linear.weight.device), persistent=False)
        sparse.train(linear.training)
        with torch.no_grad():
            sparse.weight.mul_(sparse.mask)
        return sparse

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - nn.Linear's name
        """Apply the layer to (…, columns)."""
        return functional.linear(input, self.weight * self.mask, self.bias)


class LowRankLinear(nn.Module):
    """A linear layer as the product of two: `down` (rank, columns) without bias, then `up` (rows, rank)."""

    def __init__(self, columns: int, rows: int, rank: int, *, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = columns, rows
        self.down = nn.Linear(columns, rank, bias=False)
        self.up = nn.Linear(rank, rows, bias=bias)

    @property
    def weight(self) -> torch.Tensor:
        """What a model's initialisation looks at, and leaves alone because it was loaded."""
        return self.up.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias, after both factors."""
        return self.up.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - nn.Linear's name
        """Apply both factors to (…, columns)."""
        result: torch.Tensor = self.up(self.down(input))
        return result


class PackedLinear(nn.Module):
    """What a sparse layer is while its file is read: `weight_bits` uint8 (rows, columns / 8) and `weight_values`."""

    def __init__(self, stored: Stored, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.stored = stored
        self.in_features, self.out_features = stored.columns, stored.rows
        bits = torch.empty(stored.rows, -(-stored.columns // 8), dtype=torch.uint8)
        self.weight_bits = nn.Parameter(bits, requires_grad=False)
        self.weight_values = nn.Parameter(torch.empty(stored.nonzeros, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(stored.rows, dtype=dtype)) if bias else None

    @property
    def weight(self) -> torch.Tensor:
        """What a model's initialisation looks at, and leaves alone because it was loaded."""
        return self.weight_values

    def unpacked(self) -> SparseLinear:
        """Return the layer with its zeros in place."""
        mask = unpack_bits(self.weight_bits.data, self.stored.columns)
        if int(mask.sum()) != self.stored.nonzeros:
            raise ArtifactError(f"a sparse layer marks {int(mask.sum())} weights, but holds {self.stored.nonzeros}")
        with torch.device("meta"):
            linear = nn.Linear(self.stored.columns, self.stored.rows, bias=self.bias is not None)
        weight = torch.zeros(mask.shape, dtype=self.weight_values.dtype, device=mask.device)
        weight[mask] = self.weight_values.data
        linear.weight = nn.Parameter(weight)
        linear.register_parameter("bias", self.bias)
        return SparseLinear.of(linear, mask)


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """Return a bool (rows, columns) as uint8 (rows, columns / 8 rounded up), the first column in the lowest bit."""
    padded = functional.pad(mask, (0, -mask.shape[1] % 8)).view(mask.shape[0], -1, 8)
    return (padded.to(torch.uint8) << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: torch.Tensor, columns: int) -> torch.Tensor:
    """Return the mask, bool (rows, columns), that `pack_bits` packed."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, :, None] >> places) & 1).bool().flatten(1)[:, :columns]


def stored_linears(model: Any) -> dict[str, Stored]:
    """Return the linear layers of a model's base that its config alone would make otherwise, by name in the base."""
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        plain = dict(type(model)(config).base_model.named_modules())
    found = {}
    for name, module in model.base_model.named_modules():
        match module:
            case LowRankLinear():
                found[name] = Stored(module.out_features, module.in_features, rank=module.down.out_features)
            case SparseLinear():
                found[name] = Stored(module.out_features, module.in_features, nonzeros=int(module.mask.sum()))
            case nn.Linear() if name in plain and module.weight.shape != plain[name].weight.shape:
                found[name] = Stored(module.out_features, module.in_features)
    return found


def describe_in_config(model: Any) -> None:
    """Write into a model's config what its linear layers are, so that `save_pretrained` writes a whole folder."""
    linears = stored_linears(model)
    model.config.__dict__.pop("quantization_config", None)
    model.__dict__.pop("hf_quantizer", None)
    if linears:
        config = EffllmConfig({name: asdict(stored) for name, stored in linears.items()})
        model.config.quantization_config = config
        model.hf_quantizer = EffllmQuantizer(config)


@register_quantization_config(METHOD)
class EffllmConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of a folder that effllm pruned or factored."""

    def __init__(self, linears: Mapping[str, Mapping[str, int]], **kwargs: Any) -> None:
        self.quant_method = METHOD
        if not isinstance(linears, Mapping) or not all(isinstance(entry, Mapping) for entry in linears.values()):
            raise ValueError("quantization_config of effllm must map names of linear layers to their sizes")
        try:
            self.stored = {name: Stored(**entry) for name, entry in linears.items()}
        except TypeError as error:
            raise ValueError(f"quantization_config of effllm has an entry that is not one: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return the config as JSON, sizes that say nothing left out."""
        kept = {
            name: {k: v for k, v in asdict(s).items() if (k, v) not in {("rank", 0), ("nonzeros", -1)}}
            for name, s in self.stored.items()
        }
        return {"quant_method": METHOD, "linears": kept}


@register_quantizer(METHOD)
class EffllmQuantizer(HfQuantizer):  # type: ignore[misc]
    """Gives linear layers their stored sizes before the weights are loaded, and fills in the zeros afterwards."""

    requires_calibration = True
    is_trainable = True

    def is_serializable(self) -> bool:
        """Return that `save_pretrained` may write the model."""
        return True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        base = model.base_model
        for name, stored in sorted(self.quantization_config.stored.items()):
            try:
                linear = base.get_submodule(name)
            except AttributeError:
                raise ArtifactError(f"config.json names a layer {name!r} that the model does not have") from None
            if not isinstance(linear, nn.Linear):
                raise ArtifactError(f"config.json gives {name!r} sizes, but it is no linear layer")
            _replace(base, name, _with_sizes(linear, stored))
        set_head_counts(base)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module in list(model.base_model.named_modules()):
            if isinstance(module, PackedLinear):
                _replace(model.base_model, name, module.unpacked())
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Return the tensors to write: those of sparse layers as bits and values, all others as they are."""
        state = model.state_dict()
        for name, module in model.named_modules():
            if isinstance(module, SparseLinear):
                weight = state.pop(f"{name}.weight")
                state[f"{name}.weight_bits"] = pack_bits(module.mask)
                state[f"{name}.weight_values"] = weight[module.mask].contiguous()
        return state, {}


def _with_sizes(linear: nn.Linear, stored: Stored) -> nn.Module:
    """Return a layer of the stored sizes on the meta device, of the linear layer's dtype and with a bias if it has."""
    bias, dtype = linear.bias is not None, linear.weight.dtype
    with torch.device("meta"):
        if stored.rank:
            return LowRankLinear(stored.columns, stored.rows, stored.rank, bias=bias).to(dtype)
        if stored.nonzeros >= 0:
            return PackedLinear(stored, bias=bias, dtype=dtype)
        return nn.Linear(stored.columns, stored.rows, bias=bias, dtype=dtype)


def _replace(base: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(base.get_submodule(parent), own, module)


def set_head_counts(base: nn.Module) -> None:
    """Let attention modules say how many heads they have, in place; their forward reads it off the projections."""
    for module in base.modules():
        size = getattr(module, "attention_head_size", None)
        query = getattr(module, "query", None) or getattr(module, "q_lin", None)
        if size and query is not None:
            for name in ("num_attention_heads", "n_heads"):
                if hasattr(module, name):
                    setattr(module, name, query.out_features // size)
            if hasattr(module, "all_head_size"):
                module.all_head_size = query.out_features


def load(model: str | Path, *, task: str | None = None) -> Any:
    """Return a folder's or hub id's transformers model in eval mode, float32, pruned or not.

    The class is the one of the task, by default of the folder's own head. Raises ArtifactError or Unsupported.
    """
    folder = open_folder(model)
    return load_trained(folder, task_of(folder, task).auto_class)


def load_trained(
    folder: ModelFolder,
    auto_class: str,
    *,
    attention: str | None = None,
    dtype: torch.dtype = torch.float32,
    coded: bool = False,
) -> Any:
    """Return a checked folder's model in eval mode, all of whose weights come from the folder.

    A pooler may be drawn anew where nothing is made of it: `AutoModel` is loaded for its token states. Raises as
    `load_folder`, and Unsupported naming a weight that the folder does not have.
    """
    model, info = load_folder(folder, auto_class, attention=attention, dtype=dtype, coded=coded)
    missing = sorted(key for key in info["missing_keys"] if auto_class != "AutoModel" or "pooler" not in key.split("."))
    if missing:
        raise Unsupported(
            f"{folder.path} has no weights for {missing[0]}, which {type(model).__name__} needs: it was not trained "
            "for this task (pass another --task?), or its weights are another model's"
        )
    return model.eval()


def load_folder(
    folder: ModelFolder,
    auto_class: str,
    *,
    attention: str | None = None,
    dtype: torch.dtype = torch.float32,
    coded: bool = False,
    new_head: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Return a checked folder's model and what transformers reports of its keys; weights that are missing are random.

    `attention` names an implementation, for models that take one (`takes_attention`; others keep their own); `settings`
    replace values of the config; with `new_head` weights of other sizes than the model's are drawn anew. Raises
    Unsupported for a model that another tool quantised, unless `coded`, or that needs a package which is not installed,
    ArtifactError when transformers cannot load the folder.
    """
    method = (folder.config.get("quantization_config") or {}).get("quant_method", METHOD)
    if method != METHOD and not coded:
        raise Unsupported(f"{folder.path} is already quantised ({method}); start from the dense model")
    chosen = {"attn_implementation": attention} if attention else {}
    try:
        with quiet():
            model, info = getattr(transformers, auto_class).from_pretrained(
                folder.path,
                dtype=dtype,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=new_head,
                output_loading_info=True,
                **chosen,
                **(settings or {}),
            )
    except ImportError as error:
        raise Unsupported(f"{folder.path} needs a package that is not installed: {first_line(error)}") from error
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise ArtifactError(f"{folder.path} cannot be loaded by transformers: {first_line(error)}") from error
    if attention and not takes_attention(model):
        model.config._attn_implementation = "eager"  # the kind of mask goes by this name
    return model, info


def takes_attention(model: Any) -> bool:
    """Return whether a model's attention is what its `attn_implementation` names; MPNet's and DeBERTa's is their own.

    transformers takes any registered name for all models, and gives them the mask that goes with it.
    """
    takes: bool = model._can_set_attn_implementation()
    return takes


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings of the block, and of transformers its progress bars and what it logs below an error."""
    logger = logging.getLogger("transformers")
    before, bars = logger.level, transformers.utils.logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
        if bars:
            transformers.utils.logging.enable_progress_bar()
