"""Which text file of a directory belongs to which of its pictures."""

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from torchtitan_flux.data.formats import IMAGE_SUFFIXES, plug_in_for
from torchtitan_flux.data.sources.captions import METADATA_FILES

TEXT_SUFFIXES = (".txt", ".caption")
"""Of texts beside pictures, in any case: the first that says anything counts."""

UNCLEAR = "text files might belong to several pictures, and are not read"
UNUSED = "text files belong to no picture"
SPELLED_TWICE = "text files differ from another one in upper and lower case alone, and are not read"
TABLES = "tables beside pictures are not read, only metadata.csv and metadata.jsonl are"

_TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".xlsx")


def is_picture(file: str) -> bool:
    """Whether a file is one by its suffix."""
    return os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES


def composed(name: str) -> str:
    """The spelling of a name (NFC) that all its spellings have in common: é or e and an accent."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


class Pairs:
    """Texts of the pictures of one directory, all of whose files are given.

    A text belongs to the pictures of its stem. One whose stem no picture has belongs to the
    picture whose stem is the same in another Unicode spelling, if there is one such text and one
    such picture.
    """

    def __init__(self, files: Iterable[str]):
        self._pictures: Counter[str] = Counter()  # how many of each stem
        self._texts: dict[str, dict[str, str]] = {suffix: {} for suffix in TEXT_SUFFIXES}
        self._others: dict[str, list[str]] = {}
        self._spelled_twice: list[str] = []
        for file in files:
            stem, ending = os.path.splitext(file)
            suffix = ending.lower()
            if suffix in IMAGE_SUFFIXES:
                self._pictures[stem] += 1
            elif suffix not in TEXT_SUFFIXES:
                self._others.setdefault(stem, []).append(file)
            else:  # a.txt counts before a.TXT
                texts = self._texts[suffix]
                first, *second = sorted(filter(None, (texts.get(stem), file)), reverse=True)
                texts[stem] = first
                self._spelled_twice += second
        self._unclear: set[str] = set()  # stems of pictures
        self._unused: list[str] = []
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
            else:
                self._unclear.update(stems)
        self._unused += alone.values()

    def texts(self, picture: str) -> list[str]:
        """The texts of a picture, of each suffix one at most."""
        stem = os.path.splitext(picture)[0]
        return [texts[stem] for texts in self._texts.values() if stem in texts]

    def is_unclear(self, picture: str) -> bool:
        """Whether a text is there that belongs to this picture or to another one."""
        return os.path.splitext(picture)[0] in self._unclear

    def shares_text(self, picture: str) -> bool:
        """Whether another picture has the same stem, and therefore the same texts."""
        return self._pictures[os.path.splitext(picture)[0]] > 1

    def remarks(self) -> Iterator[tuple[str, str]]:
        """(what is odd, file): files that are not read although they look meant."""
        unclear = {composed(stem) for stem in self._unclear}
        explained = set()
        for stem, files in sorted(self._others.items()):
            has_text = any(stem in texts for texts in self._texts.values())
            captioned = has_text and stem not in self._pictures
            for file in files:
                suffix = os.path.splitext(file)[1].lower()
                kind = f"{suffix or 'nameless'} files"
                package = plug_in_for(suffix)
                if file in METADATA_FILES:
                    continue
                if captioned or package:
                    beside = " with a caption beside them" if captioned else ""
                    hint = f" (`pip install {package}` reads them)" if package else ""
                    yield f"{kind}{beside} are not read{hint}", file
                    explained.add(stem)
                elif stem in self._pictures and not has_text:
                    yield f"{kind} beside pictures are not read", file
                elif suffix in _TABLES:
                    yield TABLES, file
        for file in sorted(self._spelled_twice):
            yield SPELLED_TWICE, file
        for file in sorted(self._unused):
            stem = os.path.splitext(file)[0]
            if composed(stem) in unclear:
                yield UNCLEAR, file
            elif stem not in explained:
                yield UNUSED, file
