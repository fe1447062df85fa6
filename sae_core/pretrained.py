"""Load a model or its tokenizer from wherever it lies: the catalog, the hub, a folder, or a GGUF file.

No code that comes with a model is ever run.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_model
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.utils import logging

from sae_core.artifacts import file_sha256, require_space
from sae_core.catalog import cache_dir, find_embedder, find_model
from sae_core.downloads import lock
from sae_core.errors import MindAtlasError
from sae_core.progress import Report, silent
from sae_core.study import ModelSettings

_FORM = 2
"""Form in which a de-quantized model is kept; raised when the same GGUF gives other files, so that it is made anew."""

_MODELS = "a folder with config, weights and tokenizer, a .gguf file"
_EMBEDDERS = "a folder that sentence-transformers can read, with weights as safetensors"

logging.disable_progress_bar()  # progress is told through `report`, and shown by whoever listens


class ModelError(MindAtlasError):
    """A language model that cannot be found, loaded, or read where one asks."""


def load_tokenizer(settings: ModelSettings, report: Report = silent) -> Any:
    """The model's tokenizer, without its weights.

    Raises:
        ModelError: it has none, or it cannot be read.
        CatalogError: the model cannot be found or fetched.
    """
    return _load(AutoTokenizer, settings, report)


def expected_bos(tokenizer: Any) -> int | None:
    """The token with which the model expects every sequence to begin; None when it expects none."""
    starts = tokenizer("").input_ids[:1]
    return tokenizer.bos_token_id if starts and starts[0] == tokenizer.bos_token_id else None


def load_weights(settings: ModelSettings, dtype: torch.dtype, report: Report = silent) -> Any:
    """The causal language model with weights of the given type; raises as `load_tokenizer`.

    Of a model that also reads images, all of it is loaded, and its language tower is what is mapped.
    """
    return _load(_class_of(_load(AutoConfig, settings, report)), settings, report, dtype=dtype)


def load_outline(settings: ModelSettings, report: Report = silent) -> Any:
    """The causal language model on the meta device: modules and shapes, without a weight; raises as `load_tokenizer`.

    Made of the configuration alone, which for a GGUF file is its metadata.
    """
    found = find_model(settings, report)
    place: dict[str, Any] = {"pretrained_model_name_or_path": found.path, "revision": found.revision or "main"}
    if found.kind == "gguf":
        folder = _dequantized_folder(Path(found.path))
        place = {"pretrained_model_name_or_path": folder} if folder.exists() else _in_gguf(Path(found.path))
    with _refusing("model.source", settings.source, _MODELS):
        config = AutoConfig.from_pretrained(**place, trust_remote_code=False)
        with torch.device("meta"):
            return _class_of(config).from_config(config)


def load_embedder(source: str, report: Report = silent) -> Any:
    """The sentence-embedding model, on the CPU, from `labels.embedder`.

    Raises:
        ModelError: it cannot be loaded.
        CatalogError: it cannot be found or fetched.
    """
    from sentence_transformers import SentenceTransformer

    place = find_embedder(source, report)
    with _refusing("labels.embedder", source, _EMBEDDERS):
        return SentenceTransformer(
            place, device="cpu", trust_remote_code=False, model_kwargs={"use_safetensors": True}
        )  # fmt: skip


def _class_of(config: Any) -> Any:
    """What loads a model: a language model, or one that reads images besides."""
    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText


def _load(loader: Any, settings: ModelSettings, report: Report, **options: Any) -> Any:
    found = find_model(settings, report)
    path = str(_dequantized(Path(found.path), report)) if found.kind == "gguf" else found.path
    with _refusing("model.source", settings.source, _MODELS):
        return loader.from_pretrained(path, revision=found.revision or "main", trust_remote_code=False, **options)


@contextmanager
def _refusing(key: str, source: str, such: str) -> Iterator[None]:
    """Turn what `transformers` raises for a model that it cannot load into one line."""
    try:
        yield
    except MemoryError:
        raise _too_large(key, source) from None
    except RuntimeError as error:
        if "allocate memory" not in str(error) and "out of memory" not in str(error):
            raise
        raise _too_large(key, source) from None
    except (OSError, ValueError, KeyError, TypeError, ImportError, SafetensorError) as error:
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(
            f"{key} = {source!r} cannot be loaded ({why[:240]}): give a catalog name, {such}, "
            "or an id that is on the hub or in its cache"
        ) from error


def _too_large(key: str, source: str) -> ModelError:
    return ModelError(f"{key} = {source!r} does not fit into memory: name a smaller model")


def _dequantized(gguf: Path, report: Report) -> Path:
    """Folder with the GGUF as a Hugging Face model, made at first use."""
    folder = _dequantized_folder(gguf)
    models = folder.parent
    if not folder.exists():
        with lock(models):
            if not folder.exists():
                report(0, 1, "models")
                require_space(models, 8 * gguf.stat().st_size)  # 2 bits a weight become 16
                draft = folder.with_name(folder.name + ".tmp")
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir()
                _dequantize(gguf, draft)
                draft.rename(folder)
                report(1, 1, "models")
    return folder


def _dequantized_folder(gguf: Path) -> Path:
    return cache_dir() / "models" / f"{gguf.stem}-{file_sha256(gguf)[:16]}-v{_FORM}"


def _in_gguf(gguf: Path) -> dict[str, Any]:
    """Where `transformers` reads something from a GGUF file's metadata."""
    return {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}


def _dequantize(gguf: Path, folder: Path) -> None:
    """Write config, weights, and tokenizer with chat template.

    `from_pretrained(gguf_file=...)` would need the accelerate package, and `save_pretrained` refuses what it returns.
    """
    try:
        tokenizer, config = (auto.from_pretrained(**_in_gguf(gguf)) for auto in (AutoTokenizer, AutoConfig))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        weights = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)["tensors"]
    except (OSError, ValueError, KeyError, TypeError, NotImplementedError) as error:
        raise ModelError(f"{gguf} cannot be read as a model ({error}): give its safetensors instead") from error
    quantized = gguf.stat().st_size < 2 * sum(weight.numel() for weight in weights.values())  # under 2 bytes a weight
    kept = {name: _compact(weight, quantized) for name, weight in weights.items()}
    model.load_state_dict(kept, strict=False, assign=True)
    model.tie_weights()
    if missing := [name for name, weight in model.named_parameters() if weight.is_meta]:
        raise ModelError(f"{gguf} lacks {len(missing)} weights ({missing[0]}, ...): give its safetensors instead")
    config.architectures = [type(model).__name__]
    for part in (tokenizer, config, model.generation_config):
        part.save_pretrained(folder)
    save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})


def _compact(weight: Tensor, quantized: bool) -> Tensor:
    """The float32 weight in 16 bits where these hold it, and a matrix of a quantized file in bfloat16 in any case.

    De-quantized values (a 16-bit scale times a few bits, plus a 16-bit offset) need up to 26 bits. Rounding them to
    bfloat16 halves the disk and changes nothing at the default precision, which rounds just so. Elsewhere it adds 0.1%
    (root mean square, SmolLM2) to the error of 4-bit quantization, some 8% (15 steps over a range of 32 normal values).
    """
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(weight.to(dtype).float(), weight):
            return weight.to(dtype)
    return weight.bfloat16() if quantized and weight.ndim > 1 else weight
