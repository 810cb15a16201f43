"""What a JPEG file holds: its quantisation tables, sampling factors and quantised DCT coefficients, bit for bit.

Pillow gives decoded pixels only, rounded, clipped and with interpolated chroma, from which the coefficients cannot be
recovered exactly. This reads them from the entropy-coded data (ITU-T T.81): Huffman coding, baseline and progressive, 8 bit.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

_ZIGZAG = sorted(
    range(64), key=lambda n: (s := n // 8 + n % 8, n // 8 if s % 2 else n % 8)
)  # natural index of each place
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_STARTS = {0xC0: False, 0xC1: False, 0xC2: True}  # start-of-frame markers: progressive or not
_OTHER_STARTS = {0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
_PIXELS = "; another --operator, denoise say, takes the pixels instead"
_STANDARD = bytes.fromhex(  # the Huffman tables of T.81, K.3, as a segment holds them
    "0000010501010101010100000000000000000102030405060708090a0b100002010303020403050504040000017d010203000411"
    "05122131410613516107227114328191a1082342b1c11552d1f02433627282090a161718191a25262728292a3435363738393a43"
    "4445464748494a535455565758595a636465666768696a737475767778797a838485868788898a92939495969798999aa2a3a4a5"
    "a6a7a8a9aab2b3b4b5b6b7b8b9bac2c3c4c5c6c7c8c9cad2d3d4d5d6d7d8d9dae1e2e3e4e5e6e7e8e9eaf1f2f3f4f5f6f7f8f9fa"
    "0100030101010101010101010000000000000102030405060708090a0b1100020102040403040705040400010277000102031104"
    "052131061241510761711322328108144291a1b1c109233352f0156272d10a162434e125f11718191a262728292a35363738393a"
    "434445464748494a535455565758595a636465666768696a737475767778797a82838485868788898a92939495969798999aa2a3"
    "a4a5a6a7a8a9aab2b3b4b5b6b7b8b9bac2c3c4c5c6c7c8c9cad2d3d4d5d6d7d8d9dae2e3e4e5e6e7e8e9eaf2f3f4f5f6f7f8f9fa"
)


@dataclass
class Component:
    """One colour plane: identifier, sampling factors, table number, and its blocks, (rows, columns, 8, 8) once decoded."""

    identifier: int
    h: int
    v: int
    table: int
    rows: int = 0
    columns: int = 0
    stride: int = 0  # blocks in a row with those that fill up the last unit
    data: array[int] = field(default_factory=lambda: array("h"))
    prediction: int = 0

    def blocks(self) -> np.ndarray:
        """Return the quantised coefficients, (rows, columns, 8, 8) int16, vertical frequency first."""
        whole = np.frombuffer(self.data, np.int16).reshape(-1, self.stride, 8, 8)
        return whole[: self.rows, : self.columns].copy()


@dataclass
class JpegFile:
    """The decoded syntax of a JPEG file: size (height, width), components and tables {number: (8, 8) int}."""

    height: int = 0
    width: int = 0
    progressive: bool = False
    components: list[Component] = field(default_factory=list)
    tables: dict[int, np.ndarray] = field(default_factory=dict)
    adobe: int | None = None
    interval: int = 0
    huffman: dict[int, array[int]] = field(default_factory=dict)


def read_jpeg(source: str | Path | bytes) -> JpegFile:
    """Parse a JPEG file or its bytes.

    Raises:
        ValueError: not a JPEG, damaged, or of a kind that is not read (arithmetic coding, lossless, 12 bit, four colours,
            RGB without conversion to YCbCr).
    """
    name = "the JPEG data" if isinstance(source, bytes) else str(source)
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        raise ValueError(f"{name} cannot be read ({error.strerror})") from None
    if data[:2] != b"\xff\xd8":
        raise ValueError(f"{name} is not a JPEG file")
    try:
        return _parse(data)
    except (LookupError, ArithmeticError, StopIteration) as error:
        raise ValueError(f"{name} is damaged or cut short ({type(error).__name__})") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _parse(data: bytes) -> JpegFile:
    file, at, scans = JpegFile(), 2, 0
    readers: dict[int, Callable[[JpegFile, bytes], None]] = {0xDB: _quantisation, 0xC4: _huffman, 0xEE: _adobe}
    readers |= dict.fromkeys(_STARTS, _nothing) | {0xDD: _restart_interval}
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            raise ValueError("damaged: a marker is missing")
        kind = data[at + 1]
        if kind == 0xFF:  # fill byte
            at += 1
            continue
        if kind == 0xD9:
            break
        if kind in _OTHER_STARTS:
            raise ValueError(f"only Huffman-coded baseline and progressive files of 8 bit are read{_PIXELS}")
        length = int.from_bytes(data[at + 2 : at + 4])
        body = data[at + 4 : at + 2 + length]
        at += 2 + length
        if kind in _STARTS:
            _frame(file, body, _STARTS[kind])
        elif kind == 0xDA:
            end = _MARKER.search(data, at)
            stop = end.start() if end else len(data)
            _scan(file, body, data[at:stop])
            at, scans = stop, scans + 1
        else:
            readers.get(kind, _nothing)(file, body)
    if not scans:
        raise ValueError("holds no image data")
    return file


def _nothing(file: JpegFile, body: bytes) -> None:
    """Skip a segment that says nothing of the coefficients."""


def _adobe(file: JpegFile, body: bytes) -> None:
    if body[:5] == b"Adobe":
        file.adobe = body[11]


def _restart_interval(file: JpegFile, body: bytes) -> None:
    file.interval = int.from_bytes(body[:2])


def _quantisation(file: JpegFile, body: bytes) -> None:
    at = 0
    while at < len(body):
        wide, number = body[at] >> 4, body[at] & 15
        size = 64 * (wide + 1)
        values = np.frombuffer(body[at + 1 : at + 1 + size], ">u2" if wide else "u1").astype(np.int64)
        table = np.empty(64, np.int64)
        table[_ZIGZAG] = values
        file.tables[number] = table.reshape(8, 8)
        at += 1 + size


def _huffman(file: JpegFile, body: bytes) -> None:
    """Store each code table as a list over the next 16 bits: length of the code * 256 + symbol; 0 where there is none."""
    at = 0
    while at < len(body):
        counts = body[at + 1 : at + 17]
        symbols = iter(body[at + 17 : at + 17 + sum(counts)])
        lookup, code = array("i", bytes(4 * 65536)), 0
        for length, count in enumerate(counts, 1):
            for _ in range(count):
                entry, span = length << 8 | next(symbols), 1 << (16 - length)
                lookup[code * span : (code + 1) * span] = array("i", [entry]) * span
                code += 1
            code <<= 1
        file.huffman[body[at]] = lookup
        at += 17 + sum(counts)


@cache
def _standard() -> dict[int, array[int]]:
    """Return the code tables that baseline files without their own mean, as frames of Motion JPEG do."""
    file = JpegFile()
    _huffman(file, _STANDARD)
    return file.huffman


def _frame(file: JpegFile, body: bytes, progressive: bool) -> None:
    if body[0] != 8:
        raise ValueError(f"only 8 bit per sample are read, not {body[0]}{_PIXELS}")
    file.progressive = progressive
    file.height, file.width = int.from_bytes(body[1:3]), int.from_bytes(body[3:5])
    parts = [body[6 + 3 * i : 9 + 3 * i] for i in range(body[5])]
    file.components = [Component(p[0], p[1] >> 4, p[1] & 15, p[2]) for p in parts]
    rgb = [c.identifier for c in file.components] == [82, 71, 66] or file.adobe == 0
    if len(file.components) not in (1, 3) or (rgb and len(file.components) == 3):
        raise ValueError(f"only grey and YCbCr files are read{_PIXELS}")
    if not file.height or not file.width:
        raise ValueError("the file does not state its size")
    highest_h, highest_v = (max(getattr(c, a) for c in file.components) for a in "hv")
    units_x, units_y = -(-file.width // (8 * highest_h)), -(-file.height // (8 * highest_v))
    for c in file.components:
        c.columns, c.rows = -(-file.width * c.h // (8 * highest_h)), -(-file.height * c.v // (8 * highest_v))
        c.stride = units_x * c.h
        c.data = array("h", bytes(2 * 64 * c.stride * units_y * c.v))


class _Bits:
    """A bit reader: `windows[i]` holds the 32 bits that start at byte i."""

    def __init__(self, data: bytes) -> None:
        raw = np.frombuffer(data.replace(b"\xff\x00", b"\xff").rstrip(b"\xff") + b"\xff" + bytes(8), np.uint8)
        wide = raw.astype(np.uint32)
        self.windows = array("I", (wide[:-3] << 24 | wide[1:-2] << 16 | wide[2:-1] << 8 | wide[3:]).tobytes())
        self.at = 0

    def symbol(self, table: array[int]) -> int:
        at = self.at
        entry = table[self.windows[at >> 3] >> (16 - (at & 7)) & 0xFFFF]
        if not entry:
            raise IndexError("no such code")
        self.at = at + (entry >> 8)
        return entry & 255

    def get(self, count: int) -> int:
        at = self.at
        self.at = at + count
        return self.windows[at >> 3] >> (32 - count - (at & 7)) & ((1 << count) - 1)

    def signed(self, count: int) -> int:
        value = self.get(count)
        return value if value >> (count - 1) else value - (1 << count) + 1


@dataclass
class _Scan:
    """Spectral selection and successive approximation of a scan, and the run of empty blocks that is under way."""

    first: int
    last: int
    high: int
    low: int
    run: int = 0


def _scan(file: JpegFile, body: bytes, data: bytes) -> None:
    count, none = body[0], array("i")  # an empty table: not every scan reads both
    known = file.huffman if file.progressive else _standard() | file.huffman
    chosen = []
    for i in range(count):
        identifier, tables = body[1 + 2 * i], body[2 + 2 * i]
        component = next(c for c in file.components if c.identifier == identifier)
        chosen.append((component, known.get(tables >> 4, none), known.get(16 | tables & 15, none)))
    first, last, approximation = body[1 + 2 * count : 4 + 2 * count]
    scan = _Scan(first, last, approximation >> 4, approximation & 15)
    decode = _decoder(file.progressive, scan)
    segments = iter(_RESTART.split(data))
    bits = _Bits(next(segments))
    for number, unit in enumerate(_units([c for c, _, _ in chosen])):
        if file.interval and number and number % file.interval == 0:
            bits, scan.run = _Bits(next(segments, b"")), 0
            for component, _, _ in chosen:
                component.prediction = 0
        for index, block in unit:
            component, dc, ac = chosen[index]
            decode(bits, component, 64 * block, dc, ac, scan)
    for component, _, _ in chosen:
        component.prediction = 0


def _units(components: list[Component]) -> Iterator[list[tuple[int, int]]]:
    """Yield the minimum coded units of a scan: lists of (component of the scan, block number)."""
    if len(components) == 1:
        only = components[0]
        yield from ([(0, r * only.stride + c)] for r in range(only.rows) for c in range(only.columns))
        return
    across = components[0].stride // components[0].h
    down = len(components[0].data) // (64 * components[0].stride * components[0].v)
    for y in range(down):
        for x in range(across):
            yield [
                (i, (y * c.v + r) * c.stride + x * c.h + s)
                for i, c in enumerate(components)
                for r in range(c.v)
                for s in range(c.h)
            ]


_Decode = Callable[..., None]


def _decoder(progressive: bool, scan: _Scan) -> _Decode:
    if not progressive:
        return _baseline
    if scan.first == 0:
        return _dc_refine if scan.high else _dc_first
    return _ac_refine if scan.high else _ac_first


def _dc(bits: _Bits, c: Component, dc: array[int]) -> int:
    size = bits.symbol(dc)
    if size:
        c.prediction += bits.signed(size)
    return c.prediction


def _baseline(bits: _Bits, c: Component, at: int, dc: array[int], ac: array[int], scan: _Scan) -> None:
    data, k = c.data, 1
    data[at] = _dc(bits, c, dc)
    while k < 64:
        code = bits.symbol(ac)
        size = code & 15
        if size:
            k += code >> 4
            data[at + _ZIGZAG[k]] = bits.signed(size)
            k += 1
        elif code == 0xF0:
            k += 16
        else:
            break


def _dc_first(bits: _Bits, c: Component, at: int, dc: array[int], ac: array[int], scan: _Scan) -> None:
    c.data[at] = _dc(bits, c, dc) << scan.low


def _dc_refine(bits: _Bits, c: Component, at: int, dc: array[int], ac: array[int], scan: _Scan) -> None:
    if bits.get(1):
        c.data[at] |= 1 << scan.low


def _ac_first(bits: _Bits, c: Component, at: int, dc: array[int], ac: array[int], scan: _Scan) -> None:
    if scan.run:
        scan.run -= 1
        return
    k = scan.first
    while k <= scan.last:
        code = bits.symbol(ac)
        size, skip = code & 15, code >> 4
        if size:
            k += skip
            c.data[at + _ZIGZAG[k]] = bits.signed(size) << scan.low
            k += 1
        elif skip == 15:
            k += 16
        else:
            scan.run = (1 << skip) - 1 + (bits.get(skip) if skip else 0)
            break


def _ac_refine(bits: _Bits, c: Component, at: int, dc: array[int], ac: array[int], scan: _Scan) -> None:
    k = scan.first
    while not scan.run and k <= scan.last:
        code = bits.symbol(ac)
        size, skip = code & 15, code >> 4
        if not size and skip < 15:
            scan.run = (1 << skip) + (bits.get(skip) if skip else 0)
            break
        new = 0 if not size else (1 if bits.get(1) else -1) << scan.low
        k = _refine_until(bits, c.data, at, k, scan, skip)
        if new:
            c.data[at + _ZIGZAG[k]] = new
        k += 1
    if scan.run:
        _refine_until(bits, c.data, at, k, scan, 64)
        scan.run -= 1


def _refine_until(bits: _Bits, data: array[int], at: int, k: int, scan: _Scan, zeros: int) -> int:
    """Add a bit to every known coefficient from place k on, until a zero follows `zeros` zeros; return its place."""
    step = 1 << scan.low
    while k <= scan.last:
        place = at + _ZIGZAG[k]
        if value := data[place]:
            if bits.get(1) and not abs(value) & step:
                data[place] = value + (step if value > 0 else -step)
        elif zeros == 0:
            break
        else:
            zeros -= 1
        k += 1
    return k
