"""A trained model's fixed part as ONNX, held against the model itself: what does not follow what is in an image."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from piip_scale.config.run import RunConfig
from piip_scale.errors import ConfigError, ModelError

FILE = "model.onnx"
_NEEDED = ("onnx", "onnxruntime", "onnxscript")
_MOST_BYTES = 2**31 - 1  # of a protocol buffer, which a file of ONNX is
_MOST_DIFFERENCE = 1e-3
_TIMED_CALLS = 5


@dataclass(frozen=True)
class OnnxReport:
    """What was written, and how it compares.

    Attributes:
        outputs: Shapes of what the graph returns, by name.
        difference: The largest one from the model's own outputs, as a share of their largest magnitude.
        seconds: Of one image in onnxruntime.
        eager_seconds: Of one in torch, on as many threads.
        threads: How many those are.
        left_out: What of the model is not in the graph, and why; empty where all of it is.
    """

    outputs: dict[str, tuple[int, ...]]
    difference: float
    seconds: float
    eager_seconds: float
    threads: int
    left_out: str


def check_onnx(config: RunConfig, num_parameters: int, size_px: tuple[int, int]) -> None:
    """Whether a model can be written at all, before anything is.

    Args:
        config: The run.
        num_parameters: Of the model.
        size_px: Height and width of the images.

    Raises:
        ConfigError: A package is missing, or the size is none that evaluation could make.
        ModelError: The model is too large.
    """
    if absent := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"ONNX needs {', '.join(absent)}", rule="they are the extra onnx", fix="pip install 'piip-scale[onnx]'"
        )
    if num_parameters * torch.float32.itemsize > _MOST_BYTES:
        raise ModelError(
            f"{num_parameters:,} parameters cannot be written as ONNX",
            rule=f"a file of it holds {_MOST_BYTES:,} bytes, and a parameter is {torch.float32.itemsize}",
            fix="leave --onnx out: safetensors has no such limit",
        )
    data: Any = config.data  # each task's has an augment of its own
    multiple = getattr(data.augment, "pad_multiple_px", 1)
    if any(side % multiple for side in size_px):
        raise ConfigError(
            "--onnx", value="x".join(map(str, size_px)), rule=f"multiples of {multiple} px, as images are padded to"
        )


def write_onnx(model: nn.Module, config: RunConfig, size_px: tuple[int, int], path: Path) -> OnnxReport:
    """Writes the graph of one image of a fixed size, RGB uint8 (1, H, W, 3), and compares it with the model.

    Args:
        model: A ``TrainableModel`` in eval mode, float32, on the CPU.
        config: Its run.
        size_px: Height and width of the image.
        path: The file to write.

    Raises:
        ModelError: torch cannot export an operator of it, or what comes out differs.
        OSError: The disk refuses.
    """
    static = _Static(model, config).eval()
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (1, *size_px, 3), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        expected = model.static_outputs(static.normalised(image))  # type: ignore[operator]
        _export(static, image, list(expected), path)
        outputs, seconds = _run(path, image)
        eager_seconds = _timed(lambda: static(image))
    difference = max(_difference(found, one) for found, one in zip(outputs, expected.values(), strict=True))
    if not difference <= _MOST_DIFFERENCE:
        raise ModelError(
            f"{path.name} computes something else", value=f"{difference:.1e}", rule=f"at most {_MOST_DIFFERENCE:g}"
        )
    shapes = {name: tuple(value.shape) for name, value in expected.items()}
    return OnnxReport(shapes, difference, seconds, eager_seconds, torch.get_num_threads(), model.not_static)  # type: ignore[arg-type]


class _Static(nn.Module):
    """A model's fixed part behind its normalisation."""

    def __init__(self, model: nn.Module, config: RunConfig) -> None:
        super().__init__()
        self.model = model
        data: Any = config.data
        self._mean, self._std = data.augment.mean, data.augment.std

    def normalised(self, images_BHWC: Tensor) -> Tensor:
        """RGB uint8 (B, H, W, 3) to what the network takes, float32 (B, 3, H, W)."""
        mean_C11, std_C11 = (torch.tensor(values).view(3, 1, 1) for values in (self._mean, self._std))
        return (images_BHWC.permute(0, 3, 1, 2).float() - mean_C11) / std_C11

    def forward(self, images_BHWC: Tensor) -> tuple[Tensor, ...]:
        """The outputs, in the order of ``static_outputs``."""
        outputs: dict[str, Tensor] = self.model.static_outputs(self.normalised(images_BHWC))  # type: ignore[operator]
        return tuple(outputs.values())


def _export(module: nn.Module, image: Tensor, names: list[str], path: Path) -> None:
    try:
        with _quietly():
            program = torch.onnx.export(
                module, (image,), input_names=["images"], output_names=names, dynamo=True, verbose=False
            )
    except (torch.onnx.OnnxExporterError, torch.onnx.errors.OnnxExporterError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise ModelError("torch cannot write this model as ONNX", value=reason, fix="leave --onnx out") from error
    assert program is not None
    graph = program.model_proto
    _forget_origin(graph)
    path.write_bytes(graph.SerializeToString())


def _forget_origin(message: Any) -> None:
    """Takes out of a graph what the exporter notes of the code it came from: files of this machine among it."""
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.type == field.TYPE_MESSAGE:
            for part in value if isinstance(value, Iterable) else [value]:
                _forget_origin(part)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """The exporter reports its progress and its own deprecations."""
    logger, level = logging.getLogger("torch.onnx"), logging.getLogger("torch.onnx").level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _run(path: Path, image: Tensor) -> tuple[list[Tensor], float]:
    """What onnxruntime computes, and how long it takes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    fed = {"images": image.numpy()}
    outputs = [torch.from_numpy(output) for output in session.run(None, fed)]
    return outputs, _timed(lambda: session.run(None, fed))


def _timed(call: Callable[[], object]) -> float:
    """Seconds of the fastest of a few calls, after one that does not count."""
    call()
    seconds = []
    for _ in range(_TIMED_CALLS):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def _difference(found: Tensor, expected: Tensor) -> float:
    scale = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((found - expected).abs().max() / scale)
