"""Training passes on a fake H100, whose kernels, copies, waits and collectives are counted."""

from tests.fake_h100 import driver
from tests.fake_h100.device import compiled_is_one_kernel

# Megatron-Core compiles functions when it is imported, whichever module of a rank does that first.
if driver.is_loaded():
    with compiled_is_one_kernel():
        import megatron_pg.train  # noqa: F401
