"""The benchmark table: the limit's arithmetic by hand, its lines, its page and its commands."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from common.config.run import RunConfig
from common.errors import ModelError, RunError
from common.methods import METHODS
from common.models.resident import resident_model
from common.tensors import l2_norm, subtract
from simulations.benchmarks import __main__ as bench
from simulations.benchmarks import gpu
from simulations.benchmarks.aggregation import DENSE
from simulations.benchmarks.harness import run_plain_loop
from simulations.benchmarks.limit import arithmetic_of, matrix_rate
from simulations.benchmarks.lines import HEAD, Line, as_json, compared, markdown_table, slower
from simulations.benchmarks.measure import Seconds, in_turns, seconds_of
from simulations.benchmarks.page import write_between
from simulations.benchmarks.parts import PARTS
from simulations.benchmarks.plain_processes import run_plain_processes, shared_out
from simulations.benchmarks.step_work import with_overrides
from simulations.benchmarks.works import EVERY_ROW, QUICK, Extent
from tests.tiny_models import save_tiny_model


def invoke(command: Callable[..., None], *arguments: str) -> tuple[int, str]:
    app = Typer()
    app.command()(command)
    done = CliRunner().invoke(app, list(arguments))
    return done.exit_code, done.output


def test_operations_of_a_tiny_bert_are_those_counted_by_hand(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    folder = save_tiny_model("bert", tmp_path / "bert")
    config = with_overrides(make_config(), [f"model.source={folder}", "adapter={rank: 2, alpha: 4}"])
    arithmetic = arithmetic_of(resident_model(config))
    lengths, width, inner = [7, 4, 6], 16, 32
    tokens, rows, squares = 17, 3, 49 + 16 + 36
    square, wide = 2 * width * width, 2 * width * inner
    first_forward = tokens * (4 * square + 2 * wide)
    first_backward = tokens * (square + 2 * wide)  # query, key and value read what nothing trained is below
    last = 2 * (2 * tokens * square + rows * (2 * square + 2 * wide))  # keys and values of all, the rest of one a row
    pooler = 2 * rows * square
    attention = 12 * width * squares + 12 * width * tokens
    assert arithmetic.operations(lengths) == first_forward + first_backward + last + pooler + attention


def test_operations_of_a_tiny_llama_are_those_counted_by_hand(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    folder = save_tiny_model("llama", tmp_path / "llama")
    config = with_overrides(make_config(), [f"model.source={folder}", "adapter={rank: 2, alpha: 4}"])
    config = with_overrides(config, ["data.labels=null", "data.task=causal_lm"])
    model = resident_model(config)
    words = model.module.get_output_embeddings().out_features
    width, inner, narrow, lengths = 16, 32, 8, [5, 9]
    tokens, squares = 14, 25 + 81
    read = 2 * width * (width + 2 * narrow)  # queries, keys and values
    rest = 2 * width * width + 3 * 2 * width * inner
    linears = tokens * ((read + 2 * rest) + 2 * (read + rest) + 2 * 2 * width * words)
    assert arithmetic_of(model).operations(lengths) == linears + 2 * 12 * width * squares / 2


def test_products_do_the_linear_operations(make_config: Callable[..., RunConfig]) -> None:
    model = resident_model(make_config())
    arithmetic = arithmetic_of(model)
    products = arithmetic.products(40, 4)
    assert sum(2 * m * k * n for m, k, n in products) == arithmetic.linear_operations(40, 4)
    assert matrix_rate(arithmetic, 40, 4, torch.device("cpu"), torch.float32, least_s=0.01) > 0


def test_limit_of_a_model_that_pads_is_refused(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    folder = save_tiny_model("xlnet", tmp_path / "xlnet")
    with pytest.raises(ModelError, match="padded rows"):
        arithmetic_of(resident_model(with_overrides(make_config(), [f"model.source={folder}"])))


def test_lines_hold_medians_of_the_turns_ratios() -> None:
    ours = [Seconds(1.0, 2.0), Seconds(2.0, 2.0), Seconds(9.0, 3.0)]
    bare = [Seconds(2.0, 4.0), Seconds(8.0, 2.0), Seconds(9.0, 12.0)]
    line = compared("real", "x", ours, bare).against_limit(ours, bare, [1.0, 1.0, 1.0])
    assert (line.ours, line.baseline, line.ratio, line.cpu_ratio, line.pairs) == (2.0, 8.0, 0.5, 0.5, 3)
    assert (line.limit_over_baseline, line.ours_over_limit) == (0.25, 2.0)
    assert (slower("real", "x", ours, bare).ratio, slower("real", "x", ours, bare).cpu_ratio) == (2.0, 2.0)


def test_table_has_a_cell_below_every_head_and_json_every_line() -> None:
    lines = [Line("idle", "a", 0.5, target="< 1 s"), Line("scale", "b", 2.0, 1.0, 2.0, unit="MiB")]
    head, rule, *rows = markdown_table(lines).splitlines()
    assert len({line.count("|") for line in (head, rule, *rows)}) == 1
    assert len(rows) == 2
    assert "| a | 0.5 | - |" in rows[0]
    assert head.count("|") == len(HEAD) + 1
    written = as_json(lines)
    assert [record["name"] for record in json.loads(written)] == ["a", "b"]
    assert len(written.splitlines()) == 4


@pytest.mark.slow
def test_aggregation_of_every_method_is_measured() -> None:
    lines = list(PARTS["aggregation"](Extent(aggregated=(24, 2))))
    assert all(line.part == "aggregation" and line.ours >= 0 for line in lines)
    for method in METHODS:
        own = [line for line in lines if f"(g) {method}," in line.name]
        assert {line.unit for line in own} == {"s", "MiB"}
        assert any(line.baseline is not None for line in own) == (method in DENSE)


def test_turns_alternate_and_seconds_count_the_work() -> None:
    calls: list[str] = []

    def side(name: str) -> Callable[[], Seconds]:
        return lambda: seconds_of(lambda: calls.append(name))

    found = in_turns({"a": side("a"), "b": side("b")}, 3)
    assert "".join(calls) == "abbaab"
    assert all(one.wall > 0 and one.cpu >= 0 for one in found["a"])


def test_page_is_written_between_its_markers_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench: written by make bench -->\nold\n<!-- end of bench -->\nafter\n")
    write_between(page, "bench", "new")
    assert page.read_text() == "before\n<!-- bench: written by make bench -->\nnew\n<!-- end of bench -->\nafter\n"
    with pytest.raises(RunError, match="markers of 'bench-gpu'"):
        write_between(page, "bench-gpu", "new")


def test_the_page_of_the_repository_has_both_marker_pairs(tmp_path: Path) -> None:
    copy = tmp_path / "benchmarks.md"
    copy.write_text(bench.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    for name in ("bench", "bench-gpu"):
        write_between(copy, name, f"table of {name}")
        assert f"\ntable of {name}\n" in copy.read_text(encoding="utf-8")


def test_title_says_what_was_capped() -> None:
    assert "all rows" in Extent(rows=EVERY_ROW).text()
    assert f"at most {QUICK.rows} rows" in QUICK.text()


def test_wrong_input_is_refused() -> None:
    code, text = invoke(bench.main, "--only", "dq")
    assert code == 2
    assert all(part in " ".join(text.split()) for part in ("dq", "expected one of", *PARTS))
    assert invoke(bench.main, "--workers", "1")[0] == 2
    assert invoke(gpu.main, "--device", "tpu")[0] == 2


def test_command_measures_prints_and_writes_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def little(extent: Extent) -> Iterator[Line]:
        return PARTS["idle"](Extent(idle_sites=3))

    monkeypatch.setattr(bench, "PARTS", {"idle": little})
    out = tmp_path / "bench.json"
    code, text = invoke(bench.main, "--quick", "--only", "idle", "--out", str(out))
    assert code == 0, text
    (record,) = json.loads(out.read_text())
    assert record["part"] == "idle"
    assert "a round of 3 idle sites" in text


def test_parts_measured_before_to_the_same_extent_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {name: lambda extent, name=name: iter([Line(name, f"{name} {next(count)}", 1.0)]) for name in "ab"}
    count = iter(range(10))
    monkeypatch.setattr(bench, "PARTS", parts)
    out = tmp_path / "bench.json"

    def measured(*arguments: str) -> list[str]:
        code, text = invoke(bench.main, *arguments, "--out", str(out))
        assert code == 0, text
        return [record["name"] for record in json.loads(out.read_text())]

    assert measured("--only", "b") == ["b 0"]
    assert measured("--only", "a") == ["a 1", "b 0"]
    assert measured("--only", "b") == ["a 1", "b 2"]
    assert measured("--only", "a", "--rounds", "2") == ["a 3"]  # another extent is another table
    out.write_text("[1]")
    code, text = invoke(bench.main, "--only", "a", "--out", str(out))
    assert code == 1
    assert "holds no figures" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_cuda_the_gpu_benchmark_says_so_in_a_line(tmp_path: Path) -> None:
    code, text = invoke(gpu.main, "--out", str(tmp_path / "none.json"))
    assert code == 0
    assert text.startswith("no CUDA device is available")
    assert len(text.splitlines()) == 1
    assert not (tmp_path / "none.json").exists()


@pytest.mark.slow
def test_gpu_benchmark_runs_on_a_cpu_with_a_tiny_model(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    code, text = invoke(gpu.main, "--device", "cpu", "--tiny", "--pairs", "1", "--out", str(out))
    assert code == 0, text
    names = [record["name"] for record in json.loads(out.read_text())]
    for part in ("matrix rate", "tokens per second", "share of", "with DP", "cohort batching", "bf16"):
        assert any(part in name for name in names)
    assert all(record["ours"] > 0 for record in json.loads(out.read_text()))


def test_sites_are_shared_out_by_rows() -> None:
    assert shared_out({"a": 5, "b": 4, "c": 3, "d": 2}, 2) == [["a", "d"], ["b", "c"]]
    assert shared_out({"a": 1}, 2) == [["a"], []]


@pytest.mark.slow
def test_plain_loop_in_two_processes_ends_on_the_same_adapter(make_config: Callable[..., RunConfig]) -> None:
    config = with_overrides(make_config(), ["evaluation.enabled=false", "data.test=null"])
    alone, shared = run_plain_loop(config), run_plain_processes(config, 2)
    assert l2_norm(subtract(shared, alone)) <= 1e-5 * l2_norm(alone)
