"""The day that chat templates write that ask for the date, as those of Llama 3.2 and SmolLM3 do."""

from __future__ import annotations

import datetime

# what Llama's own templates write where there is no clock; with the day of the run, rows of one index would have other
# tokens than those of yesterday and than its queries of tomorrow
DAY = datetime.datetime(2024, 7, 26)
PARTS = "aAbBcdHIjmMpSuUwWxXyY"  # of a date, as strftime calls them
_BARE = "dHIjmMSUWwy"  # of these, numbers, which glibc also writes without a leading zero
_FORMS = {f"%{part}": DAY.strftime(f"%{part}") for part in PARTS}
_FORMS |= {f"%-{part}": str(int(DAY.strftime(f"%{part}"))) for part in _BARE}
_WRITTEN = "".join(f".replace('{form}', '{text}')" for form, text in _FORMS.items())
_ON_ONE_DAY = "{% macro strftime_now(form) %}{{ form" + _WRITTEN + " }}{% endmacro +%}"


def on_one_day(template: str) -> str:
    """The template, a date that it asks for being `DAY`, not that on which it is run."""
    return _ON_ONE_DAY + template if "strftime_now" in template else template
