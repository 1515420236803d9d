"""What all stages share: what they begin from, and the optimizer's step."""

import copy
from types import SimpleNamespace

import pytest
import torch
from fine_tuned import base_model, vocabulary

from checkpoint import save_pretrained
from stage import open_start, take_step

WISH = dict(device="cpu", dtype="float32", impl="torch")


def test_a_start_is_in_float32_whatever_was_saved(tmp_path):
    save_pretrained(tmp_path, copy.deepcopy(base_model()).bfloat16(), vocabulary())
    start = open_start("sft1", SimpleNamespace(checkpoint=str(tmp_path), **WISH))
    assert {p.dtype for p in start.model.parameters()} == {torch.float32} == {start.dtype}
    assert start.parameters == sum(p.numel() for p in start.model.parameters()) and start.model.impl == "torch"
    assert start.tokenizer.ranks == vocabulary().ranks and "float32 matrix products" in start.why
    with start.autocast():
        assert not torch.is_autocast_enabled("cpu")
    half = open_start("sft1", SimpleNamespace(checkpoint=str(tmp_path), **WISH | {"dtype": "bfloat16"}))
    with half.autocast():
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16 and torch.is_autocast_enabled("cpu")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    save_pretrained(tmp_path, base_model(), None)
    with pytest.raises(ValueError, match="has no tokenizer.json, so no conversation can be written"):
        open_start("sft1", SimpleNamespace(checkpoint=str(tmp_path), **WISH))


def test_a_step_cuts_the_norm_tells_what_it_was_and_forgets():
    model = torch.nn.Linear(3, 1, bias=False)
    before, scaler = model.weight.detach().clone(), torch.amp.GradScaler("cpu", enabled=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    (model.weight * torch.tensor([3.0, 0.0, 4.0])).sum().backward()
    assert take_step(model, optimizer, scaler, 0.5).item() == pytest.approx(5.0)
    torch.testing.assert_close(before - model.weight.detach(), torch.tensor([[0.3, 0.0, 0.4]]), rtol=1e-4, atol=1e-6)
    assert model.weight.grad is None
