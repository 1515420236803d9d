"""Write tests/golden_tiny.safetensors: logits of transformers on our tiny random model, so that the parity check exists
where transformers does not. Run from the repository root, with transformers installed:

    python tests/make_golden.py

The weights are not stored: `reference.ours` makes them from a seed. The file names the versions that wrote it.
"""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)

from reference import TINY, ours, reference  # noqa: E402

GOLDEN = Path(__file__).resolve().parent / "golden_tiny.safetensors"
SEED, LENGTH = 7, 3 * TINY["chunk_size"] + 2


def golden_ids():
    """(1, l) token ids by a formula, so that no random generator of any version matters."""
    t = torch.arange(LENGTH)
    return ((t * t * 31 + t * 17 + 5) % TINY["vocab_size"])[None]


def main():
    import transformers

    model = ours(seed=SEED)
    ids = golden_ids()
    with torch.no_grad():
        logits = reference(model)(ids, use_cache=False).logits[0, ::5]
    # one sum over all weights tells a wrong seed or a changed generator from a wrong model
    check = sum(p.double().abs().sum() for p in model.parameters())
    temporary = GOLDEN.with_suffix(".tmp")
    save_file(
        {"logits_every_5th": logits.contiguous(), "sum_of_abs_weights": check.reshape(1)},
        temporary,
        metadata={"transformers": transformers.__version__, "torch": torch.__version__, "seed": str(SEED)},
    )
    os.replace(temporary, GOLDEN)
    print(f"{GOLDEN.name}: {GOLDEN.stat().st_size} bytes, logits {tuple(logits.shape)}")


if __name__ == "__main__":
    main()
