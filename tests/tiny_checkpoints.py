"""Checkpoints of the families at toy size: from their own configurations, with random weights, in their own format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

LABELS = {0: "car", 1: "bus", 2: "traffic light"}


def save_detector(family: str, folder: Path) -> Path:
    """A transformers object-detection checkpoint with its image processor: rt_detr_v2, d_fine or rf_detr."""
    from transformers import RfDetrImageProcessor, RTDetrImageProcessor

    model = {"rt_detr_v2": _rt_detr_v2, "d_fine": _d_fine, "rf_detr": _rf_detr}[family]()
    save(model, folder)
    side = {"height": 64, "width": 64}
    processor = RfDetrImageProcessor(size=side) if family == "rf_detr" else RTDetrImageProcessor(size=side)
    processor.save_pretrained(folder)
    return folder


def save(model: Any, folder: Path) -> None:
    """Save a model whose weights are random everywhere: some heads begin as zeros, and answer alike to all images."""
    generator = torch.Generator().manual_seed(5)
    for weights in model.parameters():
        weights.data += 0.1 * torch.randn(weights.shape, generator=generator)
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
