"""The registry finds each method by its file."""

import pkgutil

import pytest

from steppe import methods
from steppe.methods import registry
from steppe.methods.registry import CARDS, FUNCTIONS


def test_each_file_of_a_method_has_a_card():
    files = {module.name for module in pkgutil.iter_modules(methods.__path__) if not module.name.startswith("_")}
    assert set(CARDS) == files - {"cards", "registry"}


def test_sam_is_first_and_the_others_are_in_alphabetical_order():
    first, *others = CARDS
    assert first == "sam"
    assert others == sorted(others)


def test_functions_are_those_named_as_their_method():
    others = {"ascent_steps", "bisam", "fraction_sam", "functional_sam", "micro_batch_sam"}
    for_adapters = {name for name, card in CARDS.items() if card.needs_adapters}
    assert for_adapters == {"bar", "flat_lora", "merged_sam"}
    assert set(FUNCTIONS) == set(CARDS) - others - for_adapters


def test_file_without_a_card_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "unfinished.py").write_text("")
    monkeypatch.setattr(methods, "__path__", [str(tmp_path)])
    with pytest.raises(TypeError, match=r"steppe/methods/unfinished.py defines no CARD"):
        list(registry._find_cards())
