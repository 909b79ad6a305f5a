"""`attune` where accelerate shards by FSDP2 over gloo, which by itself it does on accelerators only."""

from typing import Any

import accelerate.state
from accelerate.utils import DistributedType

from attunement.cli import main

init = accelerate.state.AcceleratorState.__init__


def sharding(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin


accelerate.state.AcceleratorState.__init__ = sharding
main()
