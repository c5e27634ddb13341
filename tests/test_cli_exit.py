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
