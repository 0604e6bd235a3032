"""Which text file of a directory belongs to which of its pictures."""

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from torchtitan_flux.data.formats import IMAGE_SUFFIXES, plug_in_for
from torchtitan_flux.data.sources.captions import METADATA_FILES

TEXT_SUFFIXES = (".txt", ".caption")
"""Of texts beside pictures, in any case: the first that says anything counts."""

UNUSED = "text files are not read: they belong to no picture, or to which one is unclear"

_TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".xlsx")


def stem_and_suffix(file: str) -> tuple[str, str]:
    """The suffix in lower case, with its dot."""
    stem, suffix = os.path.splitext(file)
    return stem, suffix.lower()


def is_picture(file: str) -> bool:
    """Whether a file is one by its suffix."""
    return stem_and_suffix(file)[1] in IMAGE_SUFFIXES


def composed(name: str) -> str:
    """The spelling of a name (NFC) that all its spellings have in common: é or e and an accent."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


class Pairs:
    """Texts of the pictures of one directory, all of whose files are given.

    A text belongs to the pictures of its stem, else to the picture whose stem is the same in
    another Unicode spelling, if there is one such text and one such picture.
    """

    def __init__(self, files: Iterable[str]):
        self._pictures: Counter[str] = Counter()  # how many of each stem
        self._texts: dict[str, dict[str, str]] = {suffix: {} for suffix in TEXT_SUFFIXES}
        self._others: list[str] = []
        self._unused: list[str] = []
        for file in sorted(files, reverse=True):  # a.txt counts before a.TXT
            stem, suffix = stem_and_suffix(file)
            if suffix in IMAGE_SUFFIXES:
                self._pictures[stem] += 1
            elif suffix not in TEXT_SUFFIXES:
                self._others.append(file)
            elif self._texts[suffix].setdefault(stem, file) != file:
                self._unused.append(file)
        for texts in self._texts.values():
            self._pair_spellings(texts)

    def _pair_spellings(self, texts: dict[str, str]) -> None:
        alone = {stem: file for stem, file in texts.items() if stem not in self._pictures}
        spellings, pictures = defaultdict(list), defaultdict(list)
        for stem in alone:
            spellings[composed(stem)].append(stem)
        for stem in self._pictures if not all(map(str.isascii, alone)) else ():
            if stem not in texts and composed(stem) in spellings:
                pictures[composed(stem)].append(stem)
        for spelling, stems in pictures.items():
            if len(stems) == len(spellings[spelling]) == 1:
                texts[stems[0]] = alone.pop(spellings[spelling][0])
        self._unused += alone.values()

    def texts(self, picture: str) -> list[str]:
        """The texts of a picture, of each suffix one at most."""
        stem, _ = stem_and_suffix(picture)
        return [texts[stem] for texts in self._texts.values() if stem in texts]

    def shares_text(self, picture: str) -> bool:
        """Whether another picture has the same stem, and therefore the same texts."""
        return self._pictures[stem_and_suffix(picture)[0]] > 1

    def unread(self) -> Iterator[tuple[str, str]]:
        """(what kind of file is not read, file) of those that look meant."""
        explained = set()
        for file in sorted(self._others):
            stem, suffix = stem_and_suffix(file)
            pictured, captioned = stem in self._pictures, bool(self.texts(file))
            package, table = plug_in_for(suffix), suffix in _TABLES
            if file not in METADATA_FILES and (package or table or pictured != captioned):
                hint = f" (`pip install {package}` reads them)" if package else ""
                hint = f" ({' and '.join(METADATA_FILES)} would be)" if table else hint
                yield f"{suffix or 'nameless'} files are not read{hint}", file
                explained.add(stem)
        yield from ((UNUSED, f) for f in self._unused if stem_and_suffix(f)[0] not in explained)
