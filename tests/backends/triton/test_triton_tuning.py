"""Choosing configurations by measuring: with a clock that the test sets, since there is no GPU."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from memokern.backends.triton import variants as listing
from memokern.backends.triton.core import tuning
from memokern.backends.triton.core.variant import Variant
from memokern.backends.triton.posterior import fused, products
from memokern.util import env

BF16 = torch.bfloat16
DEVICE = torch.device("cuda", 0)  # in name alone


class Gpu:
    """Launches that are written down; times: what each configuration takes; timed: the calls."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}
        self.launched: list[tuple[str, dict]] = []
        self.timed = 0
        self.capturing = False
        self.current: list[torch.device] = []  # of the guards

    @contextlib.contextmanager
    def guard(self, device: torch.device):
        self.current.append(device)
        yield
        self.current.pop()

    def is_capturing(self) -> bool:
        assert self.current == [DEVICE]  # not of whichever device is current
        return self.capturing

    def timer(self, call, device) -> float:
        assert device == DEVICE
        call()
        self.timed += 1
        name = self.launched.pop()[0]
        if self.times[name] is None:
            raise OutOfResources(200_000, 100_000, "shared memory")
        return self.times[name]


@pytest.fixture
def gpu(monkeypatch, tmp_path) -> Gpu:
    found = Gpu()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(env.AUTOTUNE, "1")
    monkeypatch.setattr(tuning, "timer", found.timer)
    monkeypatch.setattr(tuning, "device_name", lambda device: "NVIDIA Test")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", found.is_capturing)
    monkeypatch.setattr(torch.cuda, "device", found.guard)
    monkeypatch.setattr(
        Variant, "launch", lambda self, grid, at, **args: found.launched.append((self.name, args))
    )
    tuning.remembered.cache_clear()
    yield found
    tuning.remembered.cache_clear()


def sweep_v() -> Variant:
    return fused.sweep_variant(BF16, 64, True, "tf32x3")


def launched(gpu: Gpu, variant: Variant, device: torch.device = DEVICE, **how) -> str:
    """The name of what a launch launches."""
    how = {**dict.fromkeys(variant.aligned, 32), **how}
    tuning.launch(variant, (7,), device, **how)
    assert len(gpu.launched) == 1
    return gpu.launched.pop()[0]


def restart() -> None:
    """As in another process."""
    tuning.remembered.cache_clear()


def test_every_choice_is_listed_and_computes_the_same() -> None:
    listed = {v.name: v for v in listing.variants()}
    assert len(listed) == len(listing.variants())
    several = 0
    for variant in fused.variants() + products.variants():
        options = tuning.choices(variant)
        assert options[0] == variant and len(options) <= 3
        several += len(options) > 1
        for option in options:
            assert listed[option.name] == option
            assert option.constexprs == variant.constexprs and option.kernel is variant.kernel
            assert option.num_warps == variant.num_warps and option.num_stages >= 1
    assert several >= 20


def test_the_default_is_taken_unless_asked(gpu: Gpu, monkeypatch) -> None:
    monkeypatch.delenv(env.AUTOTUNE)
    assert launched(gpu, sweep_v()) == sweep_v().name
    assert gpu.timed == 0 and not tuning.cache_file().exists()
    monkeypatch.setenv(env.AUTOTUNE, "yes")
    with pytest.raises(RuntimeError, match="MEMOKERN_AUTOTUNE must be 0 or 1, not 'yes'"):
        launched(gpu, sweep_v())


def test_the_fastest_is_taken_and_remembered(gpu: Gpu) -> None:
    default, other = tuning.choices(sweep_v())
    gpu.times = {default.name: 2.0, other.name: 1.0}
    assert launched(gpu, default) == other.name and gpu.timed == 2
    assert launched(gpu, default) == other.name and gpu.timed == 2
    restart()
    assert launched(gpu, default) == other.name and gpu.timed == 2
    (key,) = json.loads(tuning.cache_file().read_text())
    assert key.startswith("NVIDIA Test, Triton ") and key.endswith(default.name)
    # Another kernel, and another device, are measured for themselves, and nothing is forgotten.
    few, many = (fused.sweep_variant(torch.float32, 16, few, "tf32x3") for few in (True, False))
    for variant in (few, many):
        gpu.times = {v.name: float(i) for i, v in enumerate(tuning.choices(variant))}
        assert launched(gpu, variant) == variant.name
    assert gpu.timed == 6 and len(json.loads(tuning.cache_file().read_text())) == 3


