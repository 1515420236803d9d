"""config.json in its two dialects: the released one and that of transformers 5, read both, written the first.

Names of fields differ between the dialects and between older folders; some fields would change the arithmetic, and a
value that this model does not compute is refused rather than ignored. This file must not know weights.
Sources: released config.json; transformers 5.23 for the second dialect.
"""

import math
from dataclasses import asdict, fields

import torch

from model import LETTERS, ModelConfig
from safefile import CheckpointError

# Other spellings of our fields: the constructor names of the released configuration class, and older folders.
ALIASES = {
    "attention_head_dim": "head_dim",
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_chunk_size": "chunk_size",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_dt_min": "time_step_min",
    "mamba_dt_max": "time_step_max",
    "mamba_dt_limit": "time_step_limit",
    "mamba_dt_init_floor": "time_step_floor",
}
# Sizes that a folder must state. Their defaults in ModelConfig are a toy's, so a default would be a guess.
REQUIRED = (
    "hidden_size vocab_size intermediate_size mamba_num_heads mamba_head_dim n_groups ssm_state_size conv_kernel "
    "num_attention_heads num_key_value_heads head_dim"
).split()
LAYER_KINDS = {"linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*", "mlp": "-", "moe": "E"}

# Fields that would change the arithmetic, and the values this model computes; the first is the one we write. `expand`
# is ignored on purpose: the inner width is mamba_num_heads * mamba_head_dim, which the 9B has no `expand` for.
FIXED = {
    "model_type": ("nemotron_h",),
    "mlp_hidden_act": ("relu2",),
    "mamba_hidden_act": ("silu", "swish"),
    "tie_word_embeddings": (False,),
    "residual_in_fp32": (False,),
    "sliding_window": (None,),
}
ABSENT = {  # the same, for fields that the released files do not have at all
    "num_nextn_predict_layers": (0,), "quantization_config": (), "partial_rotary_factor": (), "rope_theta": (),
    "rope_scaling": (), "rope_parameters": (),
}  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def config_from_dict(d):
    """The ModelConfig that a config.json describes, in either dialect. Unknown fields are ignored.

    Raises CheckpointError if a size is missing, a value has the wrong type, two fields contradict each other, or a
    field asks for arithmetic that this model does not do (tied embeddings, experts, rotary positions, ...): a model
    that is nearly the right one would only be quietly wrong.
    """
    if not isinstance(d, dict):
        raise CheckpointError(f"config.json must hold a JSON object; it holds a {type(d).__name__}")
    for name, known in (FIXED | ABSENT).items():
        if d.get(name) is not None and d[name] not in known:
            computed = f"only {known[0]!r} is computed here" if known else "this model has no such thing"
            raise CheckpointError(f"config.json has {name} {d[name]!r}, but {computed}: use another checkpoint")
    values = {"hybrid_override_pattern": _pattern(d)}
    for other, name in [(f.name, f.name) for f in fields(ModelConfig)] + list(ALIASES.items()):
        if name == "hybrid_override_pattern" or d.get(other) is None:
            continue
        if name in values and values[name] != d[other]:
            raise CheckpointError(f"config.json contradicts itself: {name} {values[name]!r} and {other} {d[other]!r}")
        values[name] = d[other]
    missing = [name for name in REQUIRED if name not in values]
    if missing:
        raise CheckpointError(f"config.json does not state {', '.join(missing)}: add what the model was trained with")
    values.setdefault("chunk_size", 128)  # only a blocking of the sum
    if "time_step_limit" in values:
        values["time_step_limit"] = _time_step_limit(values["time_step_limit"])
    if isinstance(values.get("eos_token_id"), list):  # a list of tokens that end a text: the first is the main one
        values["eos_token_id"] = (values["eos_token_id"] or [ModelConfig.eos_token_id])[0]
    for name, value in values.items():
        kind = type(getattr(ModelConfig, name))
        fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise CheckpointError(f"config.json has {name} {value!r}, which should be of type {kind.__name__}")
    try:
        return ModelConfig(**values)
    except ValueError as error:
        raise CheckpointError(f"config.json: {error}") from None


def _pattern(d):
    """The pattern string, from a string or a list of layer kinds, checked against num_hidden_layers."""
    pattern, kinds = d.get("hybrid_override_pattern"), d.get("layers_block_type", d.get("layer_types"))
    if kinds is not None:
        if not isinstance(kinds, list) or any(not isinstance(kind, str) or kind not in LAYER_KINDS for kind in kinds):
            names = "linear_attention, full_attention, mlp"
            raise CheckpointError(f"config.json has layers_block_type {kinds!r}; use a list of {names}")
        listed = "".join(LAYER_KINDS[kind] for kind in kinds)
        if pattern not in (None, listed):
            raise CheckpointError(
                f"config.json contradicts itself: hybrid_override_pattern {pattern} but layers_block_type {listed}"
            )
        pattern = listed
    if pattern is None:
        raise CheckpointError("config.json has neither hybrid_override_pattern nor layers_block_type: add the pattern")
    if not isinstance(pattern, str) or not pattern:
        raise CheckpointError(f"config.json has hybrid_override_pattern {pattern!r}; it must be a text like M-M*-M-")
    if "E" in pattern:
        raise CheckpointError(
            f"{pattern.count('E')} of the checkpoint's {len(pattern)} layers are mixtures of experts (MoE), which this "
            f"model does not have: use one made of {', '.join(f'{k} ({v})' for k, v in LETTERS.items())}"
        )
    layers = d.get("num_hidden_layers")
    if layers is not None and layers != len(pattern):
        raise CheckpointError(
            f"config.json has num_hidden_layers {layers!r}, but the pattern {pattern} has {len(pattern)} letters: "
            "correct the wrong one"
        )
    return pattern


def _time_step_limit(limit):
    """(low, high) floats. JSON has no infinity: folders say Infinity bare, as text, or as {"__float__": "Infinity"}."""
    try:
        numbers = tuple(float(v["__float__"] if isinstance(v, dict) else v) for v in limit)
        if len(numbers) == 2 and 0 <= numbers[0] <= numbers[1]:
            return numbers
    except (TypeError, ValueError, KeyError):
        pass
    raise CheckpointError(f"config.json has time_step_limit {limit!r}; it must be two numbers, low and high")


def config_to_dict(config, dtype=torch.float32):
    """The released dialect of config.json, as a dict of strict JSON.

    The released files contain a bare `Infinity`, which is not JSON; we write it as transformers 5 does. Only the
    fields that some reader uses are written: sizes, what a mixer computes, tokens, and the rules of initialisation.
    """
    d = asdict(config) | {name: known[0] for name, known in FIXED.items()}
    limit = [v if math.isfinite(v) else {"__float__": "Infinity"} for v in map(float, config.time_step_limit)]
    d |= {
        "architectures": ["NemotronHForCausalLM"],
        "torch_dtype": str(dtype).removeprefix("torch."),
        "num_hidden_layers": config.num_hidden_layers,
        "time_step_limit": limit,
        "rms_norm_eps": config.layer_norm_epsilon,
        "mamba_proj_bias": config.use_bias,
        "rescale_prenorm_residual": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "use_cache": True,
        "num_logits_to_keep": 1,
    }
    return dict(sorted(d.items()))
