"""Tiny checkpoints of the model families: with their own configurations and format, and random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

LABELS = {0: "car", 1: "bus", 2: "traffic light"}


def save_detector(family: str, folder: Path) -> Path:
    """A transformers object-detection checkpoint with its image processor: rt_detr_v2, d_fine or rf_detr."""
    from transformers import RfDetrImageProcessor, RTDetrImageProcessor

    torch.manual_seed(5)
    model = {"rt_detr_v2": _rt_detr_v2, "d_fine": _d_fine, "rf_detr": _rf_detr}[family]()
    save(model, folder)
    side = {"height": 64, "width": 64}
    processor = RfDetrImageProcessor(size=side) if family == "rf_detr" else RTDetrImageProcessor(size=side)
    processor.save_pretrained(folder)
    return folder


def save(model: Any, folder: Path, noise: float = 0.1) -> None:
    """Save a model with random weights everywhere. Some heads are zero at first and answer the same to all images."""
    generator = torch.Generator().manual_seed(5)
    for weights in model.parameters():
        weights.data += noise * torch.randn(weights.shape, generator=generator)
    model.save_pretrained(folder)


def _detr_sizes() -> dict[str, Any]:
    return {
        "num_labels": 3,
        "id2label": LABELS,
        "label2id": {label: number for number, label in LABELS.items()},
        "d_model": 32,
        "encoder_hidden_dim": 32,
        "encoder_in_channels": [32, 32, 32],
        "encoder_ffn_dim": 32,
        "encoder_attention_heads": 2,
        "decoder_in_channels": [32, 32, 32],
        "decoder_ffn_dim": 32,
        "decoder_layers": 2,
        "decoder_attention_heads": 2,
        "num_queries": 12,
        "num_denoising": 0,
    }


def _rt_detr_v2() -> torch.nn.Module:
    from transformers import RTDetrResNetConfig, RTDetrV2Config, RTDetrV2ForObjectDetection

    backbone = RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 32, 32, 32], depths=[1, 1, 1, 1], out_features=["stage2", "stage3", "stage4"]
    )
    return RTDetrV2ForObjectDetection(RTDetrV2Config(backbone_config=backbone, **_detr_sizes()))


def _d_fine() -> torch.nn.Module:
    from transformers import DFineConfig, DFineForObjectDetection, HGNetV2Config

    backbone = HGNetV2Config(
        stem_channels=[3, 8, 8],
        hidden_sizes=[8, 32, 32, 32],
        stage_in_channels=[8, 8, 32, 32],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[8, 32, 32, 32],
        stage_num_blocks=[1, 1, 1, 1],
        stage_downsample=[False, True, True, True],
        stage_light_block=[False, False, True, True],
        stage_kernel_size=[3, 3, 5, 5],
        stage_numb_of_layers=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )
    return DFineForObjectDetection(DFineConfig(backbone_config=backbone, **_detr_sizes()))


def _rf_detr() -> torch.nn.Module:
    from transformers import RfDetrConfig, RfDetrForObjectDetection
    from transformers.models.rf_detr.configuration_rf_detr import RfDetrDinov2Config

    backbone = RfDetrDinov2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        patch_size=16,
        num_windows=2,
        out_indices=[1, 2],
    )
    return RfDetrForObjectDetection(
        RfDetrConfig(
            backbone_config=backbone,
            d_model=32,
            decoder_ffn_dim=32,
            decoder_layers=2,
            decoder_self_attention_heads=2,
            decoder_cross_attention_heads=2,
            num_queries=12,
            group_detr=2,
            num_labels=3,
            id2label=LABELS,
            label2id={label: number for number, label in LABELS.items()},
        )
    )


WORDS = ("red", "blue", "bus", "car", "a", "square", "person", ".")


def save_phrase_detector(family: str, folder: Path) -> Path:
    """A transformers checkpoint that finds boxes for phrases, with its processor: grounding_dino or owlv2."""
    torch.manual_seed(5)
    model, processor = {"grounding_dino": _grounding_dino, "owlv2": _owlv2}[family](folder / "words")
    save(model, folder, noise=0.02)
    processor.save_pretrained(folder)
    return folder


def _bert_tokenizer(folder: Path) -> Any:
    from transformers import BertTokenizerFast

    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "?")))
    return BertTokenizerFast.from_pretrained(folder, model_max_length=16)


def clip_tokenizer(folder: Path, most: int) -> Any:
    """A CLIP tokenizer with letters as its vocabulary, so every phrase has its own tokens."""
    import json

    from transformers import CLIPTokenizerFast

    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,:"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizerFast.from_pretrained(folder, model_max_length=most, pad_token="<|endoftext|>")


def _grounding_dino(folder: Path) -> tuple[Any, Any]:
    from transformers import (
        BertConfig,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
        SwinConfig,
    )

    tokenizer = _bert_tokenizer(folder)
    backbone = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage2", "stage3", "stage4"],
    )
    text = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    config = GroundingDinoConfig(
        backbone_config=backbone,
        text_config=text,
        d_model=32,
        encoder_layers=2,
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_layers=2,
        decoder_ffn_dim=32,
        decoder_attention_heads=2,
        num_queries=10,
        max_text_len=16,
        num_feature_levels=4,
    )
    pictures = GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    return GroundingDinoForObjectDetection(config), GroundingDinoProcessor(pictures, tokenizer)


def _owlv2(folder: Path) -> tuple[Any, Any]:
    from transformers import Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessor, Owlv2Processor

    tokenizer = clip_tokenizer(folder, 16)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Owlv2Config(
        text_config={
            **sizes,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 16,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**sizes, "image_size": 64, "patch_size": 16},
        projection_dim=32,
    )
    model = Owlv2ForObjectDetection(config)
    for weights in (model.box_head.dense2.weight, model.class_head.dense0.weight):
        weights.data *= 0.01  # otherwise every answer is at an end of its sigmoid
    pictures = Owlv2ImageProcessor(size={"height": 64, "width": 64})
    return model, Owlv2Processor(pictures, tokenizer)


def save_sam3(folder: Path) -> Path:
    """A checkpoint of SAM 3's image model with its processor."""
    from transformers import Sam3Config, Sam3ImageProcessor, Sam3Model, Sam3Processor

    torch.manual_seed(5)
    tokenizer = clip_tokenizer(folder / "words", 32)
    side = 56
    layers = {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    text = {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32, "hidden_size": 32}
    text |= {"vocab_size": len(tokenizer), "intermediate_size": 32, "projection_dim": 16}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    backbone = {
        "model_type": "sam3_vit_model",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": side,
        "patch_size": 7,
        "window_size": 4,
        "global_attn_indexes": [1],
        "pretrain_image_size": 28,
    }
    grid = side // 7
    config = Sam3Config(
        vision_config={
            "backbone_config": backbone,
            "fpn_hidden_size": 32,
            "backbone_feature_sizes": [[4 * grid, 4 * grid], [2 * grid, 2 * grid], [grid, grid]],
        },
        text_config=text,
        geometry_encoder_config=layers,
        detr_encoder_config=layers,
        detr_decoder_config={**layers, "num_queries": 9},
        mask_decoder_config={"hidden_size": 32, "num_attention_heads": 4},
    )
    save(Sam3Model(config), folder)
    size = {"height": side, "width": side}
    pictures = Sam3ImageProcessor(size=size, mask_size={"height": 4 * grid, "width": 4 * grid})
    Sam3Processor(pictures, tokenizer).save_pretrained(folder)
    return folder


def save_classifier(family: str, folder: Path) -> Path:
    """A checkpoint of CLIP or SigLIP with random weights, its image processor and a tokenizer of letters."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, SiglipConfig, SiglipImageProcessor, SiglipModel

    torch.manual_seed(5)
    tokenizer = clip_tokenizer(folder / "words", 32)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": len(tokenizer), "max_position_embeddings": 32, "projection_dim": 32}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "projection_size": 32}
    text |= {"pad_token_id": tokenizer.pad_token_id}
    vision = sizes | {"image_size": 32, "patch_size": 8, "projection_dim": 32}
    if family == "clip":
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))
        pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    else:
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
        pictures = SiglipImageProcessor(size={"height": 32, "width": 32})
    save(model, folder, noise=0.05)
    pictures.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
