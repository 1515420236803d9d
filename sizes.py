"""How large and how fast, before anything is built: parameters, bytes, FLOPs, and what fits in a memory.

Whether a model fits, and how fast it can speak, follows from its config by multiplication. Three sums do nearly all:

    weights   parameters x bytes a parameter                     once, however many rows
    a token   2 x kv_heads x head_dim x bytes x attention layers    keys and values, for each token of each row
    a row     i x n x 4 bytes and a small window x Mamba layers     the states, however long the row is

For the 9B with 131,072 tokens: 16.56 + 2.00 + 0.13 = 18.69 GiB. Its 4 attention layers keep 16 KiB a token, where a
transformer of the same size (Qwen3-8B, 36 layers) keeps 144: so nine times the tokens fit beside the weights, in
longer rows or in more of them.

More rows are also more speed. To say one token, a GPU must read every weight once, whether for one row or for fifty;
the arithmetic hides behind the reading. A step therefore takes (weights + each row's keys, values and states) /
bandwidth: the *roofline* of decoding, which no program can beat with the same bytes. `roofline` below is the report's
comparison: the largest batch that fits, and the tokens a second that this bound then allows.

Formulas first; the tests hold them against live models. This file must not know devices: the caller says how much room
there is. Source: report section 4 (memory budget) and Figure 1 (throughput at the largest batch that fits).
"""

import math

from model import LETTERS


def count_parameters(config):
    """Parameters by kind, from the formula: {"mamba", "attention", "mlp", "embedding", "head", "norm", "total"}."""
    c, pattern = config, config.hybrid_override_pattern
    d, i, h, cc = c.hidden_size, c.mamba_inner, c.mamba_num_heads, c.conv_channels
    mamba = d * (i + cc + h) + cc * (c.conv_kernel + c.use_conv_bias) + 3 * h + i + i * d
    mamba += c.use_bias * (i + cc + h + d)
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    attention = d * (q + 2 * kv) + q * d + c.attention_bias * (q + 2 * kv + d)
    mlp = 2 * d * c.intermediate_size + c.mlp_bias * (d + c.intermediate_size)
    counts = {
        "mamba": mamba * pattern.count("M"),
        "attention": attention * pattern.count("*"),
        "mlp": mlp * pattern.count("-"),
        "embedding": c.vocab_size * d,
        "head": c.vocab_size * d,
        "norm": (len(pattern) + 1) * d,
    }
    return counts | {"total": sum(counts.values())}


def describe(config):
    """Two lines for the start-up report: the pattern drawn, and the parameters by kind."""
    counts = count_parameters(config)
    kinds = ", ".join(f"{k} {v / counts['total']:.0%}" for k, v in counts.items() if k != "total")
    pattern = config.hybrid_override_pattern
    made_of = ", ".join(f"{pattern.count(letter)} {name}" for letter, name in LETTERS.items())
    return f"{pattern}  ({len(pattern)} layers: {made_of})\n{counts['total']:,} parameters: {kinds}"


def flops_per_token(config, length):
    """Forward FLOPs a token in a row of `length` tokens: 2 for each weight of each matrix, plus attention's and the
    scan's own products (causal halves counted as halves). Training costs three times this."""
    c, pattern = config, config.hybrid_override_pattern
    counts = count_parameters(c)
    matmul = counts["mamba"] + counts["attention"] + counts["mlp"] + counts["head"]
    attention = 2 * c.num_attention_heads * c.head_dim * length  # scores and values, half of them masked
    q = min(c.chunk_size, length)
    scan = q * c.n_groups * c.ssm_state_size + q * c.mamba_inner + 4 * c.mamba_inner * c.ssm_state_size
    return 2 * matmul + attention * pattern.count("*") + scan * pattern.count("M")


# ---------------------------------------------------------------------------------------------------------------------
# Bytes held
# ---------------------------------------------------------------------------------------------------------------------