def test_nothing_is_measured_in_a_capture_nor_interpreted(gpu: Gpu) -> None:
    gpu.capturing = True
    assert launched(gpu, sweep_v()) == sweep_v().name
    gpu.capturing = False
    assert launched(gpu, sweep_v(), torch.device("cpu")) == sweep_v().name
    assert gpu.timed == 0 and not tuning.cache_file().exists()
    tuning.launch(sweep_v(), (0,), DEVICE)
    assert gpu.timed == 0


def test_a_capture_launches_what_was_chosen_before_it(gpu: Gpu) -> None:
    default, other = tuning.choices(sweep_v())
    gpu.times = {default.name: 2.0, other.name: 1.0}
    launched(gpu, default)
    gpu.capturing = True
    assert launched(gpu, default) == other.name and gpu.timed == 2


def test_the_clock_is_the_devices_own(monkeypatch) -> None:
    """Events are recorded on the stream of the device that a launch is for."""
    gpu, where = Gpu(), []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            where.append(list(gpu.current))

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return 16.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", gpu.guard)
    assert tuning.timer(lambda: None, DEVICE) == 2.0
    assert where == [[DEVICE]] * 10


def test_what_a_launch_changes_is_left_alone(gpu: Gpu, monkeypatch) -> None:
    variant = products.accumulate_variant(BF16, True, "tf32x3")
    gpu.times = {v.name: 1.0 for v in tuning.choices(variant)}
    acc, rows = torch.zeros(3), torch.zeros(3)
    seen = []
    time = gpu.timer

    def spy(call, device) -> float:
        seen.append(call.keywords)
        return time(call, device)

    monkeypatch.setattr(tuning, "timer", spy)
    args = {**dict.fromkeys(variant.aligned, 32), "acc": acc, "rows": rows}
    tuning.launch(variant, (1,), DEVICE, changes=("acc",), **args)
    assert len(seen) == 2 and all(args["acc"] is not acc and args["rows"] is rows for args in seen)
    assert gpu.launched[0][1]["acc"] is acc


def test_what_a_device_cannot_launch_is_left_out(gpu: Gpu) -> None:
    default, other = tuning.choices(sweep_v())
    gpu.times = {default.name: None, other.name: 5.0}
    assert launched(gpu, default) == other.name
    restart()
    tuning.cache_file().unlink()
    gpu.times = {default.name: None, other.name: None}
    assert launched(gpu, default) == default.name  # and its launch says why it cannot
    assert not tuning.cache_file().exists()


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1}', "\ufeff\x00", '{"a": {"b": "c"}}'])
def test_a_broken_file_is_made_anew(gpu: Gpu, text: str) -> None:
    default, other = tuning.choices(sweep_v())
    gpu.times = {default.name: 2.0, other.name: 1.0}
    tuning.cache_file().parent.mkdir(parents=True)
    tuning.cache_file().write_text(text)
    with pytest.warns(UserWarning, match="not a table of Triton configurations"):
        assert launched(gpu, default) == other.name
    restart()
    assert list(json.loads(tuning.cache_file().read_text()).values()) == [other.name]
    assert launched(gpu, default) == other.name and gpu.timed == 2


def test_a_choice_that_there_is_no_more_is_measured_again(gpu: Gpu) -> None:
    default, other = tuning.choices(sweep_v())
    gpu.times = {default.name: 2.0, other.name: 1.0}
    launched(gpu, default)
    text = tuning.cache_file().read_text()
    tuning.cache_file().write_text(text.replace(other.name, f"{default.name} S9"))
    restart()
    assert launched(gpu, default) == other.name and gpu.timed == 4


def test_a_file_that_cannot_be_written_is_no_error(gpu: Gpu) -> None:
    default, other = tuning.choices(sweep_v())
    gpu.times = {default.name: 2.0, other.name: 1.0}
    tuning.cache_file().mkdir(parents=True)  # a folder has its name
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert launched(gpu, default) == other.name
        assert launched(gpu, default) == other.name and gpu.timed == 2
    assert any("cannot be written" in str(w.message) for w in said)
    assert list(tuning.cache_file().parent.iterdir()) == [tuning.cache_file()]


@pytest.mark.long
def test_triton_leaves_out_what_the_device_has_no_room_for(tmp_path: Path) -> None:
    """Triton's own launch code on a driver whose blocks have less shared memory than the default
    wants: it refuses, and the other configuration is launched."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_INTERPRET")}
    here = Path(__file__).resolve().parent
    path = os.pathsep.join([str(here.parents[2]), environment.get("PYTHONPATH", "")])
    environment |= {"PYTHONPATH": path, env.AUTOTUNE: "1", "XDG_CACHE_HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, str(here / "fake_driver.py"), "tuning"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    facts = json.loads(run.stdout.splitlines()[-1])
    assert facts["measured"] == 1 and facts["chosen"] == [facts["other"]]
    assert facts["launches"] == 3  # measured, then twice as asked
