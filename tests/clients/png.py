"""PNGs of stripes, without a library."""

import base64
import struct
import zlib


def png(seed, side=64):
    """A PNG in base64; another one for each seed."""
    rows = b"".join(
        b"\0" + b"".join(bytes(((x * seed) % 256, (y * seed) % 256, (x + y) % 256)) for x in range(side))
        for y in range(side)
    )

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return base64.b64encode(data).decode()
