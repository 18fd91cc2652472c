"""Five operations for super-networks of Vision Transformers, each with a plain PyTorch reference.

    token_moments / weighted_covariance    weighted second moments of tokens, per head     moments.py
    taylor_scores                          sum over tokens of |x * grad|                   taylor.py
    masked_mlp                             MLP on its first m hidden neurons               mlp.py
    masked_attention                       attention on the first k coordinates of a head  attention.py
    residual_norm                          residual sum and norm in one pass               residual_norm.py

    gpu/         the Triton kernels
    _dispatch    how a call finds its implementation
    _native      the compiled extension
    _checks      arguments that are wrong, refused
    _autograd    the type of what autograd functions keep

`explain` says which implementation a call gets and why the others were refused, `use` forces one,
`build_info` says what was compiled. Nothing here imports `skd`.
"""

from skd_kernels._dispatch import Explanation, build_info, explain, use
from skd_kernels.attention import masked_attention
from skd_kernels.mlp import masked_mlp
from skd_kernels.moments import Moments, token_moments, weighted_covariance
from skd_kernels.residual_norm import residual_norm
from skd_kernels.taylor import taylor_scores

__all__ = [
    "Explanation",
    "Moments",
    "build_info",
    "explain",
    "masked_attention",
    "masked_mlp",
    "residual_norm",
    "taylor_scores",
    "token_moments",
    "use",
    "weighted_covariance",
]
