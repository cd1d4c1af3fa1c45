"""SAM-HQ: Segment Anything with one more token over finer features (Ke et al., arXiv:2306.01567).

These are segment_anything's modules and the parts that SAM-HQ adds, under its authors' names. So `sam_hq_vit_*.pth` is
read unchanged. Formulas: mask_decoder_hq.py of SysCV/sam-hq (Apache-2.0). The decoder always gives one mask: the single
mask, or the best of the three when several are asked for. The new token's logits are added to it.
"""

from __future__ import annotations

from functools import partial

import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.mask_decoder import MLP
from torch import Tensor, nn

from workers.engine.promptable import half_precision

PATCH_SIZE_PX = 16

# Prompts decoded at once on a CPU: each takes about 100 MiB at full size. On a GPU all prompts of a call go at once.
AT_ONCE_ON_CPU = 4


def build_sam_hq(
    *,
    width: int,
    depth: int,
    heads: int,
    global_blocks: tuple[int, ...],
    image_px: int = 1024,
    channels: int = 256,
    window: int = 14,
) -> Sam:
    """The architecture with random weights, in training mode. The first four arguments are the image encoder's."""
    encoder = HqImageEncoder(
        img_size=image_px,
        patch_size=PATCH_SIZE_PX,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        out_chans=channels,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=window,
        global_attn_indexes=global_blocks,
    )
    return build_around(encoder, width=width, image_px=image_px, channels=channels)


def build_around(image_encoder: nn.Module, *, width: int, image_px: int = 1024, channels: int = 256) -> Sam:
    """The same with another image encoder. width: of the features that the decoder gets from SAM-HQ's own."""
    grid = (image_px // PATCH_SIZE_PX, image_px // PATCH_SIZE_PX)
    return Sam(
        image_encoder=image_encoder,
        prompt_encoder=PromptEncoder(
            embed_dim=channels, image_embedding_size=grid, input_image_size=(image_px, image_px), mask_in_chans=16
        ),
        mask_decoder=HqMaskDecoder(
            transformer=TwoWayTransformer(depth=2, embedding_dim=channels, mlp_dim=2048, num_heads=8),
            transformer_dim=channels,
            encoder_width=width,
        ),
    )


build_sam_hq_vit_b = partial(build_sam_hq, width=768, depth=12, heads=12, global_blocks=(2, 5, 8, 11))
build_sam_hq_vit_l = partial(build_sam_hq, width=1024, depth=24, heads=16, global_blocks=(5, 11, 17, 23))
build_sam_hq_vit_h = partial(build_sam_hq, width=1280, depth=32, heads=16, global_blocks=(7, 15, 23, 31))


class HqImageEncoder(ImageEncoderViT):  # type: ignore[misc]  # segment_anything carries no types
    """From pixels (n, 3, H, W) to (n, channels + width, h, w).

    The first channels are SAM's embedding. The other ones are the features after the first block of global attention.
    """

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x) + self.pos_embed
        after_global: list[Tensor] = []
        for block in self.blocks:
            x = block(x)
            after_global += [x] if block.window_size == 0 else []
        return torch.cat([self.neck(x.permute(0, 3, 1, 2)), after_global[0].permute(0, 3, 1, 2)], dim=1)


class HqMaskDecoder(MaskDecoder):  # type: ignore[misc]
    """SAM's mask decoder with the high-quality token. It reads the embeddings of `HqImageEncoder`."""

    def __init__(self, *, transformer: nn.Module, transformer_dim: int, encoder_width: int) -> None:
        super().__init__(transformer=transformer, transformer_dim=transformer_dim)
        middle, fine = transformer_dim // 4, transformer_dim // 8
        self.hf_token = nn.Embedding(1, transformer_dim)
        self.hf_mlp = MLP(transformer_dim, transformer_dim, fine, 3)
        self.compress_vit_feat = _grow_fourfold(encoder_width, transformer_dim, fine)
        self.embedding_encoder = _grow_fourfold(transformer_dim, middle, fine)
        self.embedding_maskfeature = nn.Sequential(
            nn.Conv2d(fine, middle, 3, padding=1), LayerNorm2d(middle), nn.GELU(), nn.Conv2d(middle, fine, 3, padding=1)
        )

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
    ) -> tuple[Tensor, Tensor]:
        """MaskDecoder's arguments, for one image. Returns logits (n, 1, 4 h, 4 w) and predicted IoUs (n, 1)."""
        embedding = image_embeddings[:, : self.transformer_dim]
        early = image_embeddings[:, self.transformer_dim :]
        features = self.embedding_encoder(embedding) + self.compress_vit_feat(early)
        source = embedding + dense_prompt_embeddings[:1]
        outputs = slice(1, None) if multimask_output else slice(0, 1)
        prompts = sparse_prompt_embeddings
        step = len(prompts) if prompts.is_cuda else AT_ONCE_ON_CPU
        parts = [
            self._decode(source, image_pe, features, prompts[first : first + step], outputs)
            for first in range(0, len(prompts), step)
        ]
        logits, predicted_iou = zip(*parts, strict=True)
        return torch.cat(logits), torch.cat(predicted_iou)

    def _decode(
        self, source: Tensor, position: Tensor, features: Tensor, sparse: Tensor, outputs: slice
    ) -> tuple[Tensor, Tensor]:
        # run the transformer
        n, (_, channels, height, width) = len(sparse), source.shape
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight, self.hf_token.weight])
        tokens = torch.cat([own.expand(n, -1, -1), sparse], dim=1)
        tokens, pixels = self.transformer(source.expand(n, -1, -1, -1), position.expand(n, -1, -1, -1), tokens)

        # choose SAM's mask
        with half_precision(tokens.device, is_wanted=False):
            ious = self.iou_prediction_head(tokens[:, 0].float())
        predicted_iou, best = ious[:, outputs].max(dim=1, keepdim=True)
        mlps = list(self.output_hypernetworks_mlps)[outputs]
        masks = tokens[:, 1 : 1 + self.num_mask_tokens][:, outputs]
        kernels = torch.stack([mlp(masks[:, number]) for number, mlp in enumerate(mlps)], dim=1)
        kernel = kernels.take_along_dim(best[..., None], dim=1)

        # add the high-quality token's logits
        pixels = self.output_upscaling(pixels.transpose(1, 2).reshape(n, channels, height, width))
        fine = self.embedding_maskfeature(pixels) + features
        hq_kernel = self.hf_mlp(tokens[:, 1 + self.num_mask_tokens])[:, None]
        logits = kernel @ pixels.flatten(2) + hq_kernel @ fine.flatten(2)
        return logits.view(n, 1, *pixels.shape[2:]), predicted_iou


def _grow_fourfold(channels_in: int, middle: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(channels_in, middle, kernel_size=2, stride=2),
        LayerNorm2d(middle),
        nn.GELU(),
        nn.ConvTranspose2d(middle, channels_out, kernel_size=2, stride=2),
    )
