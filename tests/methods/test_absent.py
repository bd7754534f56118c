"""The list of methods that are not here."""

from steppe.methods._absent import ABSENT, absent_methods
from steppe.methods.cards import index
from steppe.methods.registry import CARDS


def test_each_absent_method_has_a_reason_on_the_page_and_no_card():
    page = " ".join(index().split())
    for (name, _, reason), entry in zip(ABSENT, absent_methods(), strict=True):
        assert name.lower() not in {card.label.lower() for card in CARDS.values()}
        assert reason.endswith(".")
        assert entry in page
