"""Inheriting: a student that starts from its teacher's neck and head (the published runs of FGD and MGD)."""

from __future__ import annotations

from detdistill.errors import UserError
from detdistill.models.base import Model
from detdistill.models.checkpoints.weights import load_weights, some
from detdistill.models.third_party.torchvision import TorchvisionFasterRCNN, TorchvisionOneStage


def inherit(student: Model, teacher: Model) -> str:
    """Copy into the student what the teacher has outside its backbone, parameters and buffers alike.

    A tensor is copied where name and shape agree; rows of classes go by the classes' names, as those of a
    weights file do. The backbone, and whatever has no counterpart, keep what they have.

    Returns:
        A line that says how many tensors of how many are now the teacher's, and which are not.

    Raises:
        UserError: nothing agrees, or the two cannot be compared part by part; the student is then unchanged.
    """
    prefixes = tuple(_backbone(model) for model in (student, teacher))
    # A neck's layers are named by their order, from the finest level on.
    (stride, width), (teacher_stride, teacher_width) = (
        min(model.pyramid_channels.items()) for model in (student, teacher)
    )
    if (stride, width) != (teacher_stride, teacher_width):
        raise UserError(
            f"inherit: the student's finest level has stride {stride} and {width} channels, the teacher's "
            f"stride {teacher_stride} and {teacher_width}: give the student the same, or leave inherit out"
        )
    if _of_torchvision(student) and student.classes != teacher.classes:
        raise UserError(
            "inherit: of torchvision's objects class rows are not chosen by name: give both the same classes "
            "in the same order, or leave inherit out"
        )
    own = [name for name in student.state_dict() if not name.startswith(prefixes)]
    state = {
        name: tensor.detach().cpu()
        for name, tensor in teacher.state_dict().items()
        if not name.startswith(prefixes)
    }
    try:
        report = load_weights(student, state, require=(), classes=teacher.classes, source="the teacher")
    except UserError:
        both = f"{type(student.exported).__name__} and {type(teacher.exported).__name__}"
        raise UserError(
            f"inherit: {both} have no tensor of one name and shape outside their backbones: give the student "
            f"the teacher's family, or leave inherit out"
        ) from None
    copied = set(report.matched)
    rest = [name for name in own if name not in copied]
    lines = [f"inherited from the teacher: {len(own) - len(rest)} of {len(own)} tensors of neck and head"]
    if rest:
        lines.append(f"not {some(rest)}")
    if report.absent_classes:
        lines.append(f"no rows of {some(report.absent_classes)}, which the teacher does not know")
    return "; ".join(lines)


def _backbone(model: Model) -> str:
    """What the names of its backbone's tensors begin with."""
    if _of_torchvision(model):
        backbone = model.exported.backbone
        return "model.backbone.body." if hasattr(backbone, "body") else "model.backbone."
    if not hasattr(model, "backbone"):
        raise UserError(
            f"inherit: a {type(model.exported).__name__} does not say which part of it is the backbone: "
            f"leave inherit out"
        )
    return "backbone."


def _of_torchvision(model: Model) -> bool:
    return isinstance(model, TorchvisionOneStage | TorchvisionFasterRCNN)
