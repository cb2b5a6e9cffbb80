"""Is a packet that its container flags as a key frame really one? Read from the first bits of the picture itself.

Old phones write 3GP files whose index flags pictures that are predicted from others. A decoder that seeks to such a
picture shows broken frames and reports no error.
"""

IDR, HEVC_IRAP = 5, range(16, 22)  # types of NAL units: H.264 table 7-1, HEVC table 7-1
START = b"\x00\x00\x01"


def is_intra(codec: str, data: bytes, extradata: bytes | None) -> bool:
    """Whether the picture in `data` can be decoded alone. True for codecs whose flags were never seen wrong.

    codec: ffmpeg's name; data: one packet; extradata: the stream's header, which says how H.264 units are parted.
    """
    if codec == "h263":  # ITU-T H.263 5.1: source format in bits 2-4 of byte 4 (7: extended), coding type in bit 1
        return len(data) > 4 and data[4] >> 2 & 7 != 7 and not data[4] >> 1 & 1
    if codec == "mpeg4":  # ISO 14496-2 6.2.5: the two bits after a VOP's start code are 0 for an I-VOP
        at = data.find(START + b"\xb6")
        return 0 <= at < len(data) - 4 and data[at + 4] >> 6 == 0
    if codec == "h264":
        return any(unit & 31 == IDR for unit in _unit_headers(data, extradata, 4))
    if codec == "hevc":
        return any(unit >> 1 & 63 in HEVC_IRAP for unit in _unit_headers(data, extradata, 21))
    return True


def _unit_headers(data: bytes, extradata: bytes | None, size_at: int) -> list[int]:
    """First byte of every NAL unit. MP4 writes each unit's length before it, transport streams a start code.

    size_at: the byte of `extradata` whose lowest two bits say how many bytes a length has, less one.
    """
    found, at = [], 0
    if extradata and len(extradata) > size_at and extradata[0] == 1:
        size = (extradata[size_at] & 3) + 1
        while at + size < len(data):
            found.append(data[at + size])
            at += size + int.from_bytes(data[at : at + size], "big")
        return found
    while (at := data.find(START, at)) >= 0 and at + 3 < len(data):
        found.append(data[at + 3])
        at += 3
    return found
