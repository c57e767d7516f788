"""Quarantine: ops that no recipe here uses and whose speed nobody has measured; they compute what mmcv's do.

They stay because a user's overrides may name heads that want them (soft NMS, PISA, DCN necks). Each logs once, when it
is first called, that it is one of these.
"""
