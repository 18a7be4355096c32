"""`octomoe doctor` lists versions, devices and backends, with reasons against the unusable."""

import json

from typer.testing import CliRunner

from octomoe.cli import app
from octomoe.version import VERSION


def test_json_gives_a_reason_for_every_unusable_backend():
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0
    findings = json.loads(result.stdout)
    assert findings["versions"]["octomoe"] == VERSION
    assert set(findings["backends"]["cpu"]["reference"].values()) == {None}
    assert all("compute capability" in r for r in findings["backends"]["cpu"]["sm90"].values())


def test_human_text_goes_to_stderr():
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert result.stdout == ""
    assert "every op" in result.stderr


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout.strip()) == (0, VERSION)
