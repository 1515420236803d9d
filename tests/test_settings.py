"""How a script ends: its exit code, and one sentence for what its user can mend."""

import pytest
import torch

from settings import finish


@pytest.mark.parametrize(
    "error, code, words",
    [
        (None, 0, ""),
        (ValueError("--x is 3: lower it"), 2, "try.py: --x is 3: lower it\n"),
        (OSError("no such folder"), 2, "try.py: no such folder\n"),
        (torch.OutOfMemoryError("of a card"), 2, "try.py: out of memory: lower --y\n"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "try.py: out of memory: lower --y\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes(error, code, words, capsys):
    def run():
        if error:
            raise error

    assert finish("try", run, "lower --y") == code
    printed = capsys.readouterr()
    assert printed.err == words and not printed.out


def test_a_fault_of_the_program_is_not_hidden():
    with pytest.raises(RuntimeError, match="a fault"):
        finish("try", lambda: (_ for _ in ()).throw(RuntimeError("a fault")), "")
