"""The prompts of our own grammar differ, repeat by seed, and lead to everything a teacher draws."""

from itertools import islice

from arcflow.data.grammar import ANIMALS, PEOPLE, STYLES, THINGS, prompts


def test_no_two_are_alike_and_a_longer_list_begins_with_the_shorter() -> None:
    found = [*prompts(3000)]
    assert len(set(found)) == 3000 and found[:100] == [*prompts(100)] and [*islice(prompts(9, 1), 9)] != found[:9]


def test_they_lead_to_people_animals_things_styles_and_letters() -> None:
    text = "\n".join(prompts(3000))
    for words in (PEOPLE, ANIMALS, THINGS, STYLES):
        assert all(word in text for word in words)
    assert text.isascii() and " a a" not in text and " a e" not in text.replace(" a Euro", "") and 'says "' in text
