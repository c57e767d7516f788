"""One rank of a batch norm over all; writes what came out."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from piip_scale.tasks.segmentation.rank_norm import RankBatchNorm


def main(folder, rank, num_ranks):
    store = dist.FileStore(str(folder / "store"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    given = torch.load(folder / "given.pt")
    norm = RankBatchNorm(given["maps"].shape[1])
    norm.load_state_dict(given["state"])
    found = []
    for part in given["maps"].chunk(num_ranks)[rank].split(given["per_step"]):
        maps = part.clone().requires_grad_()
        out = norm.train()(maps)
        (out * out.detach().cos()).sum().backward()
        found.append((out.detach(), maps.grad))
    state = {name: value.clone() for name, value in norm.state_dict().items()}
    torch.save({"found": found, "state": state, "weight": norm.weight.grad}, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
