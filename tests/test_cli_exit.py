"""How the command line ends: exit statuses, and one line where the input is wrong."""

import subprocess
import sys

from command_line import ENVIRONMENT, command

from sfmp import cli
from sfmp.checks import SfmpError


def test_exit_status_of_a_process(tmp_path):
    done = command("inspect", tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not done.stdout
    assert command("inspect").returncode == 2  # argparse
    broken = ("import sys, sfmp.commands, sfmp.cli\nsfmp.commands.inspect = lambda options: 1 / 0\n"
              "sys.exit(sfmp.cli.main(['inspect', 'anything']))")
    done = subprocess.run([sys.executable, "-c", broken], capture_output=True, text=True, timeout=60,
                          env=ENVIRONMENT)
    assert done.returncode == 1 and "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr


def test_interrupted(monkeypatch, capsys, tmp_path):
    from sfmp import commands

    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "inspect", interrupted)
    assert cli.main(["inspect", str(tmp_path)]) == 130 and "interrupted" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error():
    code = ("import sys, sfmp.commands, sfmp.cli\nsfmp.commands.inspect = lambda options: print('x' * 10**6)\n"
            "sys.exit(sfmp.cli.main(['inspect', 'anything']))")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=ENVIRONMENT)
    assert process.stdout.read(1) == "x"
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(timeout=60) == 0
    process.stderr.close()


def test_a_long_message_stays_one_line(monkeypatch, capsys):
    from sfmp import commands

    def fail(options):
        raise SfmpError("first\n  second")

    monkeypatch.setattr(commands, "inspect", fail)
    assert cli.main(["inspect", "x"]) == 2
    assert capsys.readouterr().err == "sfmp inspect: first second\n"


def test_bench_ends_like_the_other_commands(monkeypatch, capsys):
    import sfmp.bench.__main__ as bench

    def fail(arguments):
        raise SfmpError("no such part")

    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "main", fail)
    assert cli.main(["bench", "cpu"]) == 2 and capsys.readouterr().err == "sfmp bench: no such part\n"
    monkeypatch.setattr(bench, "main", interrupted)
    assert cli.main(["bench", "cpu"]) == 130


def test_bench_help_lists_its_parts():
    done = command("bench", "--help")
    assert done.returncode == 0
    assert all(f"    {name} " in done.stdout for name in ("cpu", "kernels", "decode", "memory"))


def test_tables_that_are_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["pin"]) == 2
    assert "run this in a checkout" in capsys.readouterr().err


def test_a_refused_prompt_is_not_printed(capsys):
    assert cli.main(["generate", "embedded", "def", "--tokens", "0", "--device", "cpu"]) == 2
    assert capsys.readouterr().out == ""


def _no_model(*_):
    raise AssertionError("the model was loaded before the arguments were checked")


def test_eval_looks_at_tasks_and_places_before_the_model(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sfmp.scores.load", _no_model)
    monkeypatch.setenv("SFMP_DATA_ROOT", str(tmp_path / "data"))
    (tmp_path / "file").write_text("x")
    for arguments, message in ((["--tasks", "chess"], "next_line, identifier, docstring, arc_challenge"),
                               (["--tasks", "next_line", "piqa"], "sfmp fetch piqa"),
                               (["--windows", "0"], "windows"), (["--seqlen", "1"], "seqlen"),
                               (["--json", str(tmp_path)], "found a folder"),
                               (["--json", str(tmp_path / "file" / "x.json")], "found a file"),
                               (["--json", str(tmp_path / "file" / "more" / "x.json")], "choose a place")):
        assert cli.main(["eval", "embedded", "--items", "2", *arguments]) == 2
        assert message in capsys.readouterr().err, arguments


def test_quantize_says_what_a_finished_run_is(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "sfmp"}}')
    assert cli.main(["quantize", "embedded", str(tmp_path), "--resume"]) == 2
    assert "nothing is left to do" in capsys.readouterr().err
    assert cli.main(["quantize", str(tmp_path), str(tmp_path), "--overwrite"]) == 2
    assert "apart from" in capsys.readouterr().err


def test_a_warning_is_one_line(monkeypatch, capsys):
    import warnings

    from sfmp import commands

    def warn(options):
        print(warnings.formatwarning(UserWarning("first\nsecond"), UserWarning, "file.py", 3), end="")
        print(warnings.formatwarning("old", DeprecationWarning, "file.py", 3, ""), end="")

    before = warnings.formatwarning
    monkeypatch.setattr(commands, "inspect", warn)
    assert cli.main(["inspect", "x"]) == 0
    assert capsys.readouterr().out == "sfmp: first second\nfile.py:3: DeprecationWarning: old\n"
    assert warnings.formatwarning is before


def test_a_package_without_its_tables_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sfmp.places.ROOT", tmp_path)
    for arguments in (["eval", "embedded", "--text", "dataset:c4"], ["fetch", "c4", "--data-root", "data"]):
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert "config/datasets.tsv in the working directory" in error and "clone" in error
