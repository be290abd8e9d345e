"""FSDP on a CPU: accelerate offers it on accelerators only, PyTorch everywhere."""


def allow_fsdp(state):
    """Patch the module accelerate.state."""
    stock = state.AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        stock(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type != state.DistributedType.FSDP:
            self.distributed_type, self.fsdp_plugin = state.DistributedType.FSDP, fsdp_plugin

    state.AcceleratorState.__init__ = init
