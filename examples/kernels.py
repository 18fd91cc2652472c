"""The operations of skd_kernels without skd: what they compute, which implementation runs, and what it takes.

python examples/kernels.py
"""

import time

import torch
import torch.nn.functional as F

import skd_kernels

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
batch, tokens, channels, hidden = 4, 197, 192, 768
x = torch.randn(batch, tokens, channels, device=device, requires_grad=True)
w1, b1 = torch.randn(hidden, channels, device=device) / 14, torch.zeros(hidden, device=device)
w2, b2 = torch.randn(channels, hidden, device=device) / 28, torch.zeros(channels, device=device)

# An MLP on its first 200 hidden neurons, forward and backward; the Taylor scores of the neurons come with it.
scores = torch.zeros(hidden, device=device)
y = skd_kernels.masked_mlp(x, w1, b1, w2, b2, 200, scores=scores)
y.square().sum().backward()
expected = F.linear(F.gelu(F.linear(x, w1[:200], b1[:200])), w2[:, :200], b2)
print(f"masked_mlp: {(y - expected).abs().max():.1e} from PyTorch; scores of {int((scores > 0).sum())} neurons")

# The width may lie on the device: one graph then serves every width.
width = torch.tensor(200, dtype=torch.int32, device=device)
same = skd_kernels.masked_mlp(x, w1, b1, w2, b2, width)
print(f"width on the device: {(same - y).abs().max():.1e} from the width as an int")

# Statistics of features and their gradients: (images, tokens, groups, coordinates of a group).
features = torch.randn(batch, tokens, 9, 64, device=device)
gradients = torch.randn_like(features)
moments = skd_kernels.token_moments(features, gradients)
moments += skd_kernels.token_moments(2 * features, gradients)  # batches add up
print(f"token_moments: {moments.count} tokens, covariance of shape {tuple(moments.covariance().shape)}")
print(f"taylor_scores: {skd_kernels.taylor_scores(features, gradients).shape[0]} scores, float64")

# The residual sum and the norm that follows it.
total, normed = skd_kernels.residual_norm(x, y, torch.ones(channels, device=device), None, eps=1e-6)
print(f"residual_norm: {(normed - F.layer_norm(x + y, (channels,), eps=1e-6)).abs().max():.1e} from PyTorch")

# Which implementation a call gets, and why the others do not run. A shape may stand in for a tensor.
print(skd_kernels.explain("token_moments", (batch, tokens, 9, 64), (batch, tokens, 9, 64), device=device))
for name in ("reference", skd_kernels.explain("token_moments", features, gradients).chosen):
    with skd_kernels.use(name):
        start = time.perf_counter()
        skd_kernels.token_moments(features, gradients).covariance().sum().item()
        print(f"  {name}: {1e3 * (time.perf_counter() - start):.1f} ms")
