"""The level between INFO and WARNING: something that was to be done is done."""

from __future__ import annotations

import logging
from typing import Final

SUCCESS: Final = 25
"""``log.log(SUCCESS, "order shipped")``; by name in ``dictConfig`` and ``setLevel("SUCCESS")``."""

logging.addLevelName(SUCCESS, "SUCCESS")
