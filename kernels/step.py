"""One token a row through one block: in which order the kernels run.

The plain step of an MLP block is a norm (7 launches), a product, two launches for the activation, a product and an
addition. On a GPU a launch takes 2 microseconds or more even inside a CUDA graph, and the 9B's step has 56 blocks, so
here whatever is small happens inside a neighbour:

    M   linear (norm, in_proj) -> decode.mixer_step -> linear (out_proj, residual)                          3 launches
    -   linear (norm, up_proj, squared ReLU) -> linear (down_proj, residual)                                2 launches
    *   norm, q_proj, k_proj, v_proj -> put -> attend (2) -> linear (o_proj, residual)                       8 launches

With int8 matrices the norm is a launch of its own (kernels/linear.py says why).

This file starts no kernel of its own. The plain twin is `model.Block.step`.
"""

import torch.nn.functional as F

from kernels import attend, decode, norm
from kernels.linear import linear


def _times(x, projection, **around):
    """`linear` with the weights of an nn.Linear or a quantize.Int8Linear; a bias is added the plain way."""
    if projection.bias is None:
        return linear(x, projection.weight, getattr(projection, "scale", None), **around)
    residual, relu2 = around.pop("residual", None), around.pop("relu2", False)
    y = linear(x, projection.weight, getattr(projection, "scale", None), **around) + projection.bias
    y = F.relu(y).square() if relu2 else y
    return y if residual is None else residual + y


def block(layer, x, cache, lengths):
    """model.Block.step for x (b, d): the block's output (b, d). The cache is updated in place."""
    mixer = layer.mixer
    if layer.letter == "-":
        return _times(_times(x, mixer.up_proj, norm=layer.norm, relu2=True), mixer.down_proj, residual=x)
    if layer.letter == "M":
        y = decode.mixer_step(
            _times(x, mixer.in_proj, norm=layer.norm), cache.window, cache.ssm, mixer.conv1d.weight, mixer.conv1d.bias,
            mixer.dt_bias, mixer.A_log, mixer.D, mixer.norm.weight, mixer.g, mixer.norm.eps, mixer.time_step_limit,
        )  # fmt: skip
        return _times(y, mixer.out_proj, residual=x)
    u = norm.rms_norm(x, layer.norm.weight, layer.norm.eps)
    q, k, v = (p(u).unflatten(-1, (-1, mixer.head_dim)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    attend.put(k, v, cache.k, cache.v, lengths)
    y = attend.attend(q, cache.k, cache.v, lengths, more=1)
    return _times(y.flatten(-2), mixer.o_proj, residual=x)


def head(model, x):
    """The final norm and the head: logits (b, vocab) of the stream x (b, d)."""
    return _times(x, model.lm_head, norm=model.backbone.norm_f)
