"""SAM's decoder in onnxruntime, in place of segment_anything's prompt encoder and mask decoder.

The two modules here have the signatures of the modules that they replace. The first arranges prompts as the ONNX file
expects them. The second runs the file. So the code for points, boxes, batches and masks is the same for both decoders.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from segment_anything.modeling import PromptEncoder, Sam
from torch import Tensor, nn

from workers.models.files import onnx_path, weights_sha256
from workers.models.loading import ONNX_LIBRARIES, require_libraries
from workers.models.onnx_export import INPUTS, WEIGHTS_KEY, export
from workers.models.onnx_session import open_session
from workers.models.spec import ModelError, ModelSpec

log = logging.getLogger(__name__)

_exporting = threading.Lock()

_ASKED_WITH, _ASKED_FOR = INPUTS[:-1], ("low_res_masks", "iou_predictions")
# Each prompt needs the image's embedding, 4 MiB, in memory a few times. Sixteen at once took a tenth to a fifth more
# time than four (EPYC Zen5, one thread, November 2026).
_PROMPTS_A_RUN = 4
_PADDING, _FIRST_CORNER, _LAST_CORNER = -1, 2, 3  # the official export's point labels besides 0 and 1


def with_onnx_decoder(sam: Sam, spec: ModelSpec) -> Sam:
    """`sam` with spec's exported decoder. It runs on the CPU, or on the GPU of `sam` when onnxruntime has CUDA.

    Exports the decoder when its file is absent. It depends only on the weights, so a worker needs no extra step. Raises
    MissingLibraryError when onnxruntime is not installed, ModelError when the file is not a decoder of these weights.
    """
    require_libraries("--decoder onnx", ONNX_LIBRARIES)
    path = onnx_path(spec)
    with _exporting:
        if not path.is_file():
            log.info("%s: exporting its decoder to %s", spec.name, path)
            export(sam, spec, path)
    session = _open(path, spec, sam.device)
    decoding = Sam(
        image_encoder=sam.image_encoder,
        prompt_encoder=_PromptsInRows(sam.prompt_encoder),
        mask_decoder=_SessionDecoder(session, sam.prompt_encoder.mask_input_size),
        pixel_mean=sam.pixel_mean.flatten().tolist(),
        pixel_std=sam.pixel_std.flatten().tolist(),
    )
    return decoding.to(sam.device).eval()


def _open(path: Path, spec: ModelSpec, device: torch.device) -> Any:
    from onnx.utils import Extractor

    model = _read(path, spec)
    try:
        # Cut off the part that makes masks of the image's size: onnxruntime would compute it for nothing.
        asked = Extractor(model).extract_model(list(_ASKED_WITH), list(_ASKED_FOR))
        return open_session(asked.SerializeToString(), str(device), threads=torch.get_num_threads())
    except Exception as error:  # onnxruntime's own errors have no other common class
        raise ModelError(f"{path}: onnxruntime cannot run it ({error}); {_remedy(spec)}") from error


def _read(path: Path, spec: ModelSpec) -> Any:
    """The file as onnx's ModelProto. Raises ModelError unless its metadata names spec's weights."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_model(path, load_external_data=False)
    except (DecodeError, OSError) as error:
        raise ModelError(f"{path}: cannot be read as ONNX ({error}); {_remedy(spec)}") from error
    found = {prop.key: prop.value for prop in model.metadata_props}.get(WEIGHTS_KEY)
    expected = weights_sha256(spec)
    if found != expected:
        held = "no decoder of ours" if found is None else f"the decoder of weights with sha256 {found}"
        raise ModelError(f"{path}: {held}, expected that of {spec.name}, {expected}; {_remedy(spec)}")
    return model


def _remedy(spec: ModelSpec) -> str:
    return f"run `maskfleet models export-onnx {spec.name}`"


class _PromptsInRows(nn.Module):
    """PromptEncoder's signature. Its "sparse embeddings" are rows of x, y and label: (n, points, 3) float32."""

    nothing: Tensor

    def __init__(self, encoder: PromptEncoder) -> None:
        super().__init__()
        self.mask_input_size = encoder.mask_input_size
        self.register_buffer("nothing", torch.zeros(1, 1, 1, 1), persistent=False)

    def get_dense_pe(self) -> Tensor:
        """Not used: the file holds the positional encoding."""
        return self.nothing

    def forward(
        self, points: tuple[Tensor, Tensor] | None, boxes: Tensor | None, masks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if masks is not None:
            raise ValueError("decoder=onnx answers no mask prompts")
        parts = []
        if points is not None:
            coords, labels = points
            parts.append(_rows(coords, labels))
            if boxes is None:
                padding = coords.new_zeros(len(coords), 1, 2)
                parts.append(_rows(padding, torch.full_like(labels[:, :1], _PADDING)))
        if boxes is not None:
            corners = boxes.reshape(-1, 2, 2)
            kinds = torch.tensor([_FIRST_CORNER, _LAST_CORNER], device=corners.device)
            parts.append(_rows(corners, kinds.expand(len(corners), 2)))
        return (torch.cat(parts, dim=1) if parts else self.nothing), self.nothing


def _rows(coords: Tensor, labels: Tensor) -> Tensor:
    return torch.cat([coords.float(), labels[..., None].float()], dim=-1)


class _SessionDecoder(nn.Module):
    """MaskDecoder's signature, for the rows of `_PromptsInRows`."""

    def __init__(self, session: Any, mask_input_size: tuple[int, int]) -> None:
        super().__init__()
        self.session = session
        self.constants = {
            "mask_input": np.zeros((1, 1, *mask_input_size), np.float32),
            "has_mask_input": np.zeros(1, np.float32),
        }

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
    ) -> tuple[Tensor, Tensor]:
        """Logits (n, 3 or 1, h, w) and predicted IoUs (n, 3 or 1), on the device of the embedding."""
        kept = slice(1, None) if multimask_output else slice(0, 1)
        embedding = image_embeddings.float().cpu().numpy()
        found = [self._run(embedding, rows, kept) for rows in torch.split(sparse_prompt_embeddings, _PROMPTS_A_RUN)]
        logits, ious = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*found, strict=True))
        return logits.to(image_embeddings.device), ious.to(image_embeddings.device)

    def _run(
        self, embedding: NDArray[np.float32], rows: Tensor, kept: slice
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        prompts = rows.cpu().numpy()
        inputs = {
            "image_embeddings": embedding,
            "point_coords": prompts[..., :2],
            "point_labels": prompts[..., 2],
            **self.constants,
        }
        logits, iou = self.session.run(list(_ASKED_FOR), inputs)
        return logits[:, kept], iou[:, kept]
