"""Weights in eight bits: little more than half the bytes to hold and, with a kernel, to read.

To say one token, a GPU reads every weight once and does two operations with it: decoding waits for memory, not for
arithmetic. So the weights are what to make smaller. Activations stay as they are: one token's are a few kilobytes
beside gigabytes, and rounding them would cost accuracy and buy nothing. This is *weight-only* quantisation.

A matrix (N, K) becomes whole numbers from -127 to 127 and one float32 scale for each output row:

    scale = max |row| / 127        q = round(row / scale), half to even        row ~ scale * q

Symmetric: zero stays zero, there is no offset, and -128 is never used. No weight moves by more than scale / 2. A scale
for each row, because a row is one output, and outputs differ in size; within a row all weights share the dot product.

Which matrices: in_proj and out_proj of every Mamba layer, up_proj and down_proj of every MLP. What stays:

    attention       4 of the 9B's 56 layers and 2.5 % of its weights, but the only ones that look back exactly
    convolution     0.02 % of the weights, and what it lets in, the state keeps
    norms, A_log, D, dt_bias      a rounding error
    embedding, head     one row a token is read of the first; the second writes the logits themselves

NVIDIA's own FP8 release of the 9B draws the line in the same place, and loads in 9.6 GiB. The same sum for int8:

    7,491,420,160 weights x 1 byte + 1,236,672 scales x 4 + 1,396,807,168 others x 2 = 9.58 GiB, instead of 16.56

`compare_plans` measures on any model what the line is worth.

Why by hand: it is a page. Libraries (torchao, bitsandbytes) bring more formats and tuned kernels, and hide where the
roundings are. `Int8Linear.forward` in plain PyTorch saves room, not time: it spells the weights out, a slice at a time.
A kernel that reads `weight` and `scale` itself saves both. This file must not know files or models' configs.
"""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

LARGEST = 127
SLICE = {"cpu": 2**20, "cuda": 2**24}  # weights spelled out at a time: some megabytes; on a GPU a launch costs, too
INT8 = {"M": ("in_proj", "out_proj"), "-": ("up_proj", "down_proj")}  # by the letter of the layer


class NotFinite(ValueError):
    """A row of weights has no scale. The message is one sentence."""


def _round_rows(weight, largest):
    """Whole numbers (N, K) in float32 within +-largest, and scales (N,) float32; weight (N, K) of any float dtype."""
    w = weight.float()
    scale = w.abs().amax(1) / largest
    divisor = torch.where(scale > 0, scale, 1)  # a row of zeros is zeros
    return (w / divisor[:, None]).round().clamp(-largest, largest), scale


