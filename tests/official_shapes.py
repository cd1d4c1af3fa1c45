"""Names and shapes of the weights in the files of models' authors, written down from their repositories.

github.com/facebookresearch/segment-anything at dca509f for vit_b, vit_l and vit_h; github.com/ChaoningZhang/MobileSAM
at 34bbbfd for mobile_sam. They do not depend on the modules that the loader builds. Tests compare the two.
"""

from __future__ import annotations

Shapes = dict[str, tuple[int, ...]]

# width, heads, blocks, step: every step-th block, also the last one, attends to the whole image
_VITS = {"sam_vit_b": (768, 12, 12, 3), "sam_vit_l": (1024, 16, 24, 6), "sam_vit_h": (1280, 16, 32, 8)}


def official_shapes(name: str) -> Shapes:
    """Every name in the file, for sam_vit_b, sam_vit_l, sam_vit_h and mobile_sam."""
    encoder = _tiny_vit() if name == "mobile_sam" else _vit(*_VITS[name])
    return {f"image_encoder.{name}": shape for name, shape in encoder.items()} | _prompt_encoder() | _mask_decoder()


def _dense(name: str, made: int, *read: int) -> Shapes:
    return {f"{name}.weight": (made, *read), f"{name}.bias": (made,)}


def _norm(name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _neck(width: int) -> Shapes:
    weights = {"neck.0.weight": (256, width, 1, 1), "neck.2.weight": (256, 256, 3, 3)}
    return weights | _norm("neck.1", 256) | _norm("neck.3", 256)


def _vit(width: int, heads: int, blocks: int, whole_every: int) -> Shapes:
    shapes: Shapes = {"pos_embed": (1, 64, 64, width)}
    shapes |= _dense("patch_embed.proj", width, 3, 16, 16)
    for number in range(blocks):
        name, side = f"blocks.{number}", 64 if (number + 1) % whole_every == 0 else 14
        shapes |= {f"{name}.attn.rel_pos_{axis}": (2 * side - 1, width // heads) for axis in "hw"}
        shapes |= _norm(f"{name}.norm1", width) | _norm(f"{name}.norm2", width)
        shapes |= _dense(f"{name}.attn.qkv", 3 * width, width) | _dense(f"{name}.attn.proj", width, width)
        shapes |= _dense(f"{name}.mlp.lin1", 4 * width, width) | _dense(f"{name}.mlp.lin2", width, 4 * width)
    return shapes | _neck(width)


def _tiny_vit() -> Shapes:
    shapes = _conv_bn("patch_embed.seq.0", 32, 3, 3) | _conv_bn("patch_embed.seq.2", 64, 32, 3)
    for block in range(2):
        name = f"layers.0.blocks.{block}"
        shapes |= _conv_bn(f"{name}.conv1", 256, 64, 1) | _conv_bn(f"{name}.conv2", 256, 1, 3)
        shapes |= _conv_bn(f"{name}.conv3", 64, 256, 1)
    for layer, dim, following in ((0, 64, 128), (1, 128, 160), (2, 160, 320)):
        name = f"layers.{layer}.downsample"
        shapes |= _conv_bn(f"{name}.conv1", following, dim, 1) | _conv_bn(f"{name}.conv2", following, 1, 3)
        shapes |= _conv_bn(f"{name}.conv3", following, following, 1)
    for layer, dim, blocks, heads, window in ((1, 128, 2, 4, 7), (2, 160, 6, 5, 14), (3, 320, 2, 10, 7)):
        for block in range(blocks):
            name = f"layers.{layer}.blocks.{block}"
            shapes[f"{name}.attn.attention_biases"] = (heads, window * window)
            shapes |= _norm(f"{name}.attn.norm", dim) | _norm(f"{name}.mlp.norm", dim)
            shapes |= _dense(f"{name}.attn.qkv", 3 * dim, dim) | _dense(f"{name}.attn.proj", dim, dim)
            shapes |= _dense(f"{name}.mlp.fc1", 4 * dim, dim) | _dense(f"{name}.mlp.fc2", dim, 4 * dim)
            shapes |= _conv_bn(f"{name}.local_conv", dim, 1, 3)
    return shapes | _norm("norm_head", 320) | _dense("head", 1000, 320) | _neck(320)


def _conv_bn(name: str, made: int, read: int, side: int) -> Shapes:
    normed = {f"{name}.bn.{what}": (made,) for what in ("weight", "bias", "running_mean", "running_var")}
    return {f"{name}.c.weight": (made, read, side, side), **normed, f"{name}.bn.num_batches_tracked": ()}


def _prompt_encoder() -> Shapes:
    shapes: Shapes = {"pe_layer.positional_encoding_gaussian_matrix": (2, 128)}
    single = ["not_a_point_embed", "no_mask_embed", *(f"point_embeddings.{n}" for n in range(4))]
    shapes |= {f"{name}.weight": (1, 256) for name in single}
    shapes |= _dense("mask_downscaling.0", 4, 1, 2, 2) | _norm("mask_downscaling.1", 4)
    shapes |= _dense("mask_downscaling.3", 16, 4, 2, 2) | _norm("mask_downscaling.4", 16)
    shapes |= _dense("mask_downscaling.6", 256, 16, 1, 1)
    return {f"prompt_encoder.{name}": shape for name, shape in shapes.items()}


def _mask_decoder() -> Shapes:
    shapes: Shapes = {"iou_token.weight": (1, 256), "mask_tokens.weight": (4, 256)}
    for number in range(2):
        name = f"transformer.layers.{number}"
        shapes |= _attention(f"{name}.self_attn", 256)
        shapes |= _attention(f"{name}.cross_attn_token_to_image", 128)
        shapes |= _attention(f"{name}.cross_attn_image_to_token", 128)
        shapes |= _dense(f"{name}.mlp.lin1", 2048, 256) | _dense(f"{name}.mlp.lin2", 256, 2048)
        for norm in range(1, 5):
            shapes |= _norm(f"{name}.norm{norm}", 256)
    shapes |= _attention("transformer.final_attn_token_to_image", 128) | _norm("transformer.norm_final_attn", 256)
    # Transposed convolutions: input channels come first.
    shapes |= {"output_upscaling.0.weight": (256, 64, 2, 2), "output_upscaling.0.bias": (64,)}
    shapes |= {"output_upscaling.3.weight": (64, 32, 2, 2), "output_upscaling.3.bias": (32,)}
    shapes |= _norm("output_upscaling.1", 64)
    for name, made in [*((f"output_hypernetworks_mlps.{n}", 32) for n in range(4)), ("iou_prediction_head", 4)]:
        shapes |= _dense(f"{name}.layers.0", 256, 256) | _dense(f"{name}.layers.1", 256, 256)
        shapes |= _dense(f"{name}.layers.2", made, 256)
    return {f"mask_decoder.{name}": shape for name, shape in shapes.items()}


def _attention(name: str, inner: int) -> Shapes:
    shapes = _dense(f"{name}.out_proj", 256, inner)
    for what in "qkv":
        shapes |= _dense(f"{name}.{what}_proj", inner, 256)
    return shapes
