from pathlib import Path

import preloaded
import pytest
from sections.record import replaced

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(("script", "section"), [("engine", "Memory"), ("family", "Golden"), ("data", "Throughput")])
def test_an_unknown_section_is_told_with_those_there_are(script, section):
    result = preloaded.run([FOLDER / f"{script}.py", "Memori"])
    assert result.returncode == 2
    assert "'Memori'" in result.stderr
    assert section in result.stderr


def test_a_section_replaces_itself_and_leaves_the_others():
    document = "# Title\n\nIntro.\n\n## A\n\nold\n\n### part\n\n## B\n\nkept\n"
    found = replaced(document, "A", "new")
    assert found == "# Title\n\nIntro.\n\n## A\n\nnew\n\n## B\n\nkept\n"
    assert replaced(found, "C", "more") == found + "\n## C\n\nmore\n"
