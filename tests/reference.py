"""The reference nobody here wrote: transformers' NemotronHForCausalLM on tiny random weights, offline.

Its mixer clamps dt at 0.001 in the chunked path only (a known upstream quirk, absent from its own decode step and from
the kernels the released model was trained with); the clamp is set to zero before comparing.
"""

import math

import pytest
import torch

from model import ModelConfig, NemotronH

TINY = dict(
    hidden_size=64, hybrid_override_pattern="M-M*-M-", vocab_size=263, mamba_num_heads=8, mamba_head_dim=20, n_groups=2,
    ssm_state_size=16, chunk_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=24, intermediate_size=112,
)  # fmt: skip
THREE_GROUPS = TINY | dict(
    hybrid_override_pattern="MM*-*M-",
    mamba_num_heads=6,
    mamba_head_dim=12,
    n_groups=3,
    ssm_state_size=24,
    chunk_size=8,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=20,
)


def randomise(model, seed=0):
    """Every parameter random, dt on both sides of 0.001: no norm weight left at 1, so that no mistake can hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if name.endswith("A_log"):
                noise = (noise.abs() * 4 + 0.5).log()
            elif name.endswith("dt_bias"):
                noise = noise * 2 - 5
            elif name.endswith("norm.weight") or name.endswith("norm_f.weight") or name.endswith(".D"):
                noise = 1 + 0.3 * noise
            elif "embeddings" in name:
                pass
            elif "conv1d" in name:
                noise = noise * 0.4
            else:
                noise = noise / math.sqrt(p.shape[-1])
            p.copy_(noise)
    return model


def ours(dtype=torch.float32, seed=0, **overrides):
    return randomise(NemotronH(ModelConfig(**(TINY | overrides))), seed).to(dtype)


def neutralise_dt_floor(hf_model):
    for module in hf_model.modules():
        if hasattr(module, "time_step_min"):  # 5.15
            module.time_step_min = 0.0
        if hasattr(module, "time_step_limit"):  # 5.23
            module.time_step_limit = (0.0, math.inf)
    return hf_model


def reference(model):
    """transformers' model with the weights of ours."""
    transformers = pytest.importorskip("transformers", reason="the reference implementation is a test extra")
    c = model.config
    names = {"M": "linear_attention", "*": "full_attention", "-": "mlp"}
    config = transformers.NemotronHConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size,
        layers_block_type=[names[letter] for letter in c.hybrid_override_pattern],
        mamba_num_heads=c.mamba_num_heads, mamba_head_dim=c.mamba_head_dim, n_groups=c.n_groups,
        ssm_state_size=c.ssm_state_size, conv_kernel=c.conv_kernel, chunk_size=c.chunk_size,
        num_attention_heads=c.num_attention_heads, num_key_value_heads=c.num_key_value_heads, head_dim=c.head_dim,
        intermediate_size=c.intermediate_size, tie_word_embeddings=False, use_bias=False, use_conv_bias=True,
        bos_token_id=1, eos_token_id=12, pad_token_id=0,
    )  # fmt: skip
    hf = transformers.NemotronHForCausalLM(config).eval()
    state = {k.replace("backbone.", "model."): v for k, v in model.state_dict().items()}
    missing, unexpected = hf.load_state_dict(state, strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    return neutralise_dt_floor(hf)
