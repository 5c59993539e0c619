"""`memokern train`: what it writes, that it goes on where it stopped, what it refuses."""

from __future__ import annotations

import csv

import pytest
import torch

from memokern import samplers
from memokern.data import files
from memokern.training import LearnedDenoiser
from tests.apps.cli_calls import call

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["--steps", 6, "--every", 3, "-n", 4, "--batch", 8, "--network", "mlp", "--width", 8]


def test_a_run_writes_network_table_and_picture(tmp_path):
    files.write_npz(tmp_path / "d.npz", rows=torch.randn(12, 2))
    out = {name: tmp_path / name for name in ("n.safetensors", "t.csv", "p.png", "c.safetensors")}
    network, table, picture, checkpoint = out.values()
    options = ["--data", tmp_path / "d.npz", "--process", "vp", "--tikhonov", 0.01, *SMALL,
               "--held-out", 3, "--patience", 5]  # fmt: skip
    ran = call("train", *options, "-o", network, "--csv", table, "--picture", picture,
               "--checkpoint", checkpoint)  # fmt: skip
    assert ran.exit_code == 0, ran.output
    assert "MLP of" in ran.output and "on 9 rows [2], vp" in ran.output and "6 steps" in ran.output
    lines = list(csv.DictReader(table.read_text().splitlines()))
    assert [line["step"] for line in lines] == ["3", "6"]
    assert set(lines[0]) == {"step", "epoch", "loss", "held_out", "memorised"}
    assert picture.stat().st_size > 5000
    assert samplers.ode(LearnedDenoiser.load(network), 3, 4).x.shape == (3, 2)
    before = table.read_text()
    assert call("train", *SMALL, "--csv", table).exit_code == 2
    again = call("train", *options, "--checkpoint", checkpoint, "--resume", "--csv", table,
                 "--force")  # fmt: skip
    assert again.exit_code == 0 and "goes on from step 6" in again.output
    assert table.read_text() == before


def test_a_closed_form_is_learned_and_copies_stop_a_run():
    ran = call("train", *SMALL, "--learn", "tikhonov:c=0.1", "--stop-memorised", 0.99)
    assert ran.exit_code == 0, ran.output
    assert "on 1797 rows [8, 8], edm" in ran.output
    unet = call("train", "--steps", 1, "-n", 1, "--batch", 2, "--width", 4, "--process",
                "flow-matching")  # fmt: skip
    assert unet.exit_code == 0 and "UNet of" in unet.output, unet.output


@pytest.mark.parametrize(("options", "says"), [
    (["--learn", "tikhonov:c=1", "--tikhonov", 0.1], "instead of --tikhonov"),
    (["--learn", "nonsense"], "--learn: "),
    (["--resume"], "--resume needs --checkpoint"),
    (["--patience", 3], "--patience needs --held-out"),
    (["--held-out", 1796], "of 1797 rows at most 1795"),
    (["--lr", 0], "expected lr"),
    (["--ema", 1], "expected ema in [0, 1)"),
    (["--output", "n.pt"], "must end in .safetensors"),
    (["--network", "unet", "--depth", 5], "divides"),
])  # fmt: skip
def test_what_is_wrong_is_told_in_one_line(options, says):
    ran = call("train", "--steps", 1, *options)
    assert ran.exit_code == 2 and says in ran.output and ran.output.count("\n") == 1, ran.output
