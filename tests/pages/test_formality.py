"""On SmolLM2, a vector of formal and casual English steers, and its pairs with shuffled labels make one that doesn't."""

from typing import Any

from steering_vectors import from_index, train_steering_vector
from steering_vectors.evaluation import Controls, evaluate

BLOCK = 16
PAIRS = [
    ("I would be grateful if you could send me the report.", "hey can u send me the report lol"),
    ("We regret to inform you that the meeting has been cancelled.", "so yeah the meeting's off, sorry guys"),
    ("Please do not hesitate to contact me should you have any questions.", "hit me up if u got questions"),
    ("I am writing to enquire about the position advertised.", "yo is that job still open or what"),
    ("It would be a pleasure to meet you at your earliest convenience.", "wanna hang out sometime soon?"),
    ("The results demonstrate a considerable improvement.", "dude the results are way better now"),
    ("I sincerely apologise for any inconvenience this may have caused.", "my bad, sorry bout that"),
    ("We kindly request that all participants arrive on time.", "don't be late guys, ok?"),
    ("Thank you very much for your generous assistance.", "thx a ton man, ur awesome"),
    ("The committee has decided to postpone the decision.", "they're gonna decide later i guess"),
    ("I must respectfully disagree with your assessment.", "nah, that's totally wrong dude"),
    ("One must consider the consequences of such an action.", "u gotta think bout what happens next, y'know"),
    ("The gentleman declined the invitation.", "that guy was like, nope"),
    ("It is imperative that we act without delay.", "we gotta do this like right now"),
    ("I should be most obliged if you would reply promptly.", "text me back asap k?"),
    ("The professor delivered an informative lecture.", "the prof talked about some cool stuff"),
]
ITEMS = [
    (
        "Message to the team:",
        " I would like to inform you that the project has been completed successfully.",
        " hey guys, so the project's done, pretty cool huh",
    ),
    ("Reply:", " Thank you for your letter; I shall respond in due course.", " ok cool, gonna get back to u later"),
    (
        "Regarding your question,",
        " we would be pleased to provide further information upon request.",
        " yeah just ask me whatever, no biggie",
    ),
    ("Email to my boss:", " I am writing to request a day of leave on Friday.", " hey can i take friday off? thx"),
    (
        "Review of the restaurant:",
        " The establishment offers an exceptional dining experience.",
        " omg the food here is so good lol",
    ),
    (
        "About the party:",
        " It would be an honour to receive you as our guest.",
        " u should totally come, it's gonna be fun",
    ),
    (
        "Weather today:",
        " Considerable precipitation is expected throughout the afternoon.",
        " it's gonna rain a bunch later, ugh",
    ),
    (
        "To whom it may concern:",
        " I hereby confirm that the information provided is accurate.",
        " yep all that stuff is right, trust me",
    ),
    ("Note:", " Kindly ensure that the door is closed upon departure.", " don't forget to shut the door, ok?"),
    ("Comment:", " I find this argument to be rather unconvincing.", " lol nope, that makes no sense man"),
]


def measured(smollm2: tuple[Any, Any], pairs: list[tuple[str, str]]) -> Any:
    """The evaluation of a vector from the mean over each text's tokens but the first."""
    arguments: dict[str, Any] = {"tokens": from_index(1)}
    vector = train_steering_vector(*smollm2, pairs, layers=BLOCK, **arguments)
    controls = Controls(training=arguments)
    return evaluate(
        *smollm2, vector, ITEMS, multipliers=[-1, 0, 1], texts=[], training_samples=pairs, controls=controls
    )


def test_formality_steers_clear_of_all_controls_and_the_same_twice(smollm2: tuple[Any, Any]) -> None:
    """A measurement by hand found a slope of +0.99 ± 0.08."""
    result = measured(smollm2, PAIRS)
    vector, *others = result.rows
    assert result.verdict.startswith("steers: its slope is +")
    assert vector.slope_low < 0.99 + 0.08
    assert vector.slope_high > 0.99 - 0.08
    assert vector.anti_steerable == 0
    assert len([row for row in others if row.slope is not None and row.slope_high < 0.5 * vector.slope_low]) == 4
    assert measured(smollm2, PAIRS) == result


def test_shuffled_labels_do_not_steer(smollm2: tuple[Any, Any]) -> None:
    shuffled = [pair if number % 2 else pair[::-1] for number, pair in enumerate(PAIRS)]
    assert measured(smollm2, shuffled).verdict.startswith("does not steer: ")
