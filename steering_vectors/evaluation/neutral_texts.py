"""A few neutral texts, on which the cost of steering is measured by default."""

NEUTRAL_TEXTS = (
    "The library opens at nine in the morning and closes at six in the evening, except on Sundays.",
    "To change a light bulb, switch off the power, wait until the bulb is cool, and turn it to the left.",
    "Copper is a metal with a reddish colour. It conducts heat and electricity well and is used for wires.",
    "The river rises in the hills, flows south through three towns, and reaches the sea after ninety miles.",
    "In the second chapter the author describes how the village was built and who lived in its first houses.",
    "A square has four equal sides and four right angles, so its area is the length of one side squared.",
    "The meeting was moved from Tuesday to Thursday because two members of the committee were travelling.",
    "Bread is made from flour, water, salt and yeast. The dough rests for an hour before it goes into the oven.",
)
