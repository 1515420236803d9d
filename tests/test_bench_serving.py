"""bench.py decode, prefill, memory, throughput: the commands on toy models, and tables that are made from records."""

import json

import pytest
import torch

import bench
from benchmarks import measure, serving, serving_tables
from benchmarks.timing import Bench
from device import free_bytes
from model import PRESETS
from sizes import memory_bytes, work_bytes


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("section", serving.SECTIONS)
def test_a_section_runs_on_toy_models(section, tmp_path, capsys):
    out = tmp_path / "r.json"
    assert bench.main([section, "--tiny", "--out", str(out), "--commit", "abc"]) == 0
    shown, record = capsys.readouterr().out, json.loads(out.read_text())
    assert list(record) == [section] and record[section]["commit"] == "abc"
    text = serving_tables.tables(section, record[section])
    assert text in shown and f"`python bench.py {section} --tiny`" in text
    for row in record[section]["rows"]:
        for side in (row, row.get("hybrid", {}), row.get("transformer", {})):
            assert all(side[name] > 0 for name in ("ms", "seconds", "speaking", "reading", "formula") if name in side)


def test_sections_share_a_record(tmp_path):
    out = str(tmp_path / "r.json")
    assert (
        bench.main(["decode", "--tiny", "--out", out])
        == bench.main(["throughput", "--tiny", "--sampled", "--out", out])
        == 0
    )
    record = json.loads((tmp_path / "r.json").read_text())
    assert set(record) == {"decode", "throughput"} and record["throughput"]["command"].endswith("--tiny --sampled")


def test_steps_between_the_sampled_ones_are_on_a_line(monkeypatch):
    """Steps of n microseconds after n tokens: the sum over an answer is known."""
    monkeypatch.setattr(serving, "step_seconds", lambda bench, engine, n, steps, repeats: n * 1e-6)
    b = Bench("cpu", torch.float32, 1, say=lambda text: None)
    scale = serving.TINY | dict(steps=0)
    with torch.inference_mode():
        found = serving.run(b, serving.random_model(serving.TINY["hybrid"], b), 2, 6, 101, 16, scale, False)
    assert found["speaking"] == pytest.approx(sum(range(6, 106)) * 1e-6, rel=0.01)
    assert found["tokens_a_second"] == pytest.approx(2 * 101 / (found["reading"] + found["speaking"]))


def test_the_largest_batch_is_the_first_that_runs(monkeypatch):
    """Seven by the formula; in truth at most five, and five only with prompts in small pieces."""
    tried = []

    def run(bench, model, rows, prompt, answer, piece, *rest):
        tried.append((rows, piece))
        if rows > 5 or piece > 256:
            raise torch.OutOfMemoryError
        return {}

    monkeypatch.setattr(serving, "run", run)
    monkeypatch.setattr(serving, "largest_batch", lambda *a: 7)
    monkeypatch.setattr(serving, "collect", lambda bench: None)
    b = Bench("cpu", torch.float32, 1, say=lambda text: None)
    b.cuda = True
    model = type("Model", (), {"config": PRESETS["nano-9b"]})
    assert serving.most_rows(b, model, 1, 1, None, True) == dict(rows=5, formula_rows=7, piece=256)
    assert tried[:4] == [(7, 1024), (7, 512), (7, 256), (6, 1024)]
    monkeypatch.setattr(serving, "largest_batch", lambda *a: 0)
    with pytest.raises(ValueError, match="not one row of 1 \\+ 1 tokens fits in 20.96 GiB"):
        serving.most_rows(b, model, 1, 1, None, True)


def side(speed, roof):
    speeds = dict(tokens_a_second=speed, roofline_tokens_a_second=roof)
    return dict(rows=3, formula_rows=4, piece=512, roofline_rows=4, reading=1.0, speaking=9.0, taken=20.75) | speeds


HEADER = dict(card="Toy", torch="2", date="2026-01-01", commit="abc", command="python bench.py x", copy=4e12, peak=1e15)


