"""One int8 peer in a process of its own environment: `peers.py` starts this file there and talks to it in JSON lines.

It imports nothing of this package, because its environment does not have it. One line in, one line out:

    {"do": "prepare", "engine": "openvino" | "onnxruntime", "model": FOLDER, "class": NAME, "samples": FILE,
     "threads": N}
    {"do": "inputs", "file": FILE}     the batch of the next calls, with what an engine compiles for its shape
    {"do": "call", "variant": NAME}    one call: {"ms": ...}; "prepare" lists an engine's variants
    {"do": "output", "variant": NAME, "file": FILE}     the logits of that batch, for comparing

An answer with "error" means that the engine cannot do it; the process lives on.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

Arrays = dict[str, np.ndarray]


class Engine(Protocol):
    versions: dict[str, str]
    variants: tuple[str, ...]

    def use_(self, inputs: Arrays) -> None: ...

    def call(self, variant: str) -> np.ndarray: ...


class Scores(nn.Module):
    """A transformers model as a function from tensors, in the order of ``names``, to its logits."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], generates: bool) -> None:
        super().__init__()
        self.model, self.names = model, names
        self.fixed: dict[str, Any] = {"use_cache": False} if generates else {}

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, tensors, strict=True)), **self.fixed).logits


class OpenVino:
    """NNCF's post-training int8 with its settings for transformers: compiled once for every shape, as other engines
    are, and once more for the very shape of each batch."""

    variants = ("any shape", "this shape")

    def __init__(self, scores: Scores, samples: list[dict[str, Tensor]], threads: int) -> None:
        import nncf
        import openvino as ov

        self.versions = {"openvino": ov.__version__, "nncf": nncf.__version__}
        self.core, self.threads, self.names = ov.Core(), threads, scores.names
        example = tuple(samples[0][name] for name in scores.names)
        converted = ov.convert_model(scores, example_input=example)
        for port, name in zip(converted.inputs, scores.names, strict=True):
            port.get_tensor().set_names({name})
        rows = [{name: tensor.numpy() for name, tensor in sample.items()} for sample in samples]
        self.model = nncf.quantize(
            converted,
            nncf.Dataset(rows),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(rows),
        )
        self.requests: dict[str, Any] = {"any shape": self._request(self.model)}

    def _request(self, model: Any) -> Any:
        options = {"INFERENCE_NUM_THREADS": self.threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        return self.core.compile_model(model, "CPU", options).create_infer_request()

    def use_(self, inputs: Arrays) -> None:
        self.requests.pop("this shape", None)
        model = self.model.clone()
        model.reshape({name: list(inputs[name].shape) for name in self.names})
        self.requests["this shape"] = self._request(model)
        self.inputs = inputs

    def call(self, variant: str) -> np.ndarray:
        return self.requests[variant].infer(self.inputs, share_inputs=True, share_outputs=True)[0]


class OnnxRuntime:
    """ONNX Runtime's static quantization: int8 weights per channel, uint8 inputs, its own preprocessing."""

    variants = ("any shape",)

    def __init__(self, scores: Scores, samples: list[dict[str, Tensor]], threads: int) -> None:
        import onnxruntime as ort
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Reader(CalibrationDataReader):
            def __init__(self) -> None:
                self.rows = iter({name: tensor.numpy() for name, tensor in sample.items()} for sample in samples)

            def get_next(self) -> dict[str, np.ndarray] | None:
                return next(self.rows, None)

        self.versions = {"onnxruntime": ort.__version__}
        self.names = scores.names
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        # Its threads must not spin while another engine is measured.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        with tempfile.TemporaryDirectory() as folder:
            plain, inferred, quantized = (str(Path(folder) / name) for name in ("a.onnx", "b.onnx", "c.onnx"))
            axes = {name: {axis: f"{name}_{axis}" for axis in range(samples[0][name].ndim)} for name in scores.names}
            torch.onnx.export(
                scores,
                tuple(samples[0][name] for name in scores.names),
                plain,
                input_names=list(scores.names),
                output_names=["logits"],
                dynamic_axes=axes,
                dynamo=False,
            )
            large = sum(p.numel() * p.element_size() for p in scores.parameters()) > 1.8e9
            quant_pre_process(plain, inferred, skip_symbolic_shape=True, save_as_external_data=large)
            quantize_static(
                inferred,
                quantized,
                Reader(),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=True,
                use_external_data_format=large,
            )
            self.session = ort.InferenceSession(quantized, options, providers=["CPUExecutionProvider"])

    def use_(self, inputs: Arrays) -> None:
        self.inputs = {name: inputs[name] for name in self.names}

    def call(self, variant: str) -> np.ndarray:
        return self.session.run(None, self.inputs)[0]


def prepare(request: Mapping[str, Any]) -> Engine:
    """Load the dense model and quantize it.

    The samples are one file per calibration batch, all of the same input names.
    """
    import transformers

    torch.set_num_threads(int(request["threads"]))
    model = getattr(transformers, request["class"]).from_pretrained(request["model"], attn_implementation="sdpa").eval()
    samples = [read(path) for path in request["samples"]]
    scores = Scores(model, tuple(samples[0]), bool(model.can_generate())).eval()
    engines: dict[str, Any] = {"openvino": OpenVino, "onnxruntime": OnnxRuntime}
    with torch.inference_mode(False), torch.no_grad():
        return engines[request["engine"]](scores, samples, int(request["threads"]))


def read(path: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def answer(request: Mapping[str, Any], engine: Engine | None) -> tuple[dict[str, Any], Engine | None]:
    what = request["do"]
    if what == "prepare":
        start = time.perf_counter()
        engine = prepare(request)
        return {
            "seconds": time.perf_counter() - start,
            "versions": engine.versions,
            "variants": engine.variants,
        }, engine
    if engine is None:
        raise RuntimeError(f"{what} before prepare")
    if what == "inputs":
        engine.use_({name: tensor.numpy() for name, tensor in read(request["file"]).items()})
        return {}, engine
    if what == "call":
        start = time.perf_counter()
        engine.call(request["variant"])
        return {"ms": (time.perf_counter() - start) * 1000}, engine
    if what == "output":
        from safetensors.torch import save_file

        save_file({"logits": torch.from_numpy(np.array(engine.call(request["variant"])))}, request["file"])
        return {}, engine
    raise ValueError(f"unknown request {what!r}")


def serve() -> None:
    # The libraries print to standard output: answers go to a copy of it, everything else to standard error.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    engine: Engine | None = None
    for line in sys.stdin:
        try:
            reply, engine = answer(json.loads(line), engine)
        except Exception as error:  # whatever a peer raises is its answer
            reply = {"error": f"{type(error).__name__}: {str(error).strip() or 'no message'}"[:2000]}
        answers.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    serve()
