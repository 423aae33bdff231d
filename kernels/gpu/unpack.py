"""Unpacks a file of zstd where there is no `zstd`: by the system's libzstd, which every Debian and Ubuntu has.

    unpack.py FILE.zst FILE
"""
import ctypes
import sys


class Buffer(ctypes.Structure):
    """ZSTD_inBuffer and ZSTD_outBuffer."""

    _fields_ = [("data", ctypes.c_void_p), ("size", ctypes.c_size_t), ("position", ctypes.c_size_t)]


def unpack(packed):
    """The content of one frame, piece by piece."""
    library = ctypes.CDLL("libzstd.so.1")
    library.ZSTD_createDStream.restype = ctypes.c_void_p
    library.ZSTD_decompressStream.restype = ctypes.c_size_t
    library.ZSTD_decompressStream.argtypes = [ctypes.c_void_p, ctypes.POINTER(Buffer), ctypes.POINTER(Buffer)]
    stream, room = library.ZSTD_createDStream(), ctypes.create_string_buffer(1 << 22)
    source = ctypes.create_string_buffer(packed, len(packed))
    have = Buffer(ctypes.cast(source, ctypes.c_void_p), len(packed), 0)
    while True:
        made = Buffer(ctypes.cast(room, ctypes.c_void_p), len(room), 0)
        left = library.ZSTD_decompressStream(stream, made, have)
        if library.ZSTD_isError(ctypes.c_size_t(left)):
            raise ValueError("not a whole zstd file")
        yield room.raw[: made.position]
        if left == 0:
            return
        if have.position == have.size and made.position < made.size:
            raise ValueError("the zstd file ends too early")


if __name__ == "__main__":
    with open(sys.argv[1], "rb") as packed, open(sys.argv[2], "wb") as file:
        file.writelines(unpack(packed.read()))
