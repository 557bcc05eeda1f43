"""The layer of DeepSeek-V3 for multi-token prediction, which transformers leaves out.

For each token it takes the last layer's output and the embedding of the next token, and predicts the token after that:
section 2.2 of the technical report of DeepSeek-V3.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812  The name that torch's own documentation gives it.
from torch import Tensor, nn


class PredictionLayer(nn.Module):
    """What such a layer has beside an ordinary decoder layer, by the published names, with random weights."""

    def __init__(self, hidden_size: int, epsilon: float, random: torch.Generator, dtype: torch.dtype) -> None:
        super().__init__()
        self.enorm = nn.RMSNorm(hidden_size, epsilon)
        self.hnorm = nn.RMSNorm(hidden_size, epsilon)
        self.eh_proj = nn.Linear(2 * hidden_size, hidden_size, bias=False)
        self.shared_head = nn.ModuleDict({"norm": nn.RMSNorm(hidden_size, epsilon)})
        with torch.no_grad():
            for parameter in self.parameters():
                noise = torch.randn(parameter.shape, generator=random)
                values = 1 + 0.3 * noise if parameter.ndim == 1 else noise * parameter.shape[1] ** -0.5
                parameter.copy_(values.to(dtype))

    def loss(self, model: nn.Module, decoder_layer: nn.Module, ids: Tensor, run: Callable[[], object]) -> float:
        """Returns the mean cross-entropy of the predictions of the tokens that the text has.

        Args:
          model: the model without this layer.
          decoder_layer: this layer's own.
          ids: the text, `[1, tokens]`.
          run: lets the model compute the text.
        """
        seen: dict[str, object] = {}

        def keep(_: nn.Module, __: object, keywords: dict[str, object], output: Tensor) -> None:
            seen.update(keywords=keywords, output=output)

        hook = model.model.layers[-1].register_forward_hook(keep, with_kwargs=True)
        run()
        hook.remove()
        with torch.no_grad():
            # No prediction that counts sees the token that follows the last one.
            following = model.get_input_embeddings()(ids.roll(-1))
            joined = self.eh_proj(torch.cat([self.enorm(following), self.hnorm(seen["output"])], -1))
            hidden = self.shared_head["norm"](decoder_layer(joined, **seen["keywords"]))
            logits = model.get_output_embeddings()(hidden)
        return float(F.cross_entropy(logits[0, :-2].double(), ids[0, 2:]))