def test_numbers_in_the_tables():
    cells = lambda text, i=-1: text.splitlines()[i].strip("| ").split(" | ")
    row = dict(prompt=1024, answer=8192, transformer=side(100, 200), hybrid=side(300, 500))
    text = serving_tables.tables("throughput", {**HEADER, "rows": [row]})
    assert cells(text) == [
        "1,024 / 8,192",
        "3 of 4",
        "100",
        "3 of 4",
        "300",
        "**3.00**",
        "2.50",
        "+20%",
        "3.3",
        "20.75",
    ]
    row = dict(rows=8, tokens=100, int8=True, bits=16, ms=2.0, one_by_one_ms=None, bytes=4e9)
    text = serving_tables.tables("decode", {**HEADER, "rows": [row]})
    assert cells(text) == ["int8", "8", "100", "2.00", "-", "4,000", "4.00", "2,000", "50%"]
    row = dict(tokens=1000, piece=10, cap=19.657, int8=False, seconds=0.5, step_ms=3.0, held=1.0, taken=2.0, flops=1e14)
    text = serving_tables.tables("prefill", {**HEADER, "rows": [row, dict(tokens=9, cap=19.657, refused="too small")]})
    assert cells(text, -3) == ["bf16", "1,000", "10", "19.66", "0.500", "2,000", "20%", "3.00", "1.00", "2.00"]
    assert text.endswith('Under 19.66 GiB the 12B is refused: "too small".')
    row = dict(int8=False, bits=16, shards=4, largest=5e9, seconds=9.0, host=6e9, taken=2**34)
    text = serving_tables.tables("loading", {**HEADER, "rows": [row]})
    assert cells(text) == ["bf16", "4", "5.00", "9.0", "6.00", "1.20", "16.00"]
    row = dict(model="9B", tokens=131072, formula=20.0, held=20.1, peak=21.0)
    text = serving_tables.tables("memory", {**HEADER, "rows": [row]})
    assert cells(text) == ["9B", "131,072", "20.00", "20.10", "+0.50%", "21.00"]


def test_throughput_is_written_with_its_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    (tmp_path / "assets").mkdir()
    (tmp_path / "RESULTS.md").write_text("a\n<!-- bench throughput -->\nold\n<!-- /bench throughput -->\nb\n")
    row = dict(prompt=8192, answer=16384, transformer=side(100, 200), hybrid=side(630, 1300))
    record = {"throughput": {**HEADER, "rows": [row]}}
    (tmp_path / "r.json").write_text(json.dumps(record))
    assert bench.main(["throughput", "--source", str(tmp_path / "r.json"), "--write"]) == 0
    text = (tmp_path / "RESULTS.md").read_text()
    assert "**6.30**" in text and "old" not in text and text.endswith("<!-- /bench throughput -->\nb\n")
    assert (tmp_path / "assets" / "throughput.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "flags, says",
    [
        ("decode", "PyTorch sees none"),
        ("throughput --write", "RESULTS.md must hold <!-- bench throughput -->"),
        ("memory --source nothing.json", "nothing.json cannot be used"),
        ("memory --source other.json", "other.json has no memory: it holds decode"),
        ("decode --tiny --out list.json", "list.json is no record of bench.py: it holds a list"),
        ("decode --tiny --out .", ". cannot be used as a record: IsADirectoryError"),
        ("decode --source other.json", "other.json cannot be used: KeyError 'rows' in its decode"),
        ("decode --rows 0", "'0' is not a whole number"),
        ("prefill --sampled", "unrecognized arguments: --sampled"),
    ],
)
def test_refusals_are_one_sentence(flags, says, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "RESULTS.md").write_text("no markers")
    (tmp_path / "other.json").write_text('{"decode": {}}')
    (tmp_path / "list.json").write_text("[]")
    assert bench.main(flags.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("bench.py: ") and says in err and err.count("\n") == 1
    assert (tmp_path / "RESULTS.md").read_text() == "no markers"


def test_work_of_the_released_model():
    """Seen on an H200 with the Triton kernels: 336, 666 and 1,253 MB for pieces of 2,048, 4,096 and 8,192 tokens."""
    for piece, seen in ((2048, 336e6), (4096, 666e6), (8192, 1253e6)):
        assert 1 < work_bytes(PRESETS["nano-9b"], piece) / seen < 1.25
    assert memory_bytes(PRESETS["nano-9b"], 131072)["total"] + work_bytes(PRESETS["nano-9b"], 4096) < 19.657 * 2**30


def test_free_bytes_of_a_device_without_an_index(monkeypatch):
    asked = []
    say = lambda answer: lambda device=None: asked.append(device) or answer
    for name, answer in dict(
        current_device=3, mem_get_info=(50, 100), memory_allocated=10, memory_reserved=30,
        get_per_process_memory_fraction=0.4,
    ).items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, say(answer))
    assert free_bytes(torch.device("cuda")) == 30  # 40 under the cap, less 10 held
    assert set(map(str, asked[1:])) == {"cuda:3"}
