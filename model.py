"""The hybrid model: a config, and a stack drawn from a pattern string.

A model is a string. Each letter is one residual layer with one norm and one mixer:

    M   Mamba-2            *   attention            -   MLP (squared ReLU)

so `M-M*-M-` is seven layers. The released 12B is 62 letters, the 9B 56, our 1:1000 scale model 22; all are built by the
code below, with the field names of the released config.json and the tensor names of the released checkpoints, so that
a checkpoint folder loads without a renaming table. This file must not know training or text.

Source: report section 2.1 (architecture), 4 (compressed shapes); released config files; initialisation
as in Megatron-LM, which trained the released models.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from attention import Attention, KVCache
from mamba2 import Mamba2Mixer

LETTERS = {"M": "Mamba-2", "*": "attention", "-": "MLP"}


@dataclass
class ModelConfig:
    """The released config.json's own field names; the defaults are small. Bad values raise ValueError."""

    hidden_size: int = 128
    hybrid_override_pattern: str = "M-M*-M-"
    vocab_size: int = 512
    # Mamba-2: inner width = mamba_num_heads * mamba_head_dim, nothing else
    mamba_num_heads: int = 4
    mamba_head_dim: int = 64
    n_groups: int = 2
    ssm_state_size: int = 64
    conv_kernel: int = 4
    chunk_size: int = 32
    use_conv_bias: bool = True
    use_bias: bool = False
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_limit: tuple = (0.0, math.inf)
    # attention
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    attention_bias: bool = False
    # MLP
    intermediate_size: int = 512
    mlp_bias: bool = False
    # the rest
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    max_position_embeddings: int = 131072  # informational: there are no positions
    tie_word_embeddings: bool = False
    bos_token_id: int = 1
    eos_token_id: int = 12
    pad_token_id: int = 0

    def __post_init__(self):
        self.time_step_limit = tuple(self.time_step_limit)
        unknown = sorted(set(self.hybrid_override_pattern) - set(LETTERS))
        if unknown or not self.hybrid_override_pattern:
            raise ValueError(
                f"hybrid_override_pattern {self.hybrid_override_pattern!r} "
                + (f"has unknown letters {unknown}" if unknown else "is empty")
                + "; use M (Mamba-2), * (attention) and - (MLP), for example M-M*-M-"
            )
        for name in (
            "hidden_size vocab_size mamba_num_heads mamba_head_dim n_groups ssm_state_size conv_kernel chunk_size "
            "num_attention_heads num_key_value_heads head_dim intermediate_size"
        ).split():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")
        for a, b in (("mamba_num_heads", "n_groups"), ("num_attention_heads", "num_key_value_heads")):
            if getattr(self, a) % getattr(self, b):
                raise ValueError(f"{a} {getattr(self, a)} must be a multiple of {b} {getattr(self, b)}")
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings true is not supported: this family keeps embedding and head apart")

    @property
    def num_hidden_layers(self):
        return len(self.hybrid_override_pattern)

    @property
    def mamba_inner(self):
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_channels(self):
        return self.mamba_inner + 2 * self.n_groups * self.ssm_state_size


_released = ModelConfig(
    vocab_size=131072, mamba_num_heads=128, mamba_head_dim=80, n_groups=8, ssm_state_size=128, chunk_size=128,
    num_attention_heads=40, num_key_value_heads=8, head_dim=128,
)  # fmt: skip
_scale = ModelConfig(  # the report's ratios, width divided by 20; init std for small widths is 1/sqrt(hidden)
    vocab_size=4096, mamba_num_heads=16, mamba_head_dim=32, n_groups=4, ssm_state_size=32, chunk_size=64,
    num_attention_heads=4, num_key_value_heads=2, head_dim=48,
)  # fmt: skip

