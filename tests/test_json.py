"""The small words of JSON in which the rest of translate.py speaks."""

import json
from typing import Any

import pytest
from messages import JUNK, text

import translate


@pytest.mark.parametrize(
    ("value", "is_blank"),
    [
        ("", True),
        (" \n\t\u00a0\u2003", True),
        ("\u2003\n", True),
        ("\ufeff", True),
        (" a ", False),
        ("\u200b", False),
        # White space in Python alone.
        ("\x1f", False),
        ("\x85", False),
    ],
)
def test_white_space_is_what_javascript_takes_for_it(value: str, is_blank: bool) -> None:
    assert translate.is_blank(value) == is_blank


@pytest.mark.parametrize(("value", "length"), [("", 0), ("aé漢", 3), ("😀", 2), ("\ud83d", 1)])
def test_a_length_is_counted_in_halves_of_utf_16(value: str, length: int) -> None:
    assert translate.js_length(value) == length


def test_a_content_is_a_list_of_blocks_whatever_it_was() -> None:
    assert translate.as_blocks("a") == [text("a")]
    assert translate.as_blocks("") == []
    for junk in JUNK:
        if not isinstance(junk, str | list):
            assert translate.as_blocks(junk) == translate.as_list(junk) == []
    assert translate.as_blocks([5]) == [5]


def test_only_a_string_is_one() -> None:
    for junk in JUNK:
        expected = junk if isinstance(junk, str) else ""
        assert translate.get_str({"a": junk}, "a") == expected
        assert translate.get_str(junk, "b") == ""


def test_a_copy_lacks_what_it_is_to_lack() -> None:
    value: dict[str, Any] = {"a": None, "b": {}, "c": [], "d": 0, "e": "", "f": False}
    before = json.dumps(value)
    assert translate.without(value, {"a", "x"}).keys() == set("bcdef")
    assert translate.without_nulls(value).keys() == set("bcdef")
    assert translate.without_empties(value).keys() == set("def")
    assert json.dumps(value) == before
