"""The head of the released DINO detectors, which differs from mmdet 3.3's by a constant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from piip_scale.tasks.detection.few_waits_dino import FewWaitsDINOHead
from piip_scale.tasks.mmlab import MODELS, inverse_sigmoid


@MODELS.register_module()
class ReferenceEpsDINOHead(FewWaitsDINOHead):  # type: ignore[misc]  # mmdet has no types
    """mmdet's DINO head with a bound of one's own on the references of its boxes.

    A box is predicted as a difference from its reference in logits, which near the image's border, and for sides that
    are next to nothing, are cut off at that bound: 1e-3 in the code that released DINO detectors were trained with, as
    in DINO's own, and 1e-5 in mmdet 3.3. With another bound such boxes come out somewhere else.

    Args:
        reference_eps: The bound, as a share of the image's side.
        arguments: mmdet's.
    """

    def __init__(self, *arguments: Any, reference_eps: float = 1e-3, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.reference_eps = reference_eps

    def forward(self, hidden_states: Tensor, references: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Scores and boxes of every decoder layer.

        Args:
            hidden_states: (layers, B, queries, C).
            references: The boxes (B, queries, 4) that each layer starts from, as shares of the image; one layer more.

        Returns:
            Logits (layers, B, queries, classes), and boxes (layers, B, queries, 4) as centres and sides, 0 to 1.
        """
        scores = [branch(states) for branch, states in zip(self.cls_branches, hidden_states, strict=False)]
        boxes = [
            (branch(states) + inverse_sigmoid(reference, eps=self.reference_eps)).sigmoid()
            # The last branch of each list is that of the encoder's proposals.
            for branch, states, reference in zip(self.reg_branches, hidden_states, references, strict=False)
        ]
        return torch.stack(scores), torch.stack(boxes)
