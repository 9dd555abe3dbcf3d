"""onnxsim's structured pruning (0.8.1): Wanda's scores on the exported network, followed by its own closed-form refit.

It works on ONNX graphs and not on the groups that the other methods share, so it is exported, cut, counted and scored
here: multiply-accumulates of convolutions and matrix products, from the shapes in the graph.

    pip install onnxsim==0.8.1 onnx onnxscript onnxruntime
"""

from __future__ import annotations

import math
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from benchmarks.quality import Bench

METHOD = "onnxsim Wanda + its refit"
BATCH = 100  # samples that the exported network takes at once; test sets are whole multiples
STEPS = 8  # of the bisection for its sparsity
MOST = 0.95  # of the channels of a layer that go
CALIBRATION = 5  # batches; the tool holds all of their activations


def run(bench: Bench, share: float) -> dict[str, Any]:
    """The largest network within the share of the MACs, or the smallest that the tool makes; scored like the others."""
    import onnxruntime
    import onnxsim

    original = simplified(bench)
    name = original.graph.input[0].name
    samples = [
        {name: batch.inputs.numpy()}
        for batch in bench.prepared.calibration.batches(BATCH, torch.arange(CALIBRATION * BATCH))
    ]

    def cut(sparsity: float) -> Any:
        return onnxsim.apply_structured_wanda_pruning(original, calibration_data=samples, sparsity=sparsity)

    whole, low, high = macs(original), 0.0, MOST
    best = cut(MOST)
    for _ in range(STEPS if macs(best) <= share * whole else 0):
        middle = (low + high) / 2
        pruned = cut(middle)
        if macs(pruned) <= share * whole:
            high, best = middle, pruned
        else:
            low = middle
    refitted = onnxsim.apply_pruning_finetune(original, best, calibration_data=samples)
    session = onnxruntime.InferenceSession(refitted.SerializeToString(), providers=["CPUExecutionProvider"])
    right, loss, seen = 0, 0.0, 0
    for batch in bench.evaluation.batches(BATCH):
        scores = torch.from_numpy(session.run(None, {name: batch.inputs.numpy()})[0])
        right += int((scores.argmax(1) == batch.labels).sum())
        loss += float(torch.nn.functional.cross_entropy(scores.double(), batch.labels, reduction="sum"))
        seen += len(scores)
    return {
        "macs": macs(refitted) / whole,
        "params": parameters(refitted) / parameters(original),
        "widths": {},
        "top1": 100 * right / seen,
        "loss": loss / seen,
    }


def simplified(bench: Bench) -> Any:
    """The network as an ONNX model of fixed batch size, its batch norms folded."""
    import onnx
    import onnxsim

    module = bench.prepared.network.module.eval()
    probe = bench.prepared.network.examples[0][:1]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "network.onnx"
        torch.onnx.export(module, (probe.expand(BATCH, *probe.shape[1:]).contiguous(),), str(path), dynamo=False)
        model, sound = onnxsim.simplify(onnx.load(path))
    assert sound, "the simplified network gives the same outputs"
    return model


def macs(model: Any) -> float:
    """Multiply-accumulates of the convolutions and matrix products with constant weights."""
    from onnx import shape_inference

    inferred = shape_inference.infer_shapes(model).graph
    sizes = {
        value.name: [place.dim_value for place in value.type.tensor_type.shape.dim]
        for value in (*inferred.value_info, *inferred.output)
    }
    weights = {tensor.name: math.prod(tensor.dims) for tensor in inferred.initializer}
    total = 0.0
    for node in inferred.node:
        if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in weights:
            places = sizes[node.output[0]]
            positions = places[0] * math.prod(places[2:]) if node.op_type == "Conv" else math.prod(places[:-1])
            total += positions * weights[node.input[1]]
    return total


def parameters(model: Any) -> int:
    """Numbers in the weights."""
    return sum(math.prod(tensor.dims) for tensor in model.graph.initializer)
