"""What the output of a backbone depends on: its weights, and everything that no weight says, in named parts.

The parts are kept by name, and not as one hash, so that a difference can be said: "heads of the image tower: 12 there,
6 here". They are read off the modules, the tokenizer and the transform that will run, not off a config, because configs
have many ways to say one thing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Fingerprint = dict[str, Any]
"""Part by name; JSON types only."""

PROBES = (
    "a photo of a cat.",
    "The QUICK brown fox",
    "don't 3,000",
    "caf\u00e9 na\u00efve",
    "\u732b \u0441\u043e\u0431\u0430\u043a\u0430",
    "x_y-z/w",
    "  ",
)
"""Short texts whose token ids show case, punctuation, accents, other scripts, empty texts and padding."""

WITH_WEIGHTS = frozenset({"buffers", "number formats", "logit scale", "logit bias"})
"""Parts that change where weights are changed or rounded: a merged checkpoint has its own."""


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 (hex) over names, dtypes, shapes and bytes, in the order of the names: equal exactly if bit-equal."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous().cpu()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def model_parts(model: nn.Module) -> Fingerprint:
    """Buffers that belong to the weights (the statistics of batch norms), and the formats of the numbers, which are
    other ones where weights are quantised."""
    parameters = dict(model.named_parameters())
    kept = {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}
    return {
        "buffers": weights_hash(kept),
        "number formats": sorted({str(one.dtype).removeprefix("torch.") for one in parameters.values()}),
    }


def tower_parts(tower: nn.Module, name: str) -> Fingerprint:
    """What the modules of a tower compute with and keep in no tensor.

    Args:
        name: ``image`` or ``text``.
    """
    modules = list(tower.modules())
    found = {
        "activation": {activation_name(module) for module in modules if _is_activation(module)},
        "heads": _values(modules, ("num_heads", "num_attention_heads", "n_heads"), int),
        "norm epsilon": _values(modules, ("eps", "variance_epsilon"), float),
        "pooling": _values(modules, ("pool_type", "global_pool"), str)
        | {
            type(module.pooler).__name__ for module in modules if isinstance(getattr(module, "pooler", None), nn.Module)
        },
        "convolutions": {
            f"stride {list(module.stride)}, padding {module.padding!r}, dilation {list(module.dilation)}"
            for module in modules
            if isinstance(module, nn.Conv2d)
        },
    }
    return {f"{part} of the {name} tower": sorted(values) for part, values in found.items()}


def tokenizer_parts(vocabulary: Mapping[str, int], tokenize: Callable[[Sequence[str]], Tensor]) -> Fingerprint:
    """The vocabulary, and what the tokenizer makes of some texts."""
    words = "\n".join(f"{number} {word!r}" for word, number in sorted(vocabulary.items(), key=lambda item: item[1]))
    return {
        "vocabulary": _sha256(words),
        "tokens of some texts": _sha256(repr([_tokens(tokenize, one) for one in PROBES])),
    }


def identity(parts: Mapping[str, Any]) -> str:
    """sha256, hex, of all parts."""
    return _sha256(json.dumps(parts, sort_keys=True))


def differences(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What both have and is not the same, one line each; a part that is a dictionary is compared entry by entry."""
    lines = []
    for name, before in recorded.items():
        if name not in found or found[name] == before:
            continue
        now = found[name]
        if isinstance(before, dict) and isinstance(now, dict):
            lines += [
                f"{name}, {key}: {_short(before.get(key))} there, {_short(now.get(key))} here"
                for key in sorted(before.keys() | now.keys())
                if before.get(key) != now.get(key)
            ]
        else:
            lines.append(f"{name}: {_short(before)} there, {_short(now)} here")
    return lines


_POINTS = (-4.0, -2.0, -1.0, -0.3, 0.3, 1.0, 2.0)
_KNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": torch.relu,
    "silu": functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def activation_name(module: Callable[[Tensor], Tensor]) -> str:
    """The function that an activation computes, whatever its class is called; its values where it has no name."""
    with torch.no_grad():
        points = torch.tensor(_POINTS)
        values = module(points.clone())
        for name, function in _KNOWN.items():
            if torch.allclose(values, function(points), atol=2e-5, rtol=0):  # the two forms of GELU are 1e-4 apart
                return name
    return " ".join(f"{value:.4f}" for value in values.tolist())


def _is_activation(module: nn.Module) -> bool:
    name = type(module).__name__
    plain = next(module.children(), None) is None and next(module.parameters(), None) is None
    return plain and re.search(r"gelu|relu|elu|silu|swish|tanh|sigmoid|mish", name, re.IGNORECASE) is not None


def _values(modules: Sequence[nn.Module], names: Sequence[str], kind: type) -> set[Any]:
    """The values of this type that attributes of these names have."""
    found = (getattr(module, name, None) for module in modules for name in names)
    return {value for value in found if type(value) is kind}


def _tokens(tokenize: Callable[[Sequence[str]], Tensor], text: str) -> list[int] | str:
    try:
        return tokenize([text])[0].tolist()
    except Exception as error:  # a tiny context, or a tokenizer without a token for it: that, too, is what it does
        return type(error).__name__


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _short(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return f"sha256 {value[:12]}..."
    text = json.dumps(value)  # a record may come from anybody: control characters are shown escaped
    return text if len(text) <= 80 else f"{text[:77]}..."
