"""Names of any script are drawn in letters or spelled out, never as squares."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ImageFont

from piip_scale.tasks import lettering as module
from piip_scale.tasks.base import Detections
from piip_scale.tasks.drawing import contact_sheet, draw_detections, draw_label_map, draw_names
from piip_scale.tasks.lettering import lettering, own_font

GREY = np.full((60, 80, 3), 90, np.uint8)
NAMES = ["\u732b", "\ud55c\uad6d", "\u043a\u043e\u0442", "[wild]", "two\nlines", "half \udc80", "caf\u00e9", ""]


def squares(found):
    """Letters of a text that its font draws as it draws what it has not."""
    missing = found.font.getmask("\U0010ffff")
    same = [letter for letter in found.text if bytes(found.font.getmask(letter)) == bytes(missing)]
    return [letter for letter in same if not letter.isspace()]


@pytest.mark.parametrize("name", NAMES)
def test_no_letter_is_a_square(name):
    found = lettering(name, 15)
    assert squares(found) == []
    assert "\n" not in found.text
    found.text.encode()


def test_a_machine_without_fonts_spells_names_out(monkeypatch):
    monkeypatch.setattr(module, "_installed", tuple)
    found = lettering("\u732b 0.93", 15)
    assert (found.text, found.font) == ("\\u732b 0.93", own_font(15))
    assert lettering("caf\u00e9 \uff11", 15).text == "cafe 1"


def test_a_font_that_has_the_letters_is_taken(monkeypatch, tmp_path):
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    fonts = [path for path in module._installed() if "DejaVuSans" in path.name]
    if not fonts:
        pytest.skip("DejaVu is not installed")
    monkeypatch.setattr(module, "_installed", lambda: (tmp_path / "broken.ttf", fonts[0]))
    found = lettering("\u043a\u043e\u0442", 15)
    assert found.text == "\u043a\u043e\u0442"
    assert isinstance(found.font, ImageFont.FreeTypeFont)
    assert found.font.path == str(fonts[0])


def test_a_font_of_last_resort_has_no_letters(monkeypatch):
    folder = Path(pytest.importorskip("matplotlib").get_data_path(), "fonts/ttf")
    fonts = sorted(folder.glob("LastResort*.ttf"))
    if not fonts:
        pytest.skip("this matplotlib brings no font of last resort")
    monkeypatch.setattr(module, "_installed", lambda: tuple(fonts))
    assert lettering("\u732b", 15).text == "\\u732b"


def test_a_letter_that_a_font_cannot_place_is_spelled_out(monkeypatch):
    own = own_font(15)

    class Stubborn:
        def getmask(self, letter):
            if letter == "\ufe0f":
                raise ValueError("raqm_get_glyphs() failed.")
            return own.getmask(letter)

    assert not module._has(Stubborn(), "a\ufe0f")
    assert module._has(Stubborn(), "ab")
    assert all(lettering(name, 15).text for name in ("\u2764\ufe0f", "\ufe0f", "\U0001f468\u200d\U0001f469"))


@pytest.mark.parametrize("name", NAMES)
def test_every_drawing_takes_any_name(name):
    found = Detections(1, torch.tensor([[5.0, 5, 40, 40]]), torch.ones(1), torch.zeros(1).long())
    pictures = [
        draw_detections(GREY, found, [name]),
        draw_names(GREY, [(0, name)]),
        draw_label_map(GREY, np.zeros((60, 80), np.uint8), [name]),
    ]
    assert contact_sheet(pictures, f"{name}, {name}").width > 0
