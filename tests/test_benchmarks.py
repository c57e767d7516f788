import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "engine.py"


def run(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


def test_an_unknown_section_is_told_with_those_there_are():
    result = run("Memori")
    assert result.returncode == 2
    assert "'Memori'" in result.stderr
    assert "Memory" in result.stderr


def test_a_section_replaces_itself_and_leaves_the_others():
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        from sections.record import replaced
    finally:
        sys.path.remove(str(SCRIPT.parent))
    document = "# Title\n\nIntro.\n\n## A\n\nold\n\n### part\n\n## B\n\nkept\n"
    found = replaced(document, "A", "new")
    assert found == "# Title\n\nIntro.\n\n## A\n\nnew\n\n## B\n\nkept\n"
    assert replaced(found, "C", "more") == found + "\n## C\n\nmore\n"
