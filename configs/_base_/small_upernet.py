# mmseg's UPerNet, narrow enough to train from scratch on a laptop.
# Of so few channels, which are never negative, mmseg's first weights of 0.01 all grow towards the commonest class, and two
# of three seeds never found another: they begin at 0.1.
segmentor = dict(
    kind="upernet",
    overrides=dict(
        decode_head=dict(channels=32, init_cfg=dict(type="Normal", std=0.1, override=dict(name="conv_seg"))),
        auxiliary_head=dict(channels=32, init_cfg=dict(type="Normal", std=0.1, override=dict(name="conv_seg"))),
    ),
)
