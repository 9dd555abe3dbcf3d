"""The commands of the training half."""

import json

from compress.cli import main


def test_plateau_reports_losses_start_and_bounds(capsys):
    arguments = ["--data", "digits", "--widths", "1,8", "--samples", "60", "--steps", "60", "--json"]
    assert main(["plateau", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["width"] for row in found["losses"]] == [1, 8]
    assert found["plateau_starts_at"] == 8
    assert found["data_bound"] == 60 * 61


def test_plateau_refuses_an_unknown_loss(capsys):
    assert main(["plateau", "--data", "digits", "--loss", "hinge"]) == 2
    assert "cross_entropy" in capsys.readouterr().err
