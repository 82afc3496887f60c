"""The cleaning of the demo model's training text, on small pieces of each source's format."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.demo import fetch_text

LONG = "She walked to the village and back again. " * 40


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("\u201cIt\u2019s  late,\u201d\nsaid he", '"It\'s late," said he'),
        ("between _them_ it was -- well -- over", "between them it was\u2014well\u2014over"),
        ("wait . . . there", "wait... there"),
        ("hookey [* Southwestern for afternoon] today *", "hookey today"),
        ("God  , said", "God, said"),
    ],
)
def test_clean_paragraph(text: str, clean: str) -> None:
    assert fetch_text.clean_paragraph(text) == clean


@given(st.text())
def test_a_clean_paragraph_is_one_line_without_doubled_spaces(text: str) -> None:
    clean = fetch_text.clean_paragraph(text)
    assert clean == clean.strip()
    assert "\n" not in clean
    assert "  " not in clean


def test_strip_gutenberg() -> None:
    book = (
        "\ufeffLicence\n*** START OF THIS PROJECT GUTENBERG EBOOK X ***\nThe tale.\nEnd of the Project Gutenberg EBook"
    )
    assert fetch_text.strip_gutenberg(book) == "The tale."


def test_chapters_split_at_headings_and_drop_what_is_no_prose() -> None:
    text = (
        f"A TITLE\n\nby me\n\nCHAPTER I\n\nTHE MOUSE\n\n{LONG}\nlast line\n\nSecond.\n\nChapter 2\n\n{LONG}\n\nFINIS\n"
    )
    first, second = fetch_text.chapters(text)
    assert first == f"{LONG.strip()} last line\nSecond."
    assert second == LONG.strip()


def character_vector(lines: list[str]) -> bytes:
    """R's XDR serialization, version 3, of a character vector (R Internals, 1.8)."""
    data = b"X\n" + struct.pack(">IIII", 3, 0x040201, 0x030500, 5) + b"UTF-8" + struct.pack(">II", 16, len(lines))
    for line in lines:
        data += struct.pack(">Ii", 0x00040009, len(line.encode())) + line.encode()
    return data


def record(data: bytes) -> bytes:
    """``data`` as one record of a lazy-load database."""
    return struct.pack(">I", len(data)) + zlib.compress(data)


@given(st.lists(st.lists(st.text(st.characters(codec="utf-8")), max_size=5), max_size=4))
def test_r_character_vectors(vectors: list[list[str]]) -> None:
    data = b"".join(record(character_vector(lines)) for lines in vectors)
    assert fetch_text.r_character_vectors(data) == vectors


def test_r_numbers_are_refused() -> None:
    numbers = b"X\n" + struct.pack(">IIII", 3, 0x040201, 0x030500, 5) + b"UTF-8" + struct.pack(">II", 14, 0)
    with pytest.raises(ValueError, match="type 14"):
        fetch_text.r_character_vectors(record(numbers))


def test_bible_chapters_in_prose_are_kept(tmp_path: Path) -> None:
    prose = f'<w lemma="x">He</w><note>1:1 <reference>r</reference>or she</note> went.<div sID="g" type="x-p"/>{LONG}'
    verse = f"<l>{LONG}</l>"
    text = "intro" + "".join(f'<chapter n="1" sID="a"/>{part}<chapter eID="a"/>' for part in (prose, verse))
    half = len(text) // 2
    blocks = [zlib.compress(part.encode()) for part in (text[:half], text[half:])]
    (tmp_path / "ot.bzz").write_bytes(b"".join(blocks))
    index = [(0, len(blocks[0]), half), (0, 0, 0), (len(blocks[0]), len(blocks[1]), len(text) - half)]
    (tmp_path / "ot.bzs").write_bytes(b"".join(struct.pack("<III", *entry) for entry in index))
    assert fetch_text.sword_text(tmp_path, "ot") == text
    assert fetch_text.osis_chapters(text) == [f"He went.\n{LONG.strip()}"]
