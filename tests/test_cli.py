"""The commands as a person runs them, on a tiny model: the three steps, their files, and every mistake in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from commands import run
from finetrace.attribution import make
from finetrace.cli.commands import COMMANDS
from finetrace.cli.trace import TRACED
from finetrace.reading import read_examples, write_examples
from finetrace.tracing import BEST
from tiny import make_examples, make_llama, save_base, with_lora


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base model, training rows and queries on disk."""
    folder = tmp_path_factory.mktemp("cli")
    save_base(folder / "base", make_llama().float())
    write_examples(folder / "train.jsonl", make_examples(12))
    write_examples(folder / "queries.jsonl", make_examples(3, seed=5))
    return folder


@pytest.fixture(scope="module")
def index(place):
    """finetune and index, once."""
    here = ["--model", place / "base"]

    class Quiet:
        def readouterr(self):
            return type("Captured", (), {"out": "", "err": ""})()

    tuned = run(Quiet(), "finetune", place / "train.jsonl", "--out", place / "adapter", *here, "--epochs", 1)
    assert tuned[0] == 0
    built = run(Quiet(), "index", place / "train.jsonl", "--out", place / "idx", "--adapter", place / "adapter", *here)
    assert built[0] == 0
    return place / "idx"


def assert_one_sentence(code: int, err: str, *words: str) -> None:
    """Exit code 2, one line, no traceback, and the words a person needs."""
    assert code == 2
    lines = [line for line in err.strip().splitlines() if line.startswith("finetrace: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    for word in words:
        assert word in lines[0], (word, lines[0])


def test_trace_prints_a_table_that_fits_the_terminal(index, place, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run(
        capsys, "trace", "--index", index, "--queries", place / "queries.jsonl", "--top", 3, "--opponents"
    )
    assert code == 0, err
    assert TRACED == BEST
    title = make(BEST).title
    assert f"{title}: proponents (cosine)" in out
    assert f"{title}: opponents" in out
    assert max(len(line) for line in out.splitlines() if not line.startswith(("asked", "answered"))) <= 80


def test_low_scores_that_are_positive_are_not_called_opponents(index, place, capsys):
    asked = ["trace", "--index", index, "--queries", place / "queries.jsonl", "--top", 12, "--opponents"]
    code, out, err = run(capsys, *asked, "--method", "length")
    assert code == 0, err
    assert out.count("12 of these lowest scores are not negative: no opponents.") == 3  # a length is never negative
    assert "no proponents" not in out
    code, out, err = run(capsys, *asked, "--method", "gradcos", "--format", "json")
    scores = [each["score"] for each in json.loads(out)["records"] if each["kind"] == "opponent"][:12]
    wrong = sum(score >= 0 for score in scores)
    assert 0 < wrong < 12
    code, out, err = run(capsys, *asked, "--method", "gradcos")
    assert f"{wrong} of these lowest scores are not negative: no opponents." in out


def test_trace_writes_json_csv_parquet_scores_and_a_report(index, place, capsys, tmp_path):
    asked = ["trace", "--index", index, "--queries", place / "queries.jsonl", "--method", "repsim", "--method", "bm25"]
    files = ["--out", tmp_path / "r.parquet", "--scores", tmp_path / "s.csv", "--report", tmp_path / "r.html"]
    code, out, err = run(capsys, *asked, "--top", 4, "--format", "json", *files)
    assert code == 0, err
    document = json.loads(out)
    assert len(document["records"]) == 2 * 3 * 4
    assert document["config"][0]["sign"].startswith("positive = proponent")
    assert [row["id"] for row in document["queries"]] == [row.id for row in read_examples(place / "queries.jsonl")]
    table = pd.read_parquet(tmp_path / "r.parquet")
    assert len(table) == 24
    assert table.attrs["queries"] == document["queries"]
    assert len(pd.read_csv(tmp_path / "s.csv")) == 3 * 12
    assert "Not validated" in (tmp_path / "r.html").read_text()
    written = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for flag, path in zip(files[::2], files[1::2], strict=True):
        code, _, err = run(capsys, *asked, flag, path)
        assert code == 2
        assert f"{flag} {path}: this exists already" in err
        assert "--overwrite" in err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == written
    code, _, err = run(capsys, *asked, "--top", 2, *files, "--overwrite")
    assert code == 0, err
    assert len(pd.read_parquet(tmp_path / "r.parquet")) == 12
    code, out, _ = run(capsys, *asked, "--top", 4, "--format", "csv")
    assert code == 0
    assert out.splitlines()[0].startswith("method,query,kind,rank,score,example")


def test_the_model_answers_what_is_asked(index, capsys):
    code, out, err = run(
        capsys, "trace", "--index", index, "--ask", "abc", "--max-new-tokens", 5, "--format", "json", "--top", 1
    )
    assert code == 0 or "the model answers nothing" in err
    if code == 0:
        assert json.loads(out)["records"][0]["query"] == "ask"
    code, out, err = run(capsys, "trace", "--index", index, "--ask", "abc", "--answer", "de", "--format", "json")
    assert code == 0, err
    assert json.loads(out)["queries"] == [{"id": "ask", "prompt": "abc", "response": "de"}]


def test_every_method_traces(index, place, capsys):
    code, out, err = run(
        capsys, "trace", "--index", index, "--queries", place / "queries.jsonl", "--method", "all", "--format", "csv"
    )
    assert code == 0, err
    methods = {line.split(",")[0] for line in out.splitlines()[1:]}
    assert {"repsim", "datainf", "exact", "gradsim", "random"} <= methods


def test_methods_are_listed_with_their_equations(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(capsys, "methods")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    monkeypatch.setenv("COLUMNS", "200")
    out = run(capsys, "methods")[1]
    assert "E[a a^T] x E[delta delta^T]" in out  # square brackets are the equation's, not the console's
    code, out, _ = run(capsys, "methods", "ekfac")
    assert "  at = that of the index    (str)" in out.splitlines()
    assert "  damping = 0.1    (float > 0)" in out.splitlines()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trace", "--index", "nowhere", "--ask", "a"], ["nowhere", "no index there"]),
        (["trace", "--index", "{idx}"], ["--ask TEXT or --queries FILE"]),
        (["trace", "--index", "{idx}", "--queries", "q", "--answer", "a"], ["--answer goes with --ask"]),
        (["trace", "--index", "{idx}", "--ask", " "], ["--ask is empty"]),
        (["trace", "--index", "{idx}", "--ask", "a", "--answer", ""], ["--answer is empty", "leave it out"]),
        (["trace", "--index", "{idx}", "--ask", "a", "--method", "exactly"], ["exactly", "no such method", "datainf"]),
        (
            ["trace", "--index", "{idx}", "--ask", "a", "--method", "repsim", "--damping", "1"],
            ["--damping", "none of the"],
        ),
        (["trace", "--index", "{idx}", "--ask", "a", "--out", "r.txt"], ["--out r.txt", ".parquet"]),
        (
            ["trace", "--index", "{idx}", "--ask", "a", "--out", "r.csv", "--scores", "./r.csv"],
            ["--scores r.csv", "--out is to be written there too"],
        ),
        (["trace", "--index", "{idx}", "--ask", "a", "--format", "yaml"], ["--format yaml", "table, json"]),
        (["trace", "--index", "{idx}", "--queries", "{here}/none.jsonl"], ["none.jsonl"]),
        (["trace", "--index", "{idx}", "--queries", "{here}/train.jsonl", "--prompt-column", "ask"], ["ask", "prompt"]),
        (["index", "{here}/none.jsonl", "--out", "{here}/i"], ["none.jsonl"]),
        (["index", "{here}/empty.jsonl", "--out", "{here}/i"], ["empty.jsonl"]),
        (["index", "{here}/silent.jsonl", "--out", "{here}/i"], ["silent.jsonl", "row 2", "response"]),
        (["index", "{here}/train.jsonl", "--out", "{here}/i", "--model", "{here}/gone"], ["gone", "cannot be loaded"]),
        (
            ["index", "{here}/train.jsonl", "--out", "{here}/i", "--model", "{here}/base", "--adapter", "{here}/other"],
            ["other", "--model"],
        ),
        (
            ["index", "{here}/train.jsonl", "--out", "{idx}", "--model", "{here}/base", "--adapter", "{here}/second"],
            ["adapter", "choose another --out"],
        ),
        (["finetune", "{here}/train.jsonl", "--out", "{here}/adapter", "--model", "{here}/base"], ["already there"]),
        (["finetune", "{here}/train.jsonl", "--out", "{here}/a", "--epochs", "0"], ["--epochs"]),
        (["finetune", "{here}/train.jsonl", "--out", "{here}/a", "--preset", "best"], ["--preset best", "paper"]),
        (["methods", "lime"], ["lime", "no such method"]),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(index, place, capsys, arguments, words):
    (place / "empty.jsonl").write_text("")
    (place / "silent.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "c", "response": ""}\n')
    if not (place / "other").exists():
        with_lora(make_llama(hidden=32)).save_pretrained(str(place / "other"))
        with_lora(make_llama(), seed=7).save_pretrained(str(place / "second"))
    filled = [each.format(idx=index, here=place) for each in arguments]
    code, _, err = run(capsys, *filled)
    assert_one_sentence(code, err, *words)
    assert not (place / "i").exists() or not (place / "i" / "manifest.json").exists()


def test_a_broken_shard_is_named(index, place, capsys):
    shard = next((index / "shards").glob("*.safetensors"))
    content = shard.read_bytes()
    try:
        shard.write_bytes(content[:-4] + b"oops")
        code, _, err = run(capsys, "trace", "--index", index, "--ask", "a", "--answer", "b", "--method", "exact")
        assert_one_sentence(code, err, shard.name, "broken")
        shard.unlink()
        code, _, err = run(capsys, "trace", "--index", index, "--ask", "a", "--answer", "b", "--method", "exact")
        assert_one_sentence(code, err, shard.name, "missing", "finetrace index")
    finally:
        shard.write_bytes(content)


def test_unknown_option_is_click_s_own_sentence(capsys):
    code, _, err = run(capsys, "trace", "--indx", "x")
    assert code == 2
    assert "--indx" in err
    assert "Traceback" not in err


def test_importing_and_help_do_not_load_torch():
    script = (
        "import sys\nfrom finetrace.cli.commands import Found\n"
        "assert all(Found().values())\nsys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_the_list_of_commands_imports_none_and_cuts_no_line(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for group in ([], ["tasks"]):
        code, out, _ = run(capsys, *group, "--help")
        assert code == 0
        assert out.partition("Commands:")[2].strip()
        assert "..." not in out.partition("Commands:")[2]
        assert max(map(len, out.splitlines())) <= 80
    script = "import sys\nfrom finetrace.cli import main\nsys.argv[1:] = ['--help']\ntry: main()\nexcept SystemExit: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert "bench " in done.stdout
    assert not {f"finetrace.cli.{place.module}" for place in COMMANDS.values()} & set(done.stdout.split())


def test_a_command_is_found_by_its_name_alone(capsys):
    for name in COMMANDS:
        code, out, _ = run(capsys, name, "--help")
        assert code == 0
        assert f"finetrace {name} " in out.splitlines()[0]
    code, _, err = run(capsys, "bnch")
    assert code == 2
    assert "No such command 'bnch'. Did you mean 'bench'?" in err


def test_help_answers_in_under_a_third_of_a_second():
    """Of the processor's time; on a slow machine, in twice what typer itself takes to load (where this was written, 1.1 times)."""
    resource = pytest.importorskip("resource", reason="processor time of a child is read as Unix does")

    def seconds(*command: str) -> float:
        times = []
        for _ in range(5):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(command, check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        return min(times)

    typer = seconds(sys.executable, "-c", "import typer")
    assert seconds(str(Path(sys.executable).parent / "finetrace"), "--help") < max(0.3, 2 * typer)


NO_PATH = "a" * 300  # longer than a name may be, which stands for a folder that nobody may look into


@pytest.mark.parametrize(
    "command",
    [
        ["index", "verify", NO_PATH],
        ["trace", "--index", NO_PATH, "--ask", "a", "--answer", "b"],
        ["index", "{rows}", "--model", "{base}", "--out", NO_PATH],
        ["plan", "{rows}", "--model", "{base}", "--out", NO_PATH],
        ["trace", "--index", "nowhere", "--ask", "a", "--answer", "b", "--out", f"{NO_PATH}.json"],
    ],
)
def test_a_path_that_the_system_refuses_is_one_sentence(command, place, capsys):
    given = [word.format(rows=place / "train.jsonl", base=place / "base") for word in command]
    code, _, err = run(capsys, *given)
    assert code == 2
    assert err.splitlines()[-1].startswith("finetrace: ")
    assert "File name too long; check the path, or choose another one." in err


def test_an_error_without_a_path_keeps_its_traceback(monkeypatch, capsys):
    def fails(*given, **named):
        raise OSError("nobody foresaw this")

    monkeypatch.setattr("finetrace.cli.app", fails)
    with pytest.raises(OSError, match="nobody foresaw this"):
        run(capsys, "methods")
