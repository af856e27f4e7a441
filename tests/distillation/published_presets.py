"""What the published configurations say: repository, file, commit and values, for each method and preset.

The values are under our option names, in our reductions: where they were converted, ``how`` says it. What
we set otherwise than published, or what no publication gives, is in ``ours``, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ALL = None  # every level


@dataclass(frozen=True)
class Published:
    """One published setting.

    Attributes:
        repository: on GitHub; None: there is no public code, or none that we know.
        file: in it.
        commit: the last one known that has the file so.
        values: option to published value; "finest" is the number of levels, from the finest.
        ours: option to (our value, why it is another).
        how: how published numbers became these values.
    """

    repository: str | None
    file: str | None
    commit: str | None
    values: dict[str, Any]
    ours: dict[str, tuple[Any, str]] = field(default_factory=dict)
    how: str = ""


MASKD = "mmrazor/configs/distill/maskd"
MASKD_STEPS = "a step, over the 175920 of 24 epochs of COCO in batches of 16"
CROSSKD = "configs/crosskd/crosskd_r50_"
FGD = "configs/distillers/fgd/fgd_"
MGD = "configs/distillers/mgd/"
PKD = "configs/distill/mmdet/pkd/pkd_fpn_"
CIRKD_SCRIPTS = "train_scripts/train_kd"
CIRKD_COMMIT = "05a275379d24df7d522463e0c3613b017fbc1a40"
OLDER_CIRKD = "60f4425523b69852d77780b67c7c179251cf73d2"
FKD_COPIES = "copies of the authors' code in circulation: their own repository holds none"
FRS_FILE = "mmdet/models/detectors/distill_frs_single.py, and configurations of its type"
UNIT = {"unit": (True, "raw maps of a large teacher let it diverge (docs/methods.md)")}


def _maskd(file: str, commit: str, alpha: float, step: int) -> Published:
    return Published(
        "hunto/MasKD", f"{MASKD}/{file}.py", commit,
        {
            "alpha": alpha, "tokens": 6, "token_shares": True, "student_masks_from": step / 175_920,
            "finest": ALL, "adapt": "always",
        },
        {"token_fraction": (0.2, "there tokens learn before, for 2000 steps, in a program of their own")},
        how=MASKD_STEPS,
    )  # fmt: skip


def _fgd(file: str, commit: str, values: tuple[float, ...], levels: int | None = ALL) -> Published:
    names = ("foreground_weight", "background_weight", "attention_weight", "relation_weight", "tau")
    return Published(
        "yzd-v/FGD", f"{FGD}{file}_coco.py", commit,
        dict(zip(names, values, strict=True)) | {"finest": levels}, UNIT,
    )  # fmt: skip


def _mgd(file: str, alpha: float, ratio: float, levels: int | None, commit: str | None = None) -> Published:
    return Published(
        "yzd-v/MGD", f"det/{MGD}{file}.py", commit or "046aba2dc2b067bc3e75ceb8f5e006e922937232",
        {"alpha": alpha, "mask_ratio": ratio, "finest": levels}, UNIT,
    )  # fmt: skip


def _pkd(file: str, commit: str, alpha: float) -> Published:
    return Published("open-mmlab/mmrazor", f"{PKD}{file}.py", commit, {"alpha": alpha, "finest": 4})


def _fkd(factor: float, tau: float, channel_mask: bool) -> Published:
    return Published(
        None, FKD_COPIES, None,
        {
            "feature_weight": 7e-5 * factor, "pooled_weight": 4e-3 * factor, "relation_weight": 7e-5 * factor,
            "tau": tau, "channel_mask": channel_mask, "finest": ALL, "adapt": "always",
        },
    )  # fmt: skip


def _frs(feature: float, cls: float) -> Published:
    return Published(
        "WayneMao/mmdetection", FRS_FILE, "7fa8ad1e8e5f2753b56ee860896851c4c7e0f0cd",
        {"feature_weight": feature, "cls_weight": cls, "adapt": "always"},
    )  # fmt: skip


PUBLISHED: dict[tuple[str, str | None], Published] = {
    ("adversarial", "segmentation"): Published(
        "irfanICMLL/structure_knowledge_distillation", "run_train_val.sh",
        "5cb4e49344892b42952373a75a7a732c8b04e680",
        {"alpha": 0.1, "discriminator_weight": 0.1 * 4e-4 / 1e-2, "kind": "wgan-gp", "gradient_penalty": 10.0},
        how="a weight of 0.1, times the discriminator's rate of 4e-4 over the student's of 1e-2",
    ),
    ("adversarial", "cirkd"): Published(
        "winycg/CIRKD", f"{CIRKD_SCRIPTS}/train_ifvd.sh", CIRKD_COMMIT,
        {"alpha": 0.001, "discriminator_weight": 0.1, "kind": "hinge"},
    ),
    ("at", None): Published(
        "winycg/CIRKD", f"{CIRKD_SCRIPTS}/train_at.sh", CIRKD_COMMIT, {"alpha": 10000.0}
    ),
    ("cirkd", None): Published(
        "winycg/CIRKD", "train_cirkd.py", CIRKD_COMMIT,
        {
            "batch_weight": 1.0, "pixel_weight": 0.1, "region_weight": 0.1, "temperature": 0.1,
            "pixel_places": 20000, "region_places": 2000, "pixel_contrasts": 4096, "region_contrasts": 1024,
        },
        {"cells": (2048, "bounds memory"), "anchors": (4096, "bounds memory")},
    ),
    ("cofd", None): Published(
        "clovaai/overhaul-distillation", "ImageNet/train_with_distillation.py",
        "93bbcd2bf2bf07a50e57291e0fb8fc62b127bfe8", {"alpha": 1 / 10000, "adapt": "always"},
    ),
    ("cofd", "cifar"): Published(
        "clovaai/overhaul-distillation", "CIFAR-100/train_with_distillation.py",
        "93bbcd2bf2bf07a50e57291e0fb8fc62b127bfe8", {"alpha": 1 / 1000, "adapt": "always"},
    ),
    ("cofd", "segmentation"): Published(
        "clovaai/overhaul-distillation", "Segmentation/distiller.py",
        "5f0b177fa7e17221a6c7eda6523bbdb5e9385527", {"alpha": 1e-5 / 16, "adapt": "always"},
        how="1e-5 over 16, the divider of the map before the classifier; the five other maps are left out",
    ),
    ("crosskd", "anchor"): Published(
        "jbwang1997/CrossKD", f"{CROSSKD}retinanet_r101_fpn_2x_coco.py",
        "4faccfd6228b08d552163076329524faece95a8c",
        {"cls_weight": 1.0, "box_weight": 1.0, "beta": 1.0, "box_loss": "giou", "normalize": "positives"},
    ),
    ("crosskd", "anchor_free"): Published(
        "jbwang1997/CrossKD", f"{CROSSKD}fcos_r101-2x-ms_caffe_fpn_gn-head_2x_ms_coco.py",
        "4faccfd6228b08d552163076329524faece95a8c",
        {"cls_weight": 0.4, "box_weight": 0.75, "beta": 1.0, "box_loss": "iou", "normalize": "centerness"},
    ),
    ("crosskd", "gfl"): Published(
        "jbwang1997/CrossKD", f"{CROSSKD}gflv1_r101-2x-ms_fpn_1x_coco.py",
        "b0c5a76092ac42be37099651b067227615de0b28",
        {"cls_weight": 1.0, "box_weight": 4.0, "beta": 1.0, "temperature": 1.0, "normalize": "positives"},
        how="at the later commit 9f695b4e the weight is 3, beside a GIoU of weight 2, which is not taken over",
    ),
    ("cwd", None): Published(
        "open-mmlab/mmrazor", "configs/distill/mmdet/cwd/cwd_fpn_frcnn_r101_frcnn_r50_1x_coco.py",
        "5bf1eca4e493803f2af1ed5a9c2f151bb09965e1", {"alpha": 10.0, "tau": 1.0, "finest": ALL},
    ),
    ("cwd", "retinanet_x101"): Published(
        "pppppM/mmdetection-distiller",
        "configs/distillers/cwd/cwd_retina_rx101_64x4d_distill_retina_r50_fpn_2x_coco.py",
        "4cf3894cf4aec4cac09e7a7840840d92e22fb4e4", {"alpha": 5.0, "tau": 1.0, "finest": 4},
    ),
    ("cwd", "segmentation"): Published(
        "winycg/CIRKD", f"{CIRKD_SCRIPTS}/train_cwd.sh", CIRKD_COMMIT,
        {"alpha": 50.0, "logits_alpha": 3.0, "tau": 4.0},
    ),
    ("defeat", None): Published(
        "ggjy/DeFeat.pytorch", "configs/kd_faster_rcnn/voc_stu_faster_rcnn_r50_decouple_neck.py",
        "a4bdd9ec68441e81b3172bc6bb1cdeb16f776d60",
        {
            "object_weight": 3.0, "background_weight": 12.0, "head_object_weight": 0.0,
            "head_background_weight": 0.0, "finest": ALL, "adapt": "always",
        },
    ),
    ("defeat", "head"): Published(
        "ggjy/DeFeat.pytorch", "configs/kd_faster_rcnn/voc_stu_faster_rcnn_r50_decouple_neck.py",
        "a4bdd9ec68441e81b3172bc6bb1cdeb16f776d60",
        {
            "object_weight": 3.0, "background_weight": 12.0, "head_object_weight": 2.0,
            "head_background_weight": 2.0, "finest": ALL,
        },
        how="the configuration holds the head's weights, and does not ask for its term",
    ),
    ("dist", "anchor"): Published(
        "hunto/MasKD", "mmrazor/configs/distill/dist/dist_retinanet_x101-retinanet-r50_coco.py",
        "72f7a48e4774d0893f2486a64dab5b60dc45b770",
        {"inter_weight": 1.0, "intra_weight": 1.0, "temperature": 1.0, "scores": "sigmoid"},
    ),
    ("dist", "two_stage"): Published(
        "hunto/MasKD", "mmrazor/configs/distill/dist/dist_cascade_mask_rcnn_x101-fpn_x50_coco.py",
        "72f7a48e4774d0893f2486a64dab5b60dc45b770",
        {"inter_weight": 1.0, "intra_weight": 1.0, "temperature": 1.0, "scores": "softmax"},
    ),
    ("dist", "anchor_free"): Published(
        None, None, None, {},
        {"scores": ("sigmoid", "RetinaNet's; there is no published configuration")},
    ),
    ("dist", "segmentation"): Published(
        "hunto/DIST_KD", "segmentation/losses/dist_kd.py", "6d93ca01e2cd78e011730dcaf63d9bfa3e187fa3",
        {"inter_weight": 1.0, "intra_weight": 1.0, "temperature": 1.0, "scores": "softmax"},
    ),
    ("fgd", "anchor"): _fgd(
        "gfl_r101_distill_gfl_r50_fpn_1x", "39f521af2f64034583053db7b3963cf32d70e306",
        (1e-3, 5e-4, 5e-4, 5e-6, 0.5),
    ),
    ("fgd", "anchor_free"): _fgd(
        "fcos_r101_distill_fcos_r50_2x", "04900add42feb796392807eed7024ec895b32f28",
        (1.6e-3, 8e-4, 8e-4, 8e-6, 0.8),
    ),
    ("fgd", "two_stage"): _fgd(
        "faster_rcnn_r101_fpn_2x_distill_faster_rcnn_r50_fpn_2x", "04900add42feb796392807eed7024ec895b32f28",
        (5e-5, 2.5e-5, 5e-5, 5e-7, 0.5), levels=4,
    ),
    ("fgd", "reppoints"): _fgd(
        "reppoints_rx101_64x4d_distill_reppoints_r50_fpn_2x", "04900add42feb796392807eed7024ec895b32f28",
        (1.6e-3, 8e-4, 8e-4, 8e-6, 0.5),
    ),
    ("fgd", "yolox"): _fgd(
        "yoloxl_distill_yoloxm", "0c1ca6e333420aacb78cbe87249fe1c5ace42cee", (2e-3, 1e-3, 1e-3, 1e-5, 0.5)
    ),
    ("fgfi", None): Published(
        "twangnh/Distilling-Object-Detectors", "trainval_net_sup.py",
        "981eb8c7b6c42ca4b44783a75d9113b960d11f75", {"alpha": 0.01, "psi": 0.5, "adapt": "always"},
    ),
    ("fkd", "anchor"): _fkd(6, 0.1, channel_mask=True),
    ("fkd", "anchor_free"): _fkd(6, 0.1, channel_mask=True),
    ("fkd", "two_stage"): _fkd(1, 0.5, channel_mask=False),
    ("fkd", "mean"): Published(
        None, None, None, {},
        dict.fromkeys(("feature_weight", "pooled_weight", "relation_weight"), (1.0, "ours, for a mean"))
        | {"reduction": ("mean", "ours"), "tau": (0.5, "ours")},
    ),
    ("frs", "anchor"): _frs(0.005, 0.02),
    ("frs", "anchor_free"): _frs(0.01, 0.05),
    ("frs", "two_stage"): _frs(0.002, 0.1),
    ("frs", "gfl"): _frs(0.1, 0.05),
    ("gid", "anchor"): Published(
        "daixinghome/Distill_GID_detectron2", "GID/config/Distill_RetinaNet_T_Res101_S_Res50_2x.yaml",
        "5dfc0d5725c389c1f098a9f10ce072aa7c09bc0c",
        {
            "feature_weight": 0.0005, "relation_weight": 40.0, "cls_weight": 0.1, "box_weight": 1.0,
            "box_beta": 0.0, "instances": 10, "finest": ALL,
        },
    ),
    ("gid", "anchor_free"): Published(None, None, None, {}, {}, how="RetinaNet's: there is no other"),
    ("ifvd", "segmentation"): Published(
        "YukangWang/IFVD", "options.py", "950a7a5fd8686ceed87a6976c49143462fcb823a", {"alpha": 200.0}
    ),
    ("ifvd", "cirkd"): Published(
        "winycg/CIRKD", f"{CIRKD_SCRIPTS}/train_ifvd.sh", CIRKD_COMMIT, {"alpha": 20.0}
    ),
    ("ld", "anchor"): Published(
        "HikariTJU/LD", "configs/ld/ld_r50_gflv1_r101_fpn_coco_1x.py",
        "258b2a199b33091bf3e33ef2c7dd2cf1d807b185",
        {
            "main_weight": 0.25, "vlr_weight": 0.25, "kd_weight": 10.0, "temperature": 10.0,
            "kd_temperature": 2.0, "topk": 9, "region": "vlr",
        },
    ),
    ("ld", "anchor_free"): Published(
        "HikariTJU/LD", "configs/ld/ld_r50_fcos_r101_1x.py", "67020e66a559715a16c2efac07fa28a35ba36776",
        {
            "main_weight": 0.25, "vlr_weight": 0.25, "kd_weight": 10.0, "temperature": 10.0,
            "kd_temperature": 2.0, "region": "inside",
        },
    ),
    ("maskd", "anchor"): _maskd(
        "retinanet_r101-retinanet_r50_coco", "d443efadc92c4e48a2729ef9d2cb957126be2126", 7.0, 7000
    ),
    ("maskd", "retinanet_x101"): _maskd(
        "retinanet_x101-retinanet_r50_coco", "f120bdfe5dc6ec7e4412192fcfbc869ed546cebe", 7.0, 8500
    ),
    ("maskd", "anchor_free"): _maskd(
        "fcos_r101-fcos_r50_coco", "2597d43b41a93f7d7fc344c45c8f141a46ee21b7", 10.0, 5000
    ),
    ("maskd", "two_stage"): _maskd(
        "fpn_r101-fpn_r50_coco", "f120bdfe5dc6ec7e4412192fcfbc869ed546cebe", 1.0, 7330
    ),
    ("maskd", "segmentation"): Published(
        "hunto/MasKD", "segmentation/losses/maskd.py", "49de3aeb485bad35139aa4015b6a1e8a8a35ef27",
        {"alpha": 0.5, "tokens": 8, "token_shares": False, "student_masks_from": 1.0},
        {"token_fraction": (0.2, "there tokens learn before, in a program of their own")},
    ),
    ("mgd", "anchor"): _mgd("retina_rx101_64x4d_distill_retina_r50_fpn_2x_coco", 2e-5, 0.65, ALL),
    ("mgd", "anchor_free"): _mgd("reppoints_rx101_64x4d_distill_reppoints_r50_fpn_2x_coco", 2e-5, 0.65, ALL),
    ("mgd", "two_stage"): _mgd(
        "cascade_mask_rcnn_rx101_32x4d_distill_faster_rcnn_r50_fpn_2x_coco", 5e-7, 0.45, 4
    ),
    ("mgd", "segmentation"): Published(
        "yzd-v/MGD", f"seg/{MGD}psp_r101_distill_psp_r18_40k_512x512_city.py",
        "046aba2dc2b067bc3e75ceb8f5e006e922937232", {"alpha": 2e-5, "mask_ratio": 0.75}, UNIT,
    ),
    ("pkd", "anchor"): _pkd(
        "retina_x101_retina_r50_2x_coco", "2ce36c43c81ec7daede2013f169d24d96385dbee", 10.0
    ),
    ("pkd", "anchor_free"): _pkd(
        "reppoints_x101-dcn_reppoints_r50_2x_coco", "5ae956589a5f637bc79cb234fbe7dad2afbaa3ed", 10.0
    ),
    ("pkd", "two_stage"): _pkd(
        "faster-rcnn_r101_faster-rcnn_r50_2x_coco", "5ae956589a5f637bc79cb234fbe7dad2afbaa3ed", 6.0
    ),
    **{
        ("scalekd", kind): Published(
            None, "the paper (CVPR 2023); there is no public code", None,
            dict(zip(("feature_weight", "cls_weight", "box_weight"), weights, strict=True)),
        )
        for kind, weights in (
            ("anchor", (0.01, 0.2, 0.05)), ("anchor_free", (0.01, 0.2, 0.05)), ("two_stage", (0.07, 0.5, 0.2)),
        )
    },
    ("skd", None): Published(
        None, "second-hand: 2 or 4; there is no public code", None, {}, {"alpha": (4.0, "the larger one")}
    ),
    ("skds", "segmentation"): Published(
        "irfanICMLL/structure_knowledge_distillation", "run_train_val.sh",
        "5cb4e49344892b42952373a75a7a732c8b04e680", {"pixel_weight": 10.0 * 8, "pair_weight": 0.5, "grid": 2},
        how="a sum over a batch of 8 images is 8 times a mean",
    ),
    ("skds", "cirkd"): Published(
        "winycg/CIRKD", f"{CIRKD_SCRIPTS}/train_skd.sh", OLDER_CIRKD,
        {"pixel_weight": 1.0, "pair_weight": 10.0, "grid": 0, "pool": 2},
    ),
    **{
        ("kd", kind): Published(
            None, None, None, {}, {"box_weight": (weight, "ours: detectors have no single source")}
        )
        for kind, weight in (("anchor", 1.0), ("anchor_free", 0.25), ("two_stage", 1.0), ("gfl", 0.25))
    },
    ("mimic", None): Published(None, None, None, {}, {"alpha": (1.0, "ours")}),
}  # fmt: skip
"""IMA has no public code: docs/ima.md says where its presets come from."""
