"""The tiny models of the MaxText oracle: one description each, shared by the three environments that need it.

`make_sources.py` builds the transformers model (test environment), `convert_with_slicecast.py` converts its checkpoint,
and `test_logits.py` runs the result in MaxText (MaxText environment). Nothing heavy is imported here.

Within a model, all sizes that could be confused with one another differ (heads, head dims, ranks, experts, layers of a
stack, widths), so a transposed or misplaced axis cannot have the right shape. Head dims are not powers of four, so the
query scale `head_dim ** -0.5` is not a power of two and its rounding shows. RoPE, norm epsilon, limits of activations
and router settings are those of the real models, because MaxText takes them from its own model files.
"""

from case import Case
from models import deepseek, deepseek_v3_2, deepseek_v4, gemma, gpt_oss, llama, llama4, mixtral, olmo3, qwen

_FAMILIES = (llama, llama4, mixtral, olmo3, gemma, qwen, deepseek, deepseek_v3_2, deepseek_v4, gpt_oss)

CASES: tuple[Case, ...] = tuple(case for family in _FAMILIES for case in family.CASES)