def weights_bytes(config, weight_bytes=2, int8=False):
    """Bytes of all weights. int8: the two projections of every Mamba and MLP layer at 1 byte a weight and a float32
    scale for each output row; attention, convolution, norms, embedding and head stay at `weight_bytes`."""
    total = count_parameters(config)["total"] * weight_bytes
    if not int8:
        return total
    c, mambas, mlps = config, config.hybrid_override_pattern.count("M"), config.hybrid_override_pattern.count("-")
    width = c.mamba_inner + c.conv_channels + c.mamba_num_heads  # in_proj's output
    small = c.hidden_size * (mambas * (width + c.mamba_inner) + mlps * 2 * c.intermediate_size)
    scales = mambas * (width + c.hidden_size) + mlps * (c.intermediate_size + c.hidden_size)
    return total - small * (weight_bytes - 1) + scales * 4


def memory_bytes(config, tokens, batch_size=1, weight_bytes=2, kv_bytes=2, ssm_bytes=4, int8=False):
    """Bytes to hold the weights and the caches of `batch_size` rows of `tokens` tokens (report section 4; activations
    not counted). Returns {"weights", "kv", "ssm", "conv", "total"}."""
    c, pattern = config, config.hybrid_override_pattern
    kv = 2 * c.num_key_value_heads * c.head_dim * tokens * kv_bytes * pattern.count("*")
    ssm = c.mamba_inner * c.ssm_state_size * ssm_bytes * pattern.count("M")
    conv = c.conv_channels * (c.conv_kernel - 1) * weight_bytes * pattern.count("M")
    parts = {
        "weights": weights_bytes(c, weight_bytes, int8),
        "kv": kv * batch_size,
        "ssm": ssm * batch_size,
        "conv": conv * batch_size,
    }
    return parts | {"total": sum(parts.values())}


def work_bytes(config, tokens, rows=1, weight_bytes=2):
    """About what is needed besides weights and cache while a prefill reads a piece of `tokens` tokens (with the Triton
    kernels; PyTorch's own operations take two to three times this), and for the logits of `rows` rows: the activations
    of the widest layer, all of them at once, and for a Mamba layer a state in weight_bytes for every 64 tokens."""
    c = config
    widths = {
        "M": 3 * c.mamba_inner + 2 * c.conv_channels + c.mamba_num_heads + c.mamba_inner * c.ssm_state_size // 64,
        "*": 2 * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim,
        "-": c.intermediate_size,
    }
    widest = max(widths[letter] for letter in set(c.hybrid_override_pattern)) + 3 * c.hidden_size
    return tokens * widest * weight_bytes + rows * c.vocab_size * (weight_bytes + 4)


# ---------------------------------------------------------------------------------------------------------------------
# What fits. room, work: bytes; `work` is set aside for what a call computes and forgets. Keys, values and windows are
# as wide as the weights (`weight_bytes`), states are float32.
# ---------------------------------------------------------------------------------------------------------------------


def row_bytes(config, tokens, weight_bytes=2):
    """Bytes of the cache of one row of `tokens` tokens."""
    parts = memory_bytes(config, tokens, 1, weight_bytes, weight_bytes)
    return parts["kv"] + parts["ssm"] + parts["conv"]


