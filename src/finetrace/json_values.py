"""Values of rows as JSON can say them."""

from __future__ import annotations

import base64
import datetime
import math
from collections.abc import Mapping
from typing import Any


def json_value(value: Any) -> Any:
    """The value as JSON can say it: NaN is null, dates are ISO text, bytes are base64, what is left becomes `str`.

    Raises:
        UnicodeEncodeError: A text holds half a surrogate pair, which no file or tokenizer takes.
    """
    if isinstance(value, str):
        value.encode()
        return value
    if value is None or isinstance(value, bool | int):
        return value
    if type(value).__name__ in ("NAType", "NaTType"):  # how pandas says null
        return None
    if isinstance(value, float):
        return value if math.isfinite(value) else None if math.isnan(value) else str(value)
    if isinstance(value, Mapping):
        return {json_value(str(key)): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if hasattr(value, "tolist"):  # NumPy's and torch's scalars and arrays
        return json_value(value.tolist())
    text = str(value)
    return json_value(f"<{type(value).__name__}>" if " at 0x" in text else text)  # an address differs in every run
