from rewards.canaries import generic


def test_generic_canaries_carry_the_question_and_the_component():
    canaries = {canary.name: canary for canary in generic("exact", question="ask", at_most=0.1)}
    assert canaries["question_echo"].completion({"ask": "How many?"}) == "How many?"
    assert canaries["empty"].completion({}) == ""
    assert len(canaries["hundred_kilobytes"].completion({})) == 100_000
    assert {(canary.component, canary.at_least, canary.at_most) for canary in canaries.values()} == {
        ("exact", 0.0, 0.1)
    }
