"""Codes packed into 32-bit words without waste: b bits cost b bits.

Layout. A row of codes is padded to whole runs of 32. A width is split into planes of 4, 2 or 1 bits (3 = 2 + 1,
5 = 4 + 1, 6 = 4 + 2, 8 = 4 + 4; the first plane holds the low bits), so that no code straddles two words. Within a
plane of p bits, word w of the row holds codes w·32/p … (w + 1)·32/p − 1, the first in the lowest bits. The planes of
a row follow each other. `allocator/storage.py` counts exactly these words.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from allocator.storage import PACK, ceil_div

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (4, 4)}


def words(columns: int, bits: int) -> int:
    """32-bit words of one packed row."""
    return ceil_div(columns, PACK) * bits


def pack(code_OI: Tensor, bits: int) -> Tensor:
    """int32 (O, words) from uint8 codes (O, I), each below 2^bits."""
    rows, columns = code_OI.shape
    padded_OI = F.pad(code_OI, (0, -columns % PACK)).to(torch.int64)
    planes, low = [], 0
    for width in PLANES[bits]:
        part_OI = (padded_OI >> low) & (2**width - 1)
        shift_c = torch.arange(PACK // width, device=code_OI.device) * width
        planes.append((part_OI.view(rows, -1, PACK // width) << shift_c).sum(dim=-1))
        low += width
    word_OW = torch.cat(planes, dim=1)
    return torch.where(word_OW >= 2**31, word_OW - 2**32, word_OW).to(torch.int32)


def unpack(word_OW: Tensor, bits: int, columns: int) -> Tensor:
    """uint8 codes (O, columns) from int32 words (O, W)."""
    rows, runs = len(word_OW), ceil_div(columns, PACK)
    code_OI = torch.zeros(rows, runs * PACK, dtype=torch.int32, device=word_OW.device)
    first, low = 0, 0
    for width in PLANES[bits]:
        plane_OW = word_OW[:, first : first + runs * width, None]
        shift_c = torch.arange(PACK // width, device=word_OW.device, dtype=torch.int32) * width
        code_OI |= ((plane_OW >> shift_c) & (2**width - 1)).view(rows, -1) << low
        first, low = first + runs * width, low + width
    return code_OI[:, :columns].to(torch.uint8)


def unpack_at(word_W: Tensor, bits: int, index: Tensor) -> Tensor:
    """uint8 codes at the places `index` (…) of one packed row, int32 (W,); no others are unpacked."""
    runs = len(word_W) // bits
    code = torch.zeros_like(index, dtype=torch.int32)
    first, low = 0, 0
    for width in PLANES[bits]:
        word = word_W[first + torch.div(index * width, PACK, rounding_mode="floor")]
        shift = (index * width % PACK).to(torch.int32)
        code |= ((word >> shift) & (2**width - 1)) << low
        first, low = first + runs * width, low + width
    return code.to(torch.uint8)
