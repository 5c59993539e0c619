"""What `import memokern` alone gives."""

from __future__ import annotations

import subprocess
import sys

ALONE = """
import sys, memokern
assert "memokern.training" not in sys.modules and "memokern.samplers" not in sys.modules
assert {"samplers", "kde", "training"} < set(dir(memokern))
memokern.samplers.ode, memokern.kde.score, memokern.likelihood.log_likelihood
memokern.memorization.ratio, memokern.distributed.shard, memokern.integrations.edm
memokern.training.targets.stable, memokern.processes.VP, memokern.regularizers.Tikhonov
try:
    memokern.sampler
except AttributeError as error:
    assert str(error) == "module 'memokern' has no attribute 'sampler'"
    print("right")
"""


def test_every_module_can_be_named_without_an_import_of_its_own() -> None:
    ran = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    assert ran.stdout == "right\n", ran.stderr
