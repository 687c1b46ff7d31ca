"""What only launches work on a device must not wait for it."""

from torch.utils._python_dispatch import TorchDispatchMode


class NothingWaits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails at what would make the host wait for a GPU, and what a graph therefore can't hold."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))
