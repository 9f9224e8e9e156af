"""The zip format of torch.save archives: its records and limits, and the names of torch's storage classes."""

import struct

from megagrow.checkpoint.index import DType

ALIGNMENT = 64
"""Bytes; torch aligns the values of every tensor in the file to a multiple of this."""
STORAGES = {
    "FloatStorage": DType.FLOAT32,
    "DoubleStorage": DType.FLOAT64,
    "HalfStorage": DType.FLOAT16,
    "BFloat16Storage": DType.BFLOAT16,
    "LongStorage": DType.INT64,
    "IntStorage": DType.INT32,
    "ShortStorage": DType.INT16,
    "CharStorage": DType.INT8,
    "ByteStorage": DType.UINT8,
    "BoolStorage": DType.BOOL,
}
LOCAL = struct.Struct("<IHHHHHIIIHH")
CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
END = struct.Struct("<IHHHHIIH")
END_64 = struct.Struct("<IQHHIIQQQQ")
END_64_LOCATOR = struct.Struct("<IIQI")
ZIP64_SIZE = 0xFFFFFFFF
ZIP64_COUNT = 0xFFFF
"""From this size, offset or number of members on, a zip needs zip64 fields."""
UTF_8 = 0x800
"""Flag of a member whose name is UTF-8, not code page 437."""
