"""A small task with the shape of the real one: two branches, an interaction, drop path, a head that looks at boxes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from piip_scale.config.run import RunConfig
from piip_scale.data.batch import DetectionBatch, ImageInfo, Instances
from piip_scale.models.saved_activations import HeadBytes
from piip_scale.models.unit import Unit
from piip_scale.tasks.base import Detections, Outline, ParameterRule

SIDE_PX = 16
PATCH_PX = 4


class Block(Unit):
    def __init__(self, dim: int, drop: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.drop = drop

    def draw(self, x: Tensor) -> tuple[Tensor | None, ...]:
        if not (self.training and self.drop):
            return (None,)
        return ((torch.rand(x.shape[0], 1, 1, device=x.device) >= self.drop).to(x.dtype),)

    def compute(self, drawn: tuple[Tensor | None, ...], x: Tensor) -> Tensor:
        branch = self.down(F.gelu(self.up(self.norm(x))))
        if drawn[0] is not None:
            branch = branch * drawn[0] / (1 - self.drop)
        return x + branch


class Branch(nn.Module):
    def __init__(self, dim: int, depth: int, drop: float) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * PATCH_PX**2, dim)
        self.blocks = nn.ModuleList(Block(dim, drop) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.to(self.embed.weight.dtype))
        for block in self.blocks:
            x = block(x)
        return x


class Head(nn.Module):
    """Runs its second stage only where there are boxes, as detectors do; float32 whatever the weights are in."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.score, self.refine = nn.Linear(dim, 1), nn.Linear(dim, 4)

    def forward(self, features: Tensor, instances: tuple[Instances, ...]) -> tuple[Tensor, Tensor, Tensor]:
        features = features.float()
        score = F.linear(features, self.score.weight.float(), self.score.bias.float())
        loss_box = features.sum() * 0.0
        for tokens, objects in zip(features, instances, strict=True):
            if len(objects.labels):
                refined = F.linear(tokens, self.refine.weight.float(), self.refine.bias.float()).mean(0)
                loss_box = loss_box + (refined - objects.boxes_xyxy_px / SIDE_PX).square().mean() / len(instances)
        return score.square().mean(), loss_box, score.mean()