def _slices(weight):
    step = max(1, SLICE.get(weight.device.type, SLICE["cpu"]) // weight.shape[1])
    return [slice(s, min(s + step, len(weight))) for s in range(0, len(weight), step)]


def quantize_rows(weight):
    """weight (N, K), any float dtype -> (N, K) int8 and the scales (N,) float32, on the same device; needs no more than
    a few megabytes besides. Raises NotFinite, a ValueError."""
    q = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    if not weight.is_meta:
        for rows in _slices(weight):
            q[rows], scale[rows] = _round_rows(weight[rows], LARGEST)
        bad = int((~scale.isfinite()).sum())
        if bad:
            raise NotFinite(
                f"{bad} of its {len(scale)} rows hold weights that are not finite or do not fit float32, so these rows "
                "have no scale: the checkpoint is damaged or its training diverged"
            )
    return q, scale


class Int8Linear(nn.Module):
    """nn.Linear with its weight in int8: x (..., K) -> (..., N) in x's dtype.

    weight (N, K) int8 and scale (N,) float32 are buffers, so they are not trained; gradients reach x. bias (N,) or None
    is the linear layer's own. `.to(dtype)` leaves weight and scale alone.
    """

    def __init__(self, weight, scale, bias=None):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_parameter("bias", bias)
        self.impl = "torch"  # or "triton": spelled out in one pass; a decode step reads int8 itself (kernels/step.py)

    def extra_repr(self):
        n, k = self.weight.shape
        return f"in_features={k}, out_features={n}, bias={self.bias is not None}"

    def _apply(self, fn, recurse=True):
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:  # .to(bfloat16) would round it, and all weights of the row with it
            self.scale = scale.to(self.weight.device)
        return self

    def forward(self, x):
        if self.impl == "triton" and not torch.is_grad_enabled():
            from kernels.linear import spell_out

            return F.linear(x, spell_out(self.weight, self.scale, x.dtype), self.bias)
        parts = []
        for rows in _slices(self.weight):
            weight = (self.weight[rows] * self.scale[rows, None]).to(x.dtype)  # (rows, K)
            parts.append(F.linear(x, weight, None if self.bias is None else self.bias[rows]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


@torch.no_grad()
def quantized_linear(linear):
    """An Int8Linear with the rounded weight of an nn.Linear, and its bias. NotFinite for weights that are not;
    on the "meta" device only the shapes."""
    return Int8Linear(*quantize_rows(linear.weight), linear.bias)


def quantize_(model):
    """Replace in_proj and out_proj of every Mamba layer, and up_proj and down_proj of every MLP, by Int8Linear, in
    place, one matrix at a time; layers that are int8 already stay. Returns the model.

    The state dict keeps its names and gains a `.scale` beside each of these `.weight`s. A model with weights that are
    not finite raises NotFinite, which names the matrix; those before it are int8 by then.
    """
    for i, block in enumerate(model.backbone.layers):
        for name in INT8.get(block.letter, ()):
            linear = getattr(block.mixer, name)
            if not isinstance(linear, Int8Linear):
                try:
                    setattr(block.mixer, name, quantized_linear(linear))
                except NotFinite as error:
                    raise NotFinite(f"backbone.layers.{i}.mixer.{name}.weight cannot be int8: {error}") from None
    return model


# ---------------------------------------------------------------------------------------------------------------------
# What is it worth to leave attention and convolution alone?
# ---------------------------------------------------------------------------------------------------------------------


def _rounded(weight, bits):
    """The weight after a round trip through rows of `bits` bits, which need not be whole; 16 stands for bfloat16."""
    if bits == 16:
        return weight.bfloat16().to(weight.dtype)
    q, scale = _round_rows(weight.flatten(1), int(2 ** (bits - 1)) - 1)  # conv1d's is (channels, 1, k)
    return (q * scale[:, None]).view_as(weight).to(weight.dtype)


@torch.no_grad()
def compare_plans(model, ids):
    """Round the model's layers in three ways and compare the logits of ids (b, l) with those of the model itself.

    "int8, attention and convolution bf16" is what `quantize_` does; "all int8" rounds these, too; "all, equal bytes"
    spends the bytes of the first evenly on all, in rows of a little over 8 bits, which no hardware has. Embedding and
    head are left alone. Returns {plan: {"bits" a weight of these layers, "error": |difference| / |logits - mean|, "kl":
    nats a token}}. The model is not changed.
    Raises ValueError for a model that is int8 already.
    """
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        raise ValueError("the model is int8 already, so there is nothing to compare with: load it without int8")
    reference = model(ids)
    spread = (reference - reference.mean(-1, keepdim=True)).norm()
    log_p = reference.log_softmax(-1)
    names, others = [], []
    for i, block in enumerate(model.backbone.layers):
        for name, parameter in block.mixer.named_parameters(f"backbone.layers.{i}.mixer"):
            module = name.split(".")[-2]
            if module in INT8.get(block.letter, ()) and name.endswith("weight"):
                names.append(name)
            elif name.endswith("conv1d.weight") or (block.letter == "*" and parameter.dim() == 2):
                others.append(name)
    n, m = (sum(model.get_parameter(name).numel() for name in group) for group in (names, others))
    even = (8 * n + 16 * m) / (n + m)
    plans = {"int8, attention and convolution bf16": (8, 16), "all int8": (8, 8), "all, equal bytes": (even, even)}
    found = {}
    for plan, bits in plans.items():
        rounded = copy.deepcopy(model)
        for group, width in zip((names, others), bits):
            for name in group:
                parameter = rounded.get_parameter(name)
                parameter.copy_(_rounded(parameter, width))
        logits = rounded(ids)
        log_q = logits.log_softmax(-1)
        found[plan] = {
            "bits": (bits[0] * n + bits[1] * m) / (n + m),
            "error": ((logits - reference).norm() / spread).item(),
            "kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
        }
    return found
