"""The half of the engine that decides is plain Python."""

import pkgutil
import subprocess
import sys

import l4jax.engine

PLAIN = ("options", "pages", "rank", "scheduler", "sequence", "step")


def test_the_scheduler_imports_no_jax_and_no_numpy():
    assert set(PLAIN) <= {module.name for module in pkgutil.iter_modules(l4jax.engine.__path__)}
    program = "".join(f"import l4jax.engine.{name}\n" for name in PLAIN) + "import sys; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "l4jax.engine.scheduler" in loaded
    heavy = ("jax", "jaxlib", "numpy", "sharding", "pallas_kernels")
    assert [name for name in loaded if name.split(".")[0] in heavy] == ["sharding", "sharding.words"]
