# mmseg's own UPerNet at the width of the released models; scores are averaged over overlapping windows.
task = "segmentation"
segmentor = dict(
    kind="upernet",
    overrides=dict(decode_head=dict(channels=1536), auxiliary_head=dict(channels=1536)),
    inference=dict(mode="slide", crop_px=(512, 512), stride_px=(341, 341)),
)
