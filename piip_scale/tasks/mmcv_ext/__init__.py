"""A stand-in for ``mmcv._ext``, mmcv's compiled half, from torchvision's kernels and PyTorch.

mmcv-lite lacks only that one module. ``install()`` answers the import of it, unless a compiled one is there.
"""

from piip_scale.tasks.mmcv_ext.install import install, is_stand_in

__all__ = ["install", "is_stand_in"]
