# As dinov3_7b_ct, and the ViT-7B is trained by low-rank additions alone, which begin anew.
_base_ = ["dinov3_7b_ct.py"]
model = dict(branches=dict(giant=dict(lora=dict(rank=16, targets=("qkv", "proj")))))