class TinyModel(nn.Module):
    def __init__(self, dim: int = 32, depth: int = 2, drop: float = 0.2) -> None:
        super().__init__()
        self.large, self.small = Branch(dim, depth, drop), Branch(dim // 4, depth, drop)
        self.join = nn.Linear(dim // 4, dim)
        self.head = Head(dim)
        self.num_depth = depth

    def forward(self, batch: DetectionBatch) -> dict[str, Tensor]:
        losses = self.head(self.features(batch), batch.instances)
        return dict(zip(("loss_score", "loss_box", "mean_score"), losses, strict=True))

    def features(self, batch: DetectionBatch) -> Tensor:
        x = batch.images_BHWC.float().div(255).permute(0, 3, 1, 2)
        tokens = F.unfold(x, PATCH_PX, stride=PATCH_PX).transpose(1, 2)
        return self.large(tokens) + self.join(self.small(tokens))

    def predict(self, batch: DetectionBatch) -> list[Detections]:
        score = self.head(self.features(batch), batch.instances)[2].reshape(1)
        empty = torch.zeros(1, dtype=torch.int64)
        return [Detections(info.image_id, torch.zeros(1, 4), score, empty) for info in batch.infos]

    def heads_module(self) -> nn.Module:
        return self.head

    def parts(self) -> dict[str, nn.Module]:
        return {"large": self.large, "small": self.small, "join": self.join, "head": self.head}

    def parameter_rules(self) -> dict[str, ParameterRule]:
        def layer(name: str) -> float:
            if ".blocks." in name:
                return int(name.split(".blocks.")[1].split(".")[0]) + 1.0
            return 0.0 if ".embed." in name else self.num_depth + 1.0

        return {
            name: ParameterRule(layer(name), p.ndim > 1, fresh=layer(name) > self.num_depth)
            for name, p in self.named_parameters()
        }

    @property
    def num_layers(self) -> int:
        return self.num_depth

    def set_precision(self, dtype: torch.dtype) -> None:
        self.to(dtype)


def make_batch(key: int, size: int, *, boxes: bool = True) -> DetectionBatch:
    generator = torch.Generator().manual_seed(key)
    images = torch.randint(0, 256, (size, SIDE_PX, SIDE_PX, 3), dtype=torch.uint8, generator=generator)
    infos = tuple(
        ImageInfo(f"{key}_{i}", key * size + i, (SIDE_PX, SIDE_PX), (SIDE_PX, SIDE_PX), (1.0, 1.0)) for i in range(size)
    )
    count = 3 if boxes else 0
    objects = tuple(
        Instances(
            torch.rand(count, 4, generator=generator) * SIDE_PX,
            torch.zeros(count, dtype=torch.int64),
            torch.zeros(count, dtype=torch.bool),
        )
        for _ in range(size)
    )
    return DetectionBatch(images, infos, objects)


class MeanScore:
    def __init__(self) -> None:
        self.total = torch.zeros(2)

    def update(self, batch: DetectionBatch, detections: list[Detections]) -> None:
        self.total += torch.tensor([sum(float(d.scores.sum()) for d in detections), len(detections)])

    def compute(self) -> dict[str, float]:
        torch.distributed.all_reduce(self.total)
        return {"mean_score": float(self.total[0] / self.total[1])}

    def pr_curves(self) -> dict:
        return {}


class NothingWatched:
    def keep(self, predictions) -> None:
        pass

    def pictures(self) -> dict[str, bytes]:
        return {}


class TinyTask:
    """Global micro-batch m is the same for any number of ranks: rank r takes its r-th share.

    Args:
        batches: Micro-batches of an epoch.
        boxless: (rank, micro-batch) pairs without boxes.
        dim: Width of the large branch.
        drop: Drop path.
    """

    def __init__(self, config: RunConfig, world, *, batches=6, boxless=(), dim=32, depth=2, drop=0.2) -> None:
        self.config, self.world, self.batches, self.boxless = config, world, batches, set(boxless)
        self.dim, self.depth, self.drop = dim, depth, drop

    def build_model(self) -> nn.Module:
        return TinyModel(self.dim, self.depth, self.drop)

    def train_batches(self, epoch: int, first_step: int):
        for micro in range(first_step, self.batches):
            key = (epoch * self.batches + micro) * self.world.num_ranks + self.world.rank
            boxes = (self.world.rank, micro) not in self.boxless
            yield make_batch(key, self.config.data.micro_batch_size, boxes=boxes)

    def train_keys(self, epoch: int, micro_steps) -> list[list[str]]:
        firsts = [(epoch * self.batches + micro) * self.world.num_ranks + self.world.rank for micro in micro_steps]
        return [[f"{first}_{i}" for i in range(self.config.data.micro_batch_size)] for first in firsts]

    def num_train_batches(self) -> int:
        return self.batches

    def data_id(self) -> str:
        return "made"

    def num_broken_samples(self) -> int:
        return 0

    def val_batches(self):
        for micro in range(4 // self.world.num_ranks):
            yield make_batch(10_000 + micro * self.world.num_ranks + self.world.rank, 2)

    def build_metric(self) -> MeanScore:
        return MeanScore()

    def watched(self) -> NothingWatched:
        return NothingWatched()

    def network_flops(self, height_px: int, width_px: int) -> int:
        return height_px * width_px

    def outline(self, config: RunConfig, device_type: str = "cuda") -> Outline:
        with torch.device("meta"):
            model = TinyModel(self.dim, self.depth, self.drop).train()
            tokens = torch.empty(config.data.micro_batch_size, (SIDE_PX // PATCH_PX) ** 2, 3 * PATCH_PX**2)
        return Outline(model, model, model.parts(), "head", lambda: (model.large(tokens),), lambda _: HeadBytes(0, 0))
