# mmseg's UPerNet, narrow enough to train from scratch on a laptop.
segmentor = dict(
    kind="upernet",
    overrides=dict(decode_head=dict(channels=32), auxiliary_head=dict(channels=32)),
)
