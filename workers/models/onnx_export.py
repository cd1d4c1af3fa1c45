"""SAM's prompt encoder and mask decoder as one ONNX file, in the convention of segment_anything's own export.

Inputs, float32:
    image_embeddings (1, C, h, w).
    point_coords (n, p, 2): x and y in pixels of the encoder's input.
    point_labels (n, p): 1 inside, 0 outside, 2 and 3 a box's first and last corner, -1 a padding point. SAM expects a
        padding point after points without a box.
    mask_input (1, 1, 4h, 4w) and has_mask_input (1,), 0 or 1.
    orig_im_size (2,): height and width.
Outputs:
    masks (n, 4, height, width): logits in the image.
    iou_predictions (n, 4).
    low_res_masks (n, 4, 4h, 4w).

The first of the four masks is the single mask. The other three are for an ambiguous prompt. The caller chooses among
them, so a box needs no padding point. n, p and the image's size are free. In the authors' export n is 1, and
segment_anything 1.0's SamOnnxModel fixes the image's size to the size of the traced example.

Run as a program: python -m workers.models.onnx_export NAME [FILE], for `maskfleet models export-onnx`.
"""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn import functional as F

from workers.models.files import onnx_path, weights_sha256
from workers.models.loading import load_model, require_libraries
from workers.models.registry import find_model
from workers.models.spec import ModelError, ModelSpec

INPUTS = ("image_embeddings", "point_coords", "point_labels", "mask_input", "has_mask_input", "orig_im_size")
OUTPUTS = ("masks", "iou_predictions", "low_res_masks")
WEIGHTS_KEY = "maskfleet.weights_sha256"  # in the file's metadata

_OPSET = 17  # read by every onnxruntime since 1.12


class PromptDecoder(nn.Module):
    """From an image's embedding and prompts to masks. The module's docstring describes its inputs and outputs."""

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        self.prompt_encoder, self.mask_decoder = sam.prompt_encoder, sam.mask_decoder
        self.side = sam.image_encoder.img_size

    def forward(
        self,
        image_embeddings: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
        orig_im_size: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        low_res_masks, iou_predictions = self.mask_decoder.predict_masks(
            image_embeddings=image_embeddings,
            image_pe=self.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=self._embed_points(point_coords, point_labels),
            dense_prompt_embeddings=self._embed_mask(mask_input, has_mask_input),
        )
        return self._in_image(low_res_masks, orig_im_size), iou_predictions, low_res_masks

    def _embed_points(self, coords: Tensor, labels: Tensor) -> Tensor:
        """PromptEncoder's embeddings of points and boxes. Arithmetic selects them: a trace cannot branch on labels."""
        encoder, kinds = self.prompt_encoder, labels[..., None]
        position: Tensor = encoder.pe_layer._pe_encoding((coords + 0.5) / self.side)
        embedded: Tensor = position * (kinds != -1) + encoder.not_a_point_embed.weight * (kinds == -1)
        for kind, embedding in enumerate(encoder.point_embeddings):
            embedded = embedded + embedding.weight * (kinds == kind)
        return embedded

    def _embed_mask(self, mask: Tensor, has_mask: Tensor) -> Tensor:
        encoder = self.prompt_encoder
        without: Tensor = encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        given: Tensor = encoder.mask_downscaling(mask)
        return has_mask * given + (1 - has_mask) * without

    def _in_image(self, low_res_masks: Tensor, size_hw: Tensor) -> Tensor:
        """Sam.postprocess_masks with sizes as tensors. With integers the trace would fix the sizes."""
        size = size_hw.float()
        inside = torch.floor(size * (self.side / size.max()) + 0.5).to(torch.int64)
        masks = F.interpolate(low_res_masks, (self.side, self.side), mode="bilinear", align_corners=False)
        masks = masks[..., : inside[0], : inside[1]]
        height, width = size_hw.to(torch.int64)
        return F.interpolate(masks, (height, width), mode="bilinear", align_corners=False)


def export(sam: Sam, spec: ModelSpec, path: Path) -> None:
    """Write the decoder of `sam`, which holds spec's weights, to `path`, whole or not at all.

    Raises MissingLibraryError when onnx is not installed, ModelError when the file cannot be written.
    """
    require_libraries("writing ONNX", ("onnx",))
    content = _trace(sam, spec)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        raise ModelError(f"{spec.name}: cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            part.unlink()


def _trace(sam: Sam, spec: ModelSpec) -> bytes:
    """The ONNX file's bytes. Its metadata holds the weights' sha256."""
    import onnx

    with TemporaryDirectory() as folder, warnings.catch_warnings():
        traced = Path(folder) / "decoder.onnx"
        # Traced, not compiled by torch.export: that fails on slices when their size is an input, and takes minutes.
        # The ignored warnings are about tracing, and about asserts on shapes.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            PromptDecoder(sam).eval(),
            _example(sam),
            traced,
            dynamo=False,
            opset_version=_OPSET,
            input_names=INPUTS,
            output_names=OUTPUTS,
            dynamic_axes={
                "point_coords": {0: "prompts", 1: "points"},
                "point_labels": {0: "prompts", 1: "points"},
                "masks": {0: "prompts", 2: "height", 3: "width"},
                "iou_predictions": {0: "prompts"},
                "low_res_masks": {0: "prompts"},
            },
        )
        model = onnx.load_model(traced)
    onnx.helper.set_model_props(model, {WEIGHTS_KEY: weights_sha256(spec)})
    return bytes(model.SerializeToString())


def _example(sam: Sam) -> tuple[Tensor, ...]:
    """Inputs to trace with: two prompts of three points, an image that is not square."""
    encoder = sam.prompt_encoder
    return (
        torch.zeros(1, encoder.embed_dim, *encoder.image_embedding_size, device=sam.device),
        torch.full((2, 3, 2), 8.0, device=sam.device),
        torch.tensor([[1.0, 0, -1], [2, 3, 1]], device=sam.device),
        torch.zeros(1, 1, *encoder.mask_input_size, device=sam.device),
        torch.zeros(1, device=sam.device),
        torch.tensor([30.0, 40], device=sam.device),
    )


def main(name: str, file: str | None = None) -> None:
    spec = find_model(name)
    path = Path(file) if file else onnx_path(spec)
    export(load_model(spec, "cpu").sam, spec, path)  # type: ignore[attr-defined]  # of the models with such a decoder
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ModelError as failure:
        sys.exit(f"maskfleet: {failure}")