PRESETS = {
    # for a laptop's CPU
    "nano-1m": ModelConfig(initializer_range=128**-0.5),
    # the 1:1000 scale model, and the shape it is compressed to
    "nano-12m": replace(
        _scale, hidden_size=256, intermediate_size=1024, hybrid_override_pattern="M-M-M*-M-M-M*-M-M-M-M-",
        initializer_range=256**-0.5,
    ),
    "nano-9m": replace(
        _scale, hidden_size=224, intermediate_size=784, hybrid_override_pattern="M-M-M*-M-M-M*-M-M-M-",
        initializer_range=224**-0.5,
    ),
    # the released models
    "nano-12b": replace(
        _released, hidden_size=5120, intermediate_size=20480,
        hybrid_override_pattern="M-M-M-M*-" * 6 + "M-M-M-M-",
    ),
    "nano-9b": replace(
        _released, hidden_size=4480, intermediate_size=15680,
        hybrid_override_pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
    ),
    # attention + MLP with Qwen3-8B's parameters a layer and bytes a token: the other side of the throughput comparison
    # (its gated MLP has three matrices of 4096 x 12288; ours has two, so 18432 gives the same count)
    "qwen3-8b-shape": ModelConfig(
        hidden_size=4096, hybrid_override_pattern="*-" * 36, vocab_size=151936, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, intermediate_size=18432,
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The pieces
# ---------------------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / rms(x) * weight in float32, with one cast at the end (Llama casts before the weight; this family after)."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.impl = "torch"  # or "triton": kernels/norm.py, one pass over x instead of seven; for inference

    def forward(self, x):
        if self.impl == "triton" and not torch.is_grad_enabled():
            from kernels import norm

            return norm.rms_norm(x, self.weight, self.eps)
        wide = torch.promote_types(x.dtype, torch.float32)
        v = x.to(wide)
        v = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + self.eps)
        return (v * self.weight).to(x.dtype)


class MLP(nn.Module):
    """down(relu(up(x))^2): no gate, so two matrices instead of three; the square makes most activations exactly zero
    or clearly positive (Primer, So et al. 2021)."""

    def __init__(self, hidden_size, intermediate_size, bias=False):
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x):
        h = self.up_proj(x)
        # without gradients in place (whoever hooks up_proj should copy): h is the largest tensor there is
        h = F.relu(h).square() if torch.is_grad_enabled() else h.relu_().square_()
        return self.down_proj(h)


class Block(nn.Module):
    """One letter of the pattern: x + mixer(norm(x))."""

    def __init__(self, config, letter):
        super().__init__()
        c, self.letter, self.impl = config, letter, "torch"
        self.norm = RMSNorm(c.hidden_size, c.layer_norm_epsilon)
        if letter == "M":
            self.mixer = Mamba2Mixer(
                c.hidden_size, c.mamba_num_heads, c.mamba_head_dim, c.n_groups, c.ssm_state_size, c.conv_kernel,
                c.chunk_size, c.layer_norm_epsilon, c.use_bias, c.use_conv_bias, c.time_step_limit,
            )  # fmt: skip
        elif letter == "*":
            self.mixer = Attention(
                c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.attention_bias
            )
        else:
            self.mixer = MLP(c.hidden_size, c.intermediate_size, c.mlp_bias)

    def step(self, x, layer_cache, lengths, mask):
        """One token a row, x (b, d), of rows of different lengths: see `NemotronH.step`."""
        if self.impl == "triton" and (self.letter != "M" or layer_cache.ssm.dtype == torch.float32):
            from kernels import step

            return step.block(self, x, layer_cache, lengths)
        u = self.norm(x)[:, None]
        if self.letter == "*":
            y = self.mixer.step(u, layer_cache, lengths, mask)
        else:
            y = self.mixer(u, layer_cache) if self.letter == "M" else self.mixer(u)
        return x + y[:, 0]

    def forward(self, x, layer_cache=None, start=0, seq_idx=None, mask=None):
        u = self.norm(x)
        if self.letter == "M":
            return x + self.mixer(u, layer_cache, seq_idx)
        if self.letter == "*":
            return x + self.mixer(u, layer_cache, start, mask)
        return x + self.mixer(u)


