"""The former place of `compressor.kvcache.layout`, for one more release."""

import warnings

from compressor.kvcache.layout import *  # noqa: F403
from compressor.kvcache.layout import load_layout as load_layout

warnings.warn(
    "compressor.kvlayout is now compressor.kvcache.layout; import that", DeprecationWarning, stacklevel=2
)
