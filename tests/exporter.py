"""Half of the time of a small export goes into reading five hundred operators' sources anew, to the same table."""

import functools

import torch


def read_operators_once():
    """Let torch's exporter keep its table for the process, for no test is about it; nothing is imported before."""
    export = torch.onnx.export

    @functools.wraps(export)
    def first(*args, **options):
        torch.onnx.export = export
        _keep_table()
        return export(*args, **options)

    torch.onnx.export = first


def _keep_table():
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:  # another torch: it reads them every time
        return
    read = ONNXRegistry.from_torchlib.__func__
    made = functools.cache(lambda opset: read(ONNXRegistry, opset))

    def from_torchlib(cls, opset_version=None):
        whole = made(opset_version) if opset_version else made(cls().opset_version)
        mine = cls()  # an export adds operators of its own
        mine._opset_version = whole._opset_version
        mine.functions = {target: list(known) for target, known in whole.functions.items()}
        return mine

    ONNXRegistry.from_torchlib = classmethod(from_torchlib)
