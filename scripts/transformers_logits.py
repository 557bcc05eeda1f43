"""Computes the logits of a Hugging Face checkpoint with transformers, for verify_logits.py, which starts it.

    python transformers_logits.py REQUEST.json LOGITS.npz

Needs torch and transformers, and nothing else, so that it runs in any environment that has them. The request is a JSON
object: `path`, `revision` and `dtype` of the model, and `texts`, or null for `random`: how many prompts, of how many
tokens, from which seed, and below which id. The result holds `ids_N` and `logits_N` of each prompt.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

# The plain implementations: the definition of the model, and the ones that take any size.
_EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


def load(path: str, revision: str | None, dtype: torch.dtype) -> nn.Module:
    """The model that `config.json` names, with all of its weights from the checkpoint, dequantized.

    Raises:
        ValueError: If weights are missing, which transformers would make up.
    """
    config = transformers.AutoConfig.from_pretrained(path, revision=revision)
    # The class that is named and not AutoModelForCausalLM, which does not know all models with vision.
    named = (getattr(transformers, name, None) for name in config.architectures or ())
    architecture = next(filter(None, named), transformers.AutoModelForCausalLM)
    model, found = architecture.from_pretrained(
        path, revision=revision, dtype=dtype, output_loading_info=True, **_EAGER
    )
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(f"transformers found no values for {len(missing)} weights, such as {missing[0]}")
    return getattr(model, "thinker", model).to(dtype).eval()  # The thinker is the part of Qwen 3-Omni that reads text.


def prompts(request: dict[str, Any], model: nn.Module) -> list[np.ndarray]:
    """The token ids of each prompt."""
    if request["texts"] is None:
        random = request["random"]
        below = min(random["below"], model.config.get_text_config().vocab_size)
        ids = np.random.default_rng(random["seed"]).integers(below, size=(random["prompts"], random["tokens"]))
        return list(ids)
    tokenizer = transformers.AutoTokenizer.from_pretrained(request["path"], revision=request["revision"])
    return [np.asarray(tokenizer(text)["input_ids"], np.int64) for text in request["texts"]]


def logits(model: nn.Module, ids: np.ndarray) -> np.ndarray:
    """The logits of one prompt, `[tokens, vocabulary]` in float32."""
    with torch.no_grad():
        output = model(input_ids=torch.from_numpy(ids)[None], use_cache=False)
    return np.asarray(output.logits[0].float())


def main(request_file: str, result_file: str) -> None:
    """Answers one request."""
    request = json.loads(Path(request_file).read_text())
    model = load(request["path"], request["revision"], getattr(torch, request["dtype"]))
    result = {}
    for number, ids in enumerate(prompts(request, model)):
        result |= {f"ids_{number}": ids, f"logits_{number}": logits(model, ids)}
    np.savez(result_file, **result)


if __name__ == "__main__":
    main(*sys.argv[1:])
