"""The command line in this process: another one takes seconds to import torch."""

import sys

import pytest

import octomoe.cli


@pytest.fixture
def octomoe_(monkeypatch, capsys):
    """The command line as a user runs it: exit code, stdout, stderr on a wide terminal.

    What is raised instead of refused ends the test.
    """

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["octomoe", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as exit:
            octomoe.cli.main()
        out, err = capsys.readouterr()
        return exit.value.code, out, err

    return run
