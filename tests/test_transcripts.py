"""The rules by which transcripts are read and compared."""

from __future__ import annotations

from transcripts import difference

TABLE = """\
dataset   rows  score  seconds
antonym     48  10.42      0.2
capital     48  58.33      0.2
"""


def test_what_says_the_same() -> None:
    for shown, said in (
        (TABLE, TABLE.replace("0.2", "9.7")),
        (TABLE, TABLE.replace("10.42", "10.43")),  # one in the last digit
        ("dataset  rows\n...\ncapital    48", "dataset rows\nantonym 48\nfrench 48\ncapital 48\n"),
        ("first\n  ... (2 more)", "first\nsecond\nthird"),
        ("in 2.5 s, 3 adapters", "in 11 s, 3 adapters"),
        ('{"probe_ms": 1.5,\n "k": 3}', '{"probe_ms": 2.25, "k": 3}'),
        ("mixture  9.5e-08", "mixture  2.1e-07"),
        ("plural 0.99 ████████", "plural 0.99 ███████▉"),
    ):
        assert difference(shown, said) is None


def test_what_does_not() -> None:
    for shown, said in (
        (TABLE, TABLE.replace("10.42", "12.50")),
        (TABLE, TABLE + "\nmore"),
        ("...\nlast", "last\nand one more"),
        ("a\n...\nb\n...\nc", "a\nc\nb"),
        ("in 2.5 s, 3 adapters", "in 2.5 s, 4 adapters"),
        ("mixture  9.5e-08", "mixture  9.5e-03"),
        ("[0.9421727657318115]", "[0.5421727657318115]"),  # as many digits as a digest
        ("0.998673677444458", "0.997673600000000"),
        ("−0.31", "0.31"),
    ):
        assert difference(shown, said) is not None
