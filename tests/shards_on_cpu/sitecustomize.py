"""Lets Accelerate 1.15, which shards models on accelerators only, shard them on CPU processes too (on the PYTHONPATH)."""

from accelerate.state import PartialState
from accelerate.utils import DistributedType


_init = PartialState.__init__


def _shards_on_cpu(self, *args, **kwargs):
    _init(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = (
            DistributedType.MULTI_XPU
        )  # any of those that FSDP is asked for; the device stays the CPU


PartialState.__init__ = _shards_on_cpu