class Backbone(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, letter) for letter in config.hybrid_override_pattern)
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)


class Cache:
    """What a batch of rows remembers between calls: a state for each Mamba layer, keys and values for each attention.

    length: positions seen so far, the same for all rows (shorter prompts are padded on the left; see NemotronH).
    seq_idx (b, max_length) or None: the document of every cached position, once a call has named documents.
    """

    def __init__(self, model, batch_size, max_length, ssm_dtype=None):
        weight, c = model.lm_head.weight, model.config
        self.batch_size, self.max_length, self.length, self.seq_idx = batch_size, max_length, 0, None
        self.layers = []
        for block in model.backbone.layers:
            if block.letter == "M":
                self.layers.append(block.mixer.new_state(batch_size, weight.device, weight.dtype, ssm_dtype))
            elif block.letter == "*":
                self.layers.append(
                    KVCache(batch_size, c.num_key_value_heads, max_length, c.head_dim, weight.device, weight.dtype)
                )
            else:
                self.layers.append(None)

    def bytes(self):
        """Bytes held by the tensors of the cache."""
        tensors = [t for layer in self.layers if layer is not None for t in vars(layer).values()]
        return sum(t.numel() * t.element_size() for t in tensors)

    def note_documents(self, seq_idx, l):
        """Record the documents of the next l positions; forget rows that start a new one; return the ids in full."""
        if self.length + l > self.max_length:
            raise ValueError(
                f"the cache holds {self.max_length} positions: {self.length} are used and {l} more were given; "
                f"make it with model.new_cache(batch_size, max_length={self.length + l}) or larger"
            )
        if seq_idx is None and self.seq_idx is None:
            return None  # one document a row, from the first position on
        if self.seq_idx is None:
            device = self.layers_device()
            self.seq_idx = torch.zeros(self.batch_size, self.max_length, dtype=torch.int32, device=device)
        before = self.seq_idx[:, max(self.length - 1, 0)]
        if seq_idx is None:  # the same documents go on
            seq_idx = before[:, None].expand(-1, l)
        elif self.length:
            for layer in self.layers:
                if hasattr(layer, "forget"):
                    layer.forget(seq_idx[:, 0] != before)
        self.seq_idx[:, self.length : self.length + l] = seq_idx
        return self.seq_idx[:, : self.length + l]

    def layers_device(self):
        return next(next(iter(vars(layer).values())).device for layer in self.layers if layer is not None)


