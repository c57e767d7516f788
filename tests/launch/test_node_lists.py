from __future__ import annotations

import pytest

from piip_scale.launch.node_lists import expand_nodes


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("n1", ["n1"]),
        ("n[1-3,07-09]", ["n1", "n2", "n3", "n07", "n08", "n09"]),
        ("n[08-11]", ["n08", "n09", "n10", "n11"]),
        ("gpu-a.b[2],login1,n[1-2]", ["gpu-a.b2", "login1", "n1", "n2"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("n[1-2]-ib", ["n1-ib", "n2-ib"]),
        ("n1,n1,n[1-2]", ["n1", "n2"]),
        ("", []),
        ("(null)", []),
        ("None", []),
        # What reads otherwise stands for itself.
        ("n[1-", ["n[1-"]),
        ("n[a-b]", ["n[a-b]"]),
        ("n[]", ["n[]"]),
        ("n[1-999999999999]", ["n[1-999999999999]"]),
    ],
)
def test_lists_of_nodes(text, nodes):
    assert list(expand_nodes(text)) == nodes
