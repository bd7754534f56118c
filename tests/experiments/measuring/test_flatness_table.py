from steppe.experiments.measuring.flatness_table import FlatnessTable


def test_groups_have_the_reference_first_and_single_files_their_names() -> None:
    found = {name: name for name in "abcd"}
    assert FlatnessTable("m", "s", ("SAM", "SGD"), found, True).groups() == {"SGD": ["c", "d"], "SAM": ["a", "b"]}  # type: ignore[arg-type]
    assert FlatnessTable("m", "s", ("SAM", "SGD"), found, False).groups() == {"SAM": list("abcd")}  # type: ignore[arg-type]
    assert FlatnessTable("m", "s", ("SAM", "SGD"), {"a": "a"}, False).groups() == {"a": ["a"]}  # type: ignore[arg-type, dict-item]