class NemotronH(nn.Module):
    """The whole model. `model(input_ids, cache=None, seq_idx=None) -> logits`.

    input_ids (b, l) int64; logits (b, l, vocab) float32.
    cache: from `new_cache`; the call continues from it and updates it, for any number of tokens, one or many.
    seq_idx (b, l) integers: the document of every token in a packed row. Documents are runs of equal values and no two
    documents of a row share a value; convolution, SSM state and attention all stop at a document's edge. Padding on the
    left is just another document: give the padding -1 and the text 0, and the text's logits are as if it stood alone.
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.impl = config, "torch"
        self.backbone = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if self.lm_head.weight.device.type != "meta":
            self.init_weights()

    def forward(self, input_ids, cache=None, seq_idx=None):
        return self.lm_head(self.features(input_ids, cache, seq_idx)).float()

    def features(self, input_ids, cache=None, seq_idx=None):
        """The stream after the final norm, (b, l, d): what the head reads. Arguments as in `forward`."""
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids must be (batch, length) with length at least 1; got {tuple(input_ids.shape)}")
        if seq_idx is not None and seq_idx.shape != input_ids.shape:
            raise ValueError(f"seq_idx {tuple(seq_idx.shape)} must have input_ids' shape {tuple(input_ids.shape)}")
        l, start, layer_caches = input_ids.shape[1], 0, [None] * len(self.backbone.layers)
        ids = seq_idx
        if cache is not None:
            if cache.batch_size != input_ids.shape[0]:
                raise ValueError(f"the cache has {cache.batch_size} rows, input_ids {input_ids.shape[0]}")
            start, layer_caches = cache.length, cache.layers
            ids = cache.note_documents(seq_idx, l)  # (b, start + l) or None
            seq_idx = None if ids is None or l == 1 else ids[:, start:]  # one token cannot straddle an edge
        mask = None
        if ids is not None:
            m = ids.shape[1]
            mask = (ids[:, start:, None] == ids[:, None, :]).unsqueeze(1)  # (b, 1, l, m)
            mask = mask & torch.ones(l, m, dtype=torch.bool, device=ids.device).tril(m - l)

        x = self.backbone.embeddings(input_ids)
        for block, layer_cache in zip(self.backbone.layers, layer_caches):
            x = block(x, layer_cache, start, seq_idx, mask)
        if cache is not None:
            cache.length += l
        return self.backbone.norm_f(x)

    def step(self, tokens, cache, lengths, longest):
        """Logits (b, vocab) after one more token a row, where rows have lengths of their own.

        tokens and lengths (b,) int64: row i's token goes to its position lengths[i], at most `longest`. The cache is
        used as a place for rows and updated in place; its own `length` says nothing here. Nothing in here waits for the
        device or depends on values, so the call can be captured in a CUDA graph (engine.py)."""
        mask = None
        if self.impl != "triton":  # whose kernel looks at the lengths themselves
            mask = (torch.arange(longest + 1, device=tokens.device) <= lengths[:, None])[:, None, None]
        x = self.backbone.embeddings(tokens)
        for block, layer_cache in zip(self.backbone.layers, cache.layers):
            x = block.step(x, layer_cache, lengths, mask)
        if self.impl == "triton":
            from kernels import step

            return step.head(self, x).float()
        return self.lm_head(self.backbone.norm_f(x)).float()

    def use(self, impl):
        """Let "torch" or "triton" (device.choose_impl says which can be had) compute the Mamba-2 layers between their
        projections, and without gradients also norms and decode steps."""
        for module in self.modules():  # the model itself, blocks, norms, mixers, int8 matrices
            if hasattr(module, "impl"):
                module.impl = impl
        return self

    def new_cache(self, batch_size, max_length, ssm_dtype=None):
        """An empty Cache for `batch_size` rows of at most `max_length` positions, on the model's device and dtype; the
        SSM states in float32, or in ssm_dtype (see Mamba2Mixer.new_state)."""
        return Cache(self, batch_size, max_length, ssm_dtype)

    @torch.no_grad()
    def init_weights(self):
        """Megatron's rules. Matrices N(0, std); those that write into the stream N(0, std / sqrt(layers)), so that the
        stream's variance does not grow with depth. dt starts log-uniform in [0.001, 0.1] and A uniform in [-16, -1]:
        heads that remember from a few tokens to thousands."""
        c, std = self.config, self.config.initializer_range
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                writes = name.endswith(("out_proj", "o_proj", "down_proj"))
                module.weight.normal_(0, std / math.sqrt(c.num_hidden_layers) if writes else std)
                if getattr(module, "bias", None) is not None:
                    module.bias.zero_()
            elif isinstance(module, Mamba2Mixer):
                module.A_log.copy_(torch.empty_like(module.A_log).uniform_(1, 16).log())
                module.D.fill_(1)
                low, high = math.log(c.time_step_min), math.log(c.time_step_max)
                dt = torch.empty_like(module.dt_bias).uniform_(low, high).exp().clamp_min(c.time_step_floor)
                module.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        # conv1d keeps PyTorch's default, uniform in +-1/sqrt(k); norms start at 1


def build(preset_or_config, device="cpu", dtype=torch.float32):
    """A freshly initialised model from a preset's name or a ModelConfig."""
    config = preset_or_config
    if isinstance(config, str):
        if config not in PRESETS:
            raise ValueError(f"unknown preset {config!r}; choose one of {', '.join(PRESETS)}")
        config = replace(PRESETS[config])
    with torch.device(device):
        return NemotronH(config).to(dtype)