def largest_batch(config, room, tokens, int8=False, work=0, weight_bytes=2, row_work=0):
    """How many rows of `tokens` tokens fit beside the weights; 0 if none does. row_work: what each row adds to work."""
    left = room - work - weights_bytes(config, weight_bytes, int8)
    return max(0, int(left // (row_bytes(config, tokens, weight_bytes) + row_work)))


def longest_context(config, room, rows, int8=False, work=0, weight_bytes=2):
    """How many tokens each of `rows` rows may have; 0 if not one fits, infinite if there is no attention to keep keys
    and values."""
    state = row_bytes(config, 0, weight_bytes)
    left = room - work - weights_bytes(config, weight_bytes, int8) - rows * state
    each = rows * (row_bytes(config, 1, weight_bytes) - state)
    if not each:
        return math.inf if left >= 0 else 0
    return max(0, int(left // each))


def fits(config, room, tokens, rows, int8=False, work=0, weight_bytes=2, name="the device"):
    """None if the weights and `rows` rows of `tokens` tokens fit in `room` bytes. Else one sentence: what is needed,
    what `name` has, and what would fit (other weights, shorter rows, fewer rows) by the same formula."""
    weights, row = weights_bytes(config, weight_bytes, int8), row_bytes(config, tokens, weight_bytes)
    if weights + rows * row + work <= room:
        return None

    def ways(int8, weight_bytes):
        """What fits with such weights: [""] for all that was asked."""
        longest = longest_context(config, room, rows, int8, work, weight_bytes)
        if longest >= tokens:
            return [""]
        most, found = largest_batch(config, room, tokens, int8, work, weight_bytes), []
        if longest:
            found.append(f"{_count(rows, 'row')} of at most {_count(longest, 'token')}")
        if most:
            found.append(f"{_count(most, 'row')} of {_count(tokens, 'token')}")
        if not found and (longest := longest_context(config, room, 1, int8, work, weight_bytes)):
            found.append(f"1 row of at most {_count(longest, 'token')}")
        return found

    other = {} if weight_bytes <= 2 else {"16-bit weights": ways(int8, 2)}
    other |= {} if int8 else {"int8 weights": ways(True, weight_bytes)}
    other |= {} if int8 or weight_bytes <= 2 else {"int8 and 16-bit weights": ways(True, 2)}
    options = [kind for kind, found in other.items() if found == [""]] + ways(int8, weight_bytes)
    options = options or [f"{kind} and {way}" for kind, found in other.items() for way in found]
    least = weights_bytes(config, min(weight_bytes, 2), True) + row_bytes(config, 1, min(weight_bytes, 2)) + work
    advice = "this would fit: " + ", or ".join(options)
    return (
        f"the model of {count_parameters(config)['total']:,} parameters needs {_size(weights)} for its "
        f"{'int8 ' * int8}weights and {_size(rows * row)} for {_count(rows, 'row')} of {_count(tokens, 'token')}, "
        f"{_size(weights + rows * row)}{f' and about {_size(work)} to work in' * bool(work)}; {name} has "
        f"{_size(max(0, room))}: "
        + (advice if options else f"even int8 weights and 1 row of 1 token, {_size(least)}, would not fit")
    )


def _count(n, what):
    return f"{n:,} {what}" + "s" * (n != 1)


def _size(n):
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 / 10 else f"{n / 2**20:.2f} MiB"


# ---------------------------------------------------------------------------------------------------------------------
# Bytes moved: the roofline of decoding
# ---------------------------------------------------------------------------------------------------------------------


def step_bytes(config, lengths, weight_bytes=2, kv_bytes=2, ssm_bytes=4, int8=False):
    """Bytes that one decode step must move for rows that hold lengths[i] tokens: all weights once (of the embedding
    table only a line a row, left out here); per row keys and values read, states and windows read and written. The keys
    and values written, those of one token, are left out too."""
    c = config
    weights = weights_bytes(c, weight_bytes, int8) - count_parameters(c)["embedding"] * weight_bytes
    rows = memory_bytes(c, sum(lengths), 1, weight_bytes, kv_bytes)["kv"]
    state = memory_bytes(c, 0, len(lengths), weight_bytes, kv_bytes, ssm_bytes)
    return weights + rows + 2 * (state["ssm"] + state["conv"])


def roofline(config, room, prompt, answer, bandwidth, int8=False):
    """The decoding speed that no 16-bit program can pass: (rows, seconds a step, tokens a second).

    rows: the largest batch of `prompt` + `answer` tokens that fits in `room` bytes. The step is taken half way through
    the answer; bandwidth in bytes a second."""
    rows = largest_batch(config, room, prompt + answer, int8)
    seconds = step_bytes(config, [prompt + answer / 2] * rows, int8=int8) / bandwidth
    return rows, seconds, rows / seconds
