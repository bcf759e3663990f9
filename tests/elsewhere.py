"""A device that this machine does not have, pretended: its tensors are kept on the CPU.

A tensor of the device "lazy" (a name that torch has, but no code here) is a wrapper around one
on the CPU. While PretendDevice is active, each operation unwraps its inputs, computes as the CPU
does, and wraps its results. What a real device refuses is refused here, too: an operation on
tensors of two devices, and, as on Apple's GPUs, float64.
"""
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("lazy:0")

aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)       # they may cross from device to device


class Elsewhere(torch.Tensor):
    """A tensor of the pretended device; `kept` is where its values are."""

    @staticmethod
    def __new__(cls, kept: torch.Tensor) -> "Elsewhere":
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls,
            kept.shape,
            strides=kept.stride(),
            storage_offset=kept.storage_offset(),
            dtype=kept.dtype,
            layout=kept.layout,
            device=DEVICE,
        )
        wrapper.kept = kept
        return wrapper

    def __init__(self, kept: torch.Tensor):
        pass

    def __repr__(self) -> str:
        return f"Elsewhere({self.kept})"

    def tolist(self) -> list:
        return self.kept.tolist()

    def __reduce_ex__(self, protocol: int) -> tuple:
        """A file has the values, as that of a real device has."""
        return self.kept.detach().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func}: a tensor of the pretended device, outside of PretendDevice")


class PretendDevice(TorchDispatchMode):
    """Inside this context there is a device more, DEVICE."""

    def __enter__(self) -> "PretendDevice":
        # So that torch.tensor(..., device=DEVICE) comes by here, too.
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error) -> None:
        torch._C._set_only_lift_cpu_tensors(False)
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        is_there = any(isinstance(x, Elsewhere) for x in tensors)
        goes_there = is_there
        if kwargs.get("device") is not None:
            goes_there = torch.device(kwargs["device"]).type == DEVICE.type
            kwargs["device"] = "cpu"
        if not (is_there or goes_there):
            return func(*args, **kwargs)

        # A number may come from the CPU, but no more than one.
        if func not in COPIES:
            for x in tensors:
                assert isinstance(x, Elsewhere) or x.ndim == 0, (
                    f"{func}: a tensor {tuple(x.shape)} of the CPU among those of the device"
                )
        args_kept, kwargs_kept = tree_map(unwrapped, (args, kwargs))
        result = func(*args_kept, **kwargs_kept)
        if func is aten._local_scalar_dense.default:        # item() brings a number to the CPU
            return result
        if func._schema.is_mutable:
            changed = tree_leaves((args, kwargs))
            return tree_map(lambda x: as_given(x, changed), result)
        return tree_map(wrapped, result) if goes_there else result


def unwrapped(x: object) -> object:
    return x.kept if isinstance(x, Elsewhere) else x


def wrapped(x: object) -> object:
    if not isinstance(x, torch.Tensor):
        return x
    assert x.dtype != torch.float64, "float64 on a device that may have none"
    return Elsewhere(x)


def as_given(x: object, inputs: list) -> object:
    """Return the input that an operation in place has changed, not a new wrapper of it."""
    if not isinstance(x, torch.Tensor):
        return x
    return next((given for given in inputs if unwrapped(given) is x), wrapped(x))
