"""The short form: one student, one teacher, and a call for a training step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from detdistill.distillation.classes import ClassMatch, match_classes
from detdistill.distillation.distiller import Distiller, MethodLike, Trainable, require_apart
from detdistill.distillation.levels import Matching
from detdistill.distillation.teachers import LiveTeacher, Samples
from detdistill.errors import UserError
from detdistill.models.base import Model, Target


class Pair(Trainable):
    """Computes a student's own losses and, in addition, what it should learn from the teacher.

    The teacher is frozen and in evaluation mode, whatever mode the pair is put in. It follows the images from
    device to device, but it is no submodule: no state dict, optimizer, average, export or
    DistributedDataParallel sees it. Methods of weight 0 are not built. Families, input sizes and classes of the
    two may differ; a method refuses what it cannot compare.

    Args:
        student: trained in place; it is also what is exported.
        teacher: a trained model for the same task, or None for plain training.
        methods: names (``"ima"``), ``{name: {weight: …, option: …}}`` as in a recipe, or Method objects.
        seed: of the methods' randomness.

    Example:
        >>> pair = Pair(student, teacher, ["ima"])
        >>> optimizer = torch.optim.SGD(pair.parameters(), lr=0.01)  # student and adapters
        >>> sum(pair(images, targets).values()).backward()
    """

    def __init__(
        self,
        student: Model,
        teacher: Model | None = None,
        methods: MethodLike | Sequence[MethodLike] = (),
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(student, seed=seed)
        self.matching: Matching | None = None
        self.classes: ClassMatch | None = None
        if teacher is None:
            if methods:
                raise UserError("methods need a teacher")
            self.distiller = Distiller([], [self])
            return
        require_apart(student, teacher)
        live = LiveTeacher(teacher)
        self.distiller = Distiller([live], [self])
        self.matching = self.learn_from(live, methods)
        self.classes = match_classes(student.classes, teacher.classes)

    @property
    def teacher(self) -> Model | None:
        return next((teacher.model for teacher in self.distiller.teachers.values()), None)

    @property
    def methods(self) -> nn.ModuleDict:
        """The method of each term, by name."""
        return nn.ModuleDict({name: self._term(name).method for name in self.terms})

    def forward(  # type: ignore[override]  # the short form of Trainable's
        self,
        images: Sequence[Tensor],
        targets: Sequence[Target],
        scale_factor: float = 1.0,
        unlabeled: Sequence[Tensor] = (),
    ) -> dict[str, Tensor]:
        """Every loss term by name, weighted: sum them.

        Args:
            images: (3, H, W) each, uint8 or float in [0, 1].
            targets: for each image ``boxes`` (K, 4) xyxy in pixels and ``labels`` (K,), or, of a segmenter,
                ``semantic`` (H, W).
            scale_factor: factor on the input sizes of both models.
            unlabeled: more images, as above, for the methods that need no labels. Each term is then the
                mean over all images that it has seen.

        Raises:
            UserError: in training, no loss of the student's own has a gradient.
        """
        samples = Samples(images, targets, scale_factor)
        views = self.distiller.observe(samples)
        if not unlabeled:
            return super().forward(samples, views)
        more = Samples(unlabeled, None, scale_factor)
        return super().forward(samples, views, more, self.distiller.observe(more))
