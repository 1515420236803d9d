"""Teacher and student: two models that must speak one language and fit into one memory.

A distribution over words can only be compared with one over the same words, so vocabularies and tokenizers must be
equal; widths and depths need not. What a step takes is counted before anything is trained, from the two shapes alone
(`needed_bytes`). This file must not know training.
"""

from pathlib import Path

import torch

import checkpoint
import parallel
from lean import PIECE, state_bytes
from loss import SLICE
from model import PRESETS, NemotronH, build
from sizes import count_parameters, work_bytes


def open_model(name, device, dtype=None):
    """(model, tokenizer or None) of a checkpoint folder, or noise in the shape of a preset. dtype None: as saved; noise
    in bfloat16."""
    if Path(name).is_dir() or name not in PRESETS:
        return checkpoint.load_pretrained(name, device, dtype)
    return noise(PRESETS[name], device, dtype or torch.bfloat16), None


def noise(config, device, dtype):
    """A model of this ModelConfig with weights as before training, in the dtypes that `load_pretrained` gives."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # so that no float32 copy ever exists
    try:
        model = build(config, device, dtype)
    finally:
        torch.set_default_dtype(before)
    for key, parameter in model.named_parameters():
        if key.rpartition(".")[2] in checkpoint.KEPT_WIDE:
            parameter.data = parameter.data.float()
    return model


def one_language(teacher, student, tokenizers):
    """The tokenizer of both, None if neither has one; ValueError if their ids do not mean the same."""
    words = teacher.config.vocab_size, student.config.vocab_size
    if words[0] != words[1]:
        raise ValueError(
            f"the teacher has {words[0]:,} words and the student {words[1]:,}: distributions over different "
            "vocabularies cannot be compared; give a student that was cut from this teacher"
        )
    known = [t for t in tokenizers if t is not None]
    if len(known) == 2 and (known[0].ranks, known[0].specials) != (known[1].ranks, known[1].specials):
        differ = len(known[0].ranks.items() ^ known[1].ranks.items())
        raise ValueError(
            f"teacher and student have tokenizers that differ in {differ} entries, so the same id is another word to "
            "each: give a student that was cut from this teacher"
        )
    return known[0] if known else None


def needed_bytes(teacher, student, length, tokens, lean=False, recompute=False, wide=2, impl="triton"):
    """Bytes that a step needs on its device: {"teacher", "weights", "gradients", "optimizer", "activations", "loss",
    "total"}. teacher, student: ModelConfigs. wide: bytes of a number in the matrix products; tokens: in a step."""
    count, c = count_parameters(student)["total"], student
    with torch.device("meta"):
        shapes = [p.shape for p in NemotronH(c).parameters()]
    own = 2 if lean else 4  # with AdamW weights are float32, and autocast makes 16-bit copies of the student's
    kept = [parallel.kept_bytes(c, letter, length, wide, impl) for letter in c.hybrid_override_pattern]
    a_token = own * c.hidden_size * len(kept) + max(kept) if recompute else sum(kept)
    head = c.vocab_size * c.hidden_size
    parts = {
        "teacher": own * count_parameters(teacher)["total"],
        "weights": own * count + (0 if lean or wide == 4 else wide * count),
        "gradients": 2 * max(shape.numel() for shape in shapes) if lean else 4 * count,
        "optimizer": state_bytes(shapes) + 4 * 4 * PIECE if lean else 8 * count,
        "activations": max(a_token * tokens, work_bytes(teacher, tokens, 0, wide)),
        "loss": 4 * min(SLICE, 4 * c.vocab_size * tokens) + 8 * head,  # slices; the head's gradient as it is summed
    }
    parts = {name: int(size) for name, size in parts.items()}
    return parts | {"total": sum(parts.values())}
